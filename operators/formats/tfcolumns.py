"""`tf.train.Example` messages of one layout, many at once: what lies where in each, found by NumPy.

Messages as every library writes them: each feature's key, list and value fill what they are in, and lists hold one
value. `tfexample` reads the others.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators.formats.blocks import as_arrow, pieces_of
from operators.formats.indexes import label_of
from operators.formats.tfexample import BYTES, FLOATS, INTEGERS

MOST_FEATURES, MOST_LAYOUTS, KINDS = 32, 64, 16
"""Of a record, of a block, and of features that come first, second, ... in its records."""
KEY = 32
"""Bytes of a feature's name."""
TEXT = 4096
"""Bytes of a name or label that are looked at."""


@dataclass(frozen=True, slots=True)
class Column:
    """One feature of N records: its kind, and where its value (or packed numbers) begins and how long it is."""

    kind: int
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Records of one layout: their numbers (N,) in the block, and their features by name."""

    rows: NDArray[np.int64]
    features: Mapping[str, Column]


class Block:
    """Bytes of a file, looked at by many places at once; the four bytes behind every message are there too."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.bytes = np.frombuffer(self.data, np.uint8)

    def pieces(self, at_N: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
        """`size` bytes (N, size) from each of some places; others where the block ends before."""
        return pieces_of(self.data, np.minimum(at_N, len(self.data) - size), size)

    def tagged(
        self, at_N: NDArray[np.int64], tags: Sequence[int], end_N: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
        """Of length-delimited fields at some places: which have one of the tags and lie before `end_N`, where their
        contents begin and end, and their tags. Lengths have at most four bytes.
        """
        head_N5 = self.pieces(at_N, 5)
        tag_N = head_N5[:, 0]
        word_N = np.ascontiguousarray(head_N5[:, 1:]).view("<u4")[:, 0].astype(np.int64)
        size_N, width_N, goes_on_N = word_N & 0x7F, np.ones(len(at_N), np.int64), word_N & 0x80 != 0
        for step in (1, 2, 3):
            if not goes_on_N.any():
                break
            part_N = word_N >> 8 * step
            size_N |= np.where(goes_on_N, (part_N & 0x7F) << 7 * step, 0)
            width_N += goes_on_N
            goes_on_N &= part_N & 0x80 != 0
        start_N = at_N + 1 + width_N
        stop_N = start_N + size_N
        right_N = tag_N == tags[0]
        for tag in tags[1:]:
            right_N |= tag_N == tag
        return right_N & ~goes_on_N & (stop_N <= end_N), start_N, stop_N, tag_N


def groups(block: Block, starts_N: NDArray[np.int64], lengths_N: NDArray[np.int64]) -> list[Group]:
    """The records of usual layouts among N messages that lie in a block, by layout."""
    end_N = starts_N + lengths_N
    usual_N, at_N, stop_N, _ = block.tagged(starts_N, (0x0A,), end_N)
    usual_N &= stop_N == end_N
    layout_N = np.zeros(len(starts_N), np.int64)
    names: dict[int, list[tuple[str, int, int]]] = {0: []}
    columns: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for step in range(MOST_FEATURES):
        rows = np.flatnonzero(usual_N & (at_N < end_N))
        if not len(rows):
            break
        fine_N, key_N, long_N, kind_N, from_N, next_N = _feature(block, at_N[rows], end_N[rows])
        usual_N[rows[~fine_N]] = False
        columns.append((np.zeros(len(starts_N), np.int64), np.zeros(len(starts_N), np.int64)))
        columns[-1][0][rows], columns[-1][1][rows], at_N[rows] = from_N, next_N - from_N, next_N
        left_N = fine_N
        for _ in range(KINDS):
            if not left_N.any():
                break
            like_N, name = _alike(block, key_N, long_N, kind_N, left_N)
            _branch(names, layout_N, rows[like_N], None if name is None else (name, int(kind_N[like_N][0]), step))
            left_N = left_N & ~like_N
        usual_N[rows[left_N]] = False
        usual_N &= layout_N >= 0
    usual_N &= at_N == end_N
    made = []
    for layout in np.unique(layout_N[usual_N]).tolist()[:MOST_LAYOUTS]:
        rows = np.flatnonzero(usual_N & (layout_N == layout))
        own = {name: Column(kind, columns[step][0][rows], columns[step][1][rows]) for name, kind, step in names[layout]}
        made.append(Group(rows, own))
    return made


def _feature(
    block: Block, at_N: NDArray[np.int64], end_N: NDArray[np.int64]
) -> tuple[
    NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]
]:
    """Of the entries at some places: whether they are usual, key's place and length, kind, value's place, their end.

    The value reaches to the end of its entry.
    """
    fine_N, key_N, next_N, _ = block.tagged(at_N, (0x0A,), end_N)
    ok_N, name_N, value_N, _ = block.tagged(key_N, (0x0A,), next_N)
    fine_N &= ok_N
    inner_N, tag_N = value_N, np.zeros(len(at_N), np.uint8)
    for tags in ((0x12,), (0x0A, 0x12, 0x1A), (0x0A,)):
        ok_N, inner_N, stop_N, found_N = block.tagged(inner_N, tags, next_N)
        fine_N &= ok_N & (stop_N == next_N)
        tag_N = found_N if len(tags) > 1 else tag_N
    long_N = value_N - name_N
    last_N = block.pieces(np.maximum(next_N - 1, 0), 1)[:, 0]
    fine_N &= (long_N <= KEY) & ((tag_N != INTEGERS << 3 | 2) | ((next_N - inner_N <= 10) & (last_N < 0x80)))
    return fine_N, name_N, long_N, tag_N.astype(np.int64) >> 3, inner_N, next_N


def _alike(
    block: Block,
    key_N: NDArray[np.int64],
    long_N: NDArray[np.int64],
    kind_N: NDArray[np.int64],
    left_N: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_], str | None]:
    """Those of the features left that have the name and kind of the first of them; None if the name is no UTF-8."""
    first = int(np.argmax(left_N))
    size = int(long_N[first])
    like_N = left_N & (long_N == size) & (kind_N == kind_N[first])
    raw = bytes(block.data[int(key_N[first]) : int(key_N[first]) + size])
    if size:
        like_N &= (block.pieces(key_N, size) == np.frombuffer(raw, np.uint8)).all(axis=1)
    try:
        return like_N, raw.decode()
    except UnicodeDecodeError:
        return like_N, None


def _branch(
    names: dict[int, list[tuple[str, int, int]]],
    layout_N: NDArray[np.int64],
    rows: NDArray[np.int64],
    added: tuple[str, int, int] | None,
) -> None:
    """Give `rows` the layouts that they have with one more feature, or -1 if they cannot have any."""
    for before in np.unique(layout_N[rows]).tolist():
        of = rows[layout_N[rows] == before]
        if added is None or len(names) > MOST_FEATURES * MOST_LAYOUTS:
            layout_N[of] = -1
            continue
        names[len(names)] = [*names[before], added]
        layout_N[of] = len(names) - 1


def texts(block: Block, column: Column) -> pa.Array:
    """The single values (N,) of a feature as text, as `tfrecord` writes them; null for what cannot be said as text."""
    sizes_N = np.where(column.sizes <= TEXT, column.sizes, 0)
    offsets_N = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes_N)])
    places_N = np.repeat(column.starts - offsets_N[:-1], sizes_N) + np.arange(int(offsets_N[-1]))
    signs = block.bytes[places_N]
    buffers = [None, pa.py_buffer(offsets_N), pa.py_buffer(signs)]
    raw = pa.Array.from_buffers(pa.large_binary(), len(sizes_N), buffers)
    if column.kind == BYTES and (not len(signs) or (int(signs.min()) >= 0x20 and int(signs.max()) < 0x7F)):
        made = raw.cast(pa.large_string())
    else:
        coded = raw.dictionary_encode()
        known = [said(column.kind, one) for one in coded.dictionary.to_pylist()]
        made = pa.array(known, pa.large_string()).take(coded.indices)
    return pc.if_else(as_arrow((column.sizes <= TEXT) & (column.sizes > 0)), made, pa.scalar(None, pa.large_string()))


def said(kind: int, data: bytes) -> str | None:
    """A feature's single value as text; bytes that are no text but as long as an integer are one, as TFace has them."""
    if kind == FLOATS:
        return label_of(struct.unpack("<f", data[:4])[0]) if len(data) // 4 == 1 else None
    if kind == INTEGERS:
        number = _single(data)
        return None if number is None else label_of(number)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "\0"
    if text.isprintable():
        return text
    return str(int.from_bytes(data, "little", signed=True)) if len(data) in (4, 8) else None


def _single(data: bytes) -> int | None:
    """The integer that packed bytes, of which the last ends one, hold if it is only one."""
    if not data or any(one < 0x80 for one in data[:-1]):
        return None
    value = sum((one & 0x7F) << 7 * at for at, one in enumerate(data)) & (2**64 - 1)
    return value - 2**64 if value >= 2**63 else value
