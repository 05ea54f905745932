"""Many small pieces of a file at once: by few large reads where they lie close together, else by one read for each."""

import os
from collections.abc import Iterator, Sequence
from io import BufferedIOBase, UnsupportedOperation
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BLOCK = 2**19
"""Bytes read at once."""

GAP = 4096
"""Bytes between two records that are read and not used."""

SPARSE = 2**14
"""Where pieces lie further apart than this on average, each is read by itself."""


def gather(file: BufferedIOBase, starts_N: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """`size` bytes (N, size) from each of the bytes `starts_N` of a file; zeros stand for those behind its end."""
    if not len(starts_N):
        return np.zeros((0, size), np.uint8)
    if (starts_N[1:] < starts_N[:-1]).any():
        order_N = np.argsort(starts_N, kind="stable")
        made_NB = np.empty((len(starts_N), size), np.uint8)
        made_NB[order_N] = gather(file, starts_N[order_N], size)
        return made_NB
    number = _number(file)
    if number is not None and starts_N[-1] - starts_N[0] > SPARSE * len(starts_N):
        pieces = [os.pread(number, size, at).ljust(size, b"\0") for at in starts_N.tolist()]
        return np.frombuffer(b"".join(pieces), np.uint8).reshape(-1, size)
    parts, first, buffer = [], 0, bytearray(BLOCK)
    while first < len(starts_N):
        base = int(starts_N[first])
        last = max(first + 1, int(np.searchsorted(starts_N, base + BLOCK - size, "right")))
        wanted = int(starts_N[last - 1]) + size - base
        block = memoryview(buffer)[:wanted] if wanted <= BLOCK else memoryview(bytearray(wanted))
        there = filled(file, base, block)
        block[there:] = bytes(wanted - there)
        parts.append(pieces_of(block, starts_N[first:last] - base, size))
        first = last
    return np.concatenate(parts)


def filled(file: BufferedIOBase, at: int, buffer: "bytearray | memoryview") -> int:
    """Fill a buffer from byte `at` of a file on; how many bytes there are."""
    file.seek(at)
    view, there = memoryview(buffer), 0
    while there < len(view) and (more := file.readinto(view[there:])):
        there += more
    return there


def taken(file: BufferedIOBase, at: int, size: int) -> bytes:
    """`size` bytes of a file from `at`, fewer where it ends before."""
    file.seek(at)
    return file.read(size)


def pieces_of(block: "bytes | bytearray | memoryview", offsets_N: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """`size` bytes (N, size) from each of the places `offsets_N`, all of which lie in `block`."""
    windows = np.ndarray((max(0, len(block) - size + 1),), f"V{size}", block, strides=(1,))
    return windows[offsets_N].view(np.uint8).reshape(-1, size)


def numbers(pieces_NB: NDArray[np.uint8], at: int, code: str) -> NDArray[np.int64]:
    """The numbers of the type `code` (a NumPy code) that rows of bytes hold from byte `at` on."""
    size = np.dtype(code).itemsize
    return np.ascontiguousarray(pieces_NB[:, at : at + size]).view(code)[:, 0].astype(np.int64)


def as_arrow(values_N: NDArray[Any], there_N: NDArray[np.bool_] | None = None) -> pa.Array:
    """Numbers or truths (N,) as an Arrow array, null where they are not there."""
    data = np.packbits(values_N, bitorder="little") if values_N.dtype == bool else np.ascontiguousarray(values_N)
    valid = None if there_N is None else pa.py_buffer(np.packbits(there_N, bitorder="little"))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values_N.dtype), len(values_N), [valid, pa.py_buffer(data)])


def begin(pieces_NB: NDArray[np.uint8], signatures: Sequence[bytes]) -> NDArray[np.bool_]:
    """Which of some pieces (N, at least 8) begin with one of the signatures, none of which is longer than 8 bytes."""
    words_N = np.ascontiguousarray(pieces_NB[:, :8]).view("<u8")[:, 0]
    found_N = np.zeros(len(words_N), np.bool_)
    for one in signatures:
        found_N |= words_N & np.uint64(256 ** len(one) - 1) == int.from_bytes(one, "little")
    return found_N


def runs(begins_N: NDArray[np.int64], ends_N: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Rows `first` to `last` that are read at once: they follow one another in the file within a block."""
    jumps = (begins_N[1:] < ends_N[:-1]) | (begins_N[1:] > ends_N[:-1] + GAP)
    stops = [*(np.flatnonzero(jumps) + 1).tolist(), len(begins_N)]
    first = 0
    for stop in stops:
        while first < stop:
            last = first + int(np.searchsorted(ends_N[first:stop], begins_N[first] + BLOCK, "right"))
            yield first, max(first + 1, last)
            first = max(first + 1, last)


def slices(
    file: BufferedIOBase,
    begins_N: NDArray[np.int64],
    ends_N: NDArray[np.int64],
    starts_N: NDArray[np.int64],
    stops_N: NDArray[np.int64],
) -> Iterator[tuple[int, int, int, list[memoryview], memoryview]]:
    """Ranges `starts_N` to `stops_N` of a file, of which `begins_N` to `ends_N` is read around each.

    Gives first and last row of those read at once, where in the file their block begins, the ranges, and the block. If
    the file ends inside a block there are no ranges of it.
    """
    for low, high in runs(begins_N, ends_N):
        base = int(begins_N[low])
        wanted = int(ends_N[high - 1]) - base
        try:
            view = memoryview(taken(file, base, wanted))
        except OSError:
            view = memoryview(b"")
        places = zip((starts_N[low:high] - base).tolist(), (stops_N[low:high] - base).tolist(), strict=True)
        yield low, high, base, [view[at:end] for at, end in places] if len(view) == wanted else [], view


def _number(file: BufferedIOBase) -> int | None:
    """The descriptor of a file of this machine."""
    try:
        return file.fileno()
    except (UnsupportedOperation, AttributeError):
        return None
