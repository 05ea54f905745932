"""The values of an LMDB database, found many at a time; what is unusual is left to be looked at one by one."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators.formats.blocks import as_arrow, gather, numbers, pieces_of
from operators.formats.btree import BIG, NODE, OVERFLOW, PAGE, SEVERAL, SUB, Damaged, Tree, Value, leaves, values
from operators.formats.listing import Bound

HEAD, TAIL = 16, 9
"""Bytes of a value that are looked at: its first, and its last, which hold a number in msgpack."""
NO_RECORDS = 1024
"""Values that are none, such as `__len__`, are told from others later: so many are allowed for in the count."""
DAMAGED = "pages or values are not where they should be"


@dataclass(slots=True)
class Found:
    """N values in the order in which they lie in the file, and those that are looked at one by one."""

    keys: pa.Array
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    heads: NDArray[np.uint8]
    """Their first bytes (N, HEAD), and what follows where they are shorter."""
    tails: NDArray[np.uint8]
    """Their last bytes (N, TAIL), and what comes before where they are shorter."""
    others: list[Value]


def scan(tree: Tree, bound: Bound) -> Found:
    """All values of a database.

    Raises
    ------
    FormatError
        If `bound` does not allow so many.
    """
    keys, columns, others = [], [np.zeros((3, 0), np.int64)], []
    usual = faulty = 0
    for numbers_P, pages_PB, faults in leaves(tree):
        others += faults
        faulty += len(faults)
        own, found, left = _usual(tree, numbers_P, pages_PB)
        keys.append(own)
        columns.append(found)
        usual += len(own)
        for number in left:
            some = list(_one_by_one(tree, number))
            others += some
            faulty += sum(one.fault is not None for one in some)
            bound(max(usual + len(others) - faulty - NO_RECORDS, 0), faulty, DAMAGED)
        bound(max(usual + len(others) - faulty - NO_RECORDS, 0), faulty, DAMAGED)
    starts_N, sizes_N, big_N = np.concatenate(columns, axis=1)
    every = pa.chunked_array(keys, pa.large_binary()).combine_chunks()
    if (starts_N[1:] < starts_N[:-1]).any():
        order_N = np.argsort(starts_N, kind="stable")
        starts_N, sizes_N, big_N = starts_N[order_N], sizes_N[order_N], big_N[order_N]
        every = every.take(as_arrow(order_N))
    both_N2 = np.stack([starts_N - PAGE.size, starts_N + sizes_N - TAIL], axis=1)  # one after another in the file
    ends_N2B = gather(tree.file, both_N2.reshape(-1), PAGE.size + HEAD).reshape(-1, 2, PAGE.size + HEAD)
    heads_NB, tails_NB = ends_N2B[:, 0], ends_N2B[:, 1, :TAIL]
    first_N = numbers(heads_NB, 0, "<i8") * tree.page + PAGE.size
    whole_N = (big_N == 0) | ((first_N == starts_N) & (heads_NB[:, 10] & OVERFLOW != 0))
    if not whole_N.all():
        lost = "its pages are not where they should be: the file is damaged; get it again"
        others += [Value(key, fault=lost) for key in every.filter(as_arrow(~whole_N)).to_pylist()]
        every = every.filter(as_arrow(whole_N))
    return Found(every, starts_N[whole_N], sizes_N[whole_N], heads_NB[whole_N, PAGE.size :], tails_NB[whole_N], others)


def _one_by_one(tree: Tree, number: int) -> Iterator[Value]:
    try:
        yield from values(tree, number)
    except Damaged as fault:
        yield Value(b"damaged-page-%d" % number, fault=str(fault))


def _usual(
    tree: Tree, numbers_P: NDArray[np.int64], pages_PB: NDArray[np.uint8]
) -> tuple[pa.Array, NDArray[np.int64], list[int]]:
    """Keys (N,) of leaf pages, columns (3, N) of place, size and whether it has pages of its own; other pages' numbers.

    A page with anything that cannot be, or that is no plain value, is one of the others.
    """
    size = tree.page
    lower_P = numbers(pages_PB, 12, "<u2")
    counts_P = np.clip((np.clip(lower_P, 0, size) - PAGE.size) // 2, 0, None)
    sound_P = (lower_P >= PAGE.size) & (lower_P <= size)
    sound_P &= counts_P * NODE.size <= size - lower_P  # nodes do not overlap: a page cannot claim more than it holds
    widest = int(counts_P[sound_P].max(initial=0))
    places_PM = np.ascontiguousarray(pages_PB[:, PAGE.size : PAGE.size + 2 * widest]).view("<u2").astype(np.int64)
    there_PM = np.arange(widest) < counts_P[:, None]
    sound_P &= (~there_PM | ((places_PM >= lower_P[:, None]) & (places_PM <= size - NODE.size))).all(axis=1)
    which_N, slot_N = np.nonzero(there_PM & sound_P[:, None])
    place_N = places_PM[which_N, slot_N]
    flat = np.ascontiguousarray(pages_PB).reshape(-1)
    low_N, high_N, flags_N, long_N = (
        pieces_of(flat.data, which_N * size + place_N, NODE.size).view("<u2").astype(np.int64).T
    )
    sizes_N, inside_N = low_N | high_N << 16, place_N + NODE.size + long_N
    big_N = flags_N & BIG != 0
    fits_N = inside_N + np.where(big_N, 8, sizes_N) <= size
    pages_N = pieces_of(flat.data, np.where(fits_N & big_N, which_N * size + inside_N, 0), 8).view("<u8")[:, 0]
    fits_N &= (flags_N & (SUB | SEVERAL) == 0) & (~big_N | (pages_N < tree.end // size + 1))
    owners_N = np.where(big_N & fits_N, pages_N.astype(np.int64), numbers_P[which_N])
    starts_N = owners_N * size + np.where(big_N, PAGE.size, inside_N)
    fits_N &= starts_N + sizes_N <= tree.end
    sound_P[which_N[~fits_N]] = False
    kept_N = sound_P[which_N]
    keys = _strings(flat, (which_N * size + place_N + NODE.size)[kept_N], long_N[kept_N])
    columns = np.stack([starts_N[kept_N], sizes_N[kept_N], big_N[kept_N].astype(np.int64)])
    left: list[int] = numbers_P[~sound_P].tolist()
    return keys, columns, left


def _strings(data: NDArray[np.uint8], starts_N: NDArray[np.int64], sizes_N: NDArray[np.int64]) -> pa.Array:
    """Byte strings (N,) that lie at places of `data`."""
    stops_N = np.cumsum(sizes_N)
    offsets_N = np.concatenate([np.zeros(1, np.int64), stops_N])
    total = int(offsets_N[-1])
    taken = data[np.repeat(starts_N - offsets_N[:-1], sizes_N) + np.arange(total)]
    buffers = [None, pa.py_buffer(offsets_N), pa.py_buffer(np.ascontiguousarray(taken))]
    return pa.Array.from_buffers(pa.large_binary(), len(sizes_N), buffers)
