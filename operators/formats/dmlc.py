"""The records of a file in dmlc-core's RecordIO layout, with the image header that MXNet puts before each image.

A record (`recordio.h`) is the magic, a word of 3 bits flag and 29 bits length, the data, and zeros up to a multiple of
4. Data that hold the magic at such a multiple are cut there into parts (flags 1, 2, ..., 3), and the magic is left out.
The data of an image record begin with MXNet's `IRHeader`: flag (uint32), label (float32), id, id2 (uint64), and `flag`
labels (float32) if that is not 0.
"""

import io
import struct
from dataclasses import dataclass
from io import BufferedIOBase

import numpy as np
from numpy.typing import NDArray

from operators.formats.blocks import gather, taken
from operators.formats.reading import window

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
WORDS = struct.Struct("<II")
HEADER = struct.Struct("<IfQQ")
ONE = struct.Struct("<IIIfQQ")
"""What an image in one part begins with: both words and the header."""
HEAD = np.dtype([("magic", "<u4"), ("word", "<u4"), ("flag", "<u4"), ("label", "<f4"), ("ids", "V16"), ("more", "<f4")])
"""The same and the first of several labels."""
MAX_PARTS = 1024
"""An image holds the four bytes of the magic by chance; more parts than this are an attack on the reader's memory."""
MAX_LABELS = 4096
BLOCK = 2**20
FEW = 2**14
"""Bytes read at first where the lengths of records are not known."""


class Damaged(OSError):
    """What a record's place in the file holds is no record."""


@dataclass(slots=True)
class Record:
    """One image record: where its parts are, and its labels."""

    parts: list[tuple[int, int]]
    """Offset and length of the data of each part; between two the magic is left out."""
    size: int
    """Of the image: the data without the header and labels."""
    after: int
    """Where the next record begins."""
    labels: tuple[float, ...] = ()
    flag: int = 0


def record_at(file: BufferedIOBase, at: int, end: int) -> Record:
    """The image record that begins at byte `at` of a file of `end` bytes.

    Raises
    ------
    Damaged
        If there is none, or it goes on behind the end.
    """
    file.seek(at)
    begin = file.read(ONE.size)
    flag, length = _words(begin, at, end)
    parts, after = [(at + 8, length)], at + 8 + length + -length % 4
    if flag not in (0, 1):
        raise Damaged(f"a record begins at byte {at:,} with the flag {flag} of a continued part")
    while flag not in (0, 3):
        flag, length = words(file, after, end)
        if flag not in (2, 3) or len(parts) >= MAX_PARTS:
            raise Damaged(f"the parts of the record at byte {at:,} do not follow one another, or are too many")
        parts.append((after + 8, length))
        after += 8 + length + -length % 4
    size = sum(length for _, length in parts) + 4 * (len(parts) - 1)
    if len(parts) > 1:
        head: BufferedIOBase = io.BufferedReader(Parts(file, parts))
        start = head.read(HEADER.size)
    else:
        head, start = file, begin[8:]  # the file is where the labels begin
    if min(len(start), size) < HEADER.size:
        raise Damaged(f"the record at byte {at:,} is too short for an image record")
    flag, label, _, _ = HEADER.unpack(start)
    if flag == 0:
        return Record(parts, size - HEADER.size, after, (label,))
    if size < HEADER.size + 4 * flag or flag > MAX_LABELS:
        raise Damaged(f"the record at byte {at:,} claims {flag:,} labels in {size:,} bytes")
    packed = head.read(4 * flag)
    if len(packed) < 4 * flag:
        raise Damaged("the file ends inside this record: it is truncated")
    labels = struct.unpack(f"<{flag}f", packed)
    return Record(parts, size - HEADER.size - 4 * flag, after, labels, flag)


def image_in(data: bytes) -> bytes | None:
    """The image of a record of one part that `data` are from end to end; None if they are none."""
    if len(data) < ONE.size:
        return None
    magic, word, flag, *_ = ONE.unpack_from(data)
    if magic != MAGIC or word != len(data) - WORDS.size or flag > MAX_LABELS or len(data) < ONE.size + 4 * flag:
        return None
    return data[ONE.size + 4 * flag :]


def words(file: BufferedIOBase, at: int, end: int) -> tuple[int, int]:
    """Flag and length of the part that begins at byte `at`; Damaged if there is none."""
    file.seek(at)
    return _words(file.read(8), at, end)


def _words(data: bytes, at: int, end: int) -> tuple[int, int]:
    if len(data) < 8:
        raise Damaged("the file ends inside this record: it is truncated")
    magic, word = WORDS.unpack_from(data)
    if magic != MAGIC:
        raise Damaged(f"no record begins at byte {at:,}")
    flag, length = word >> 29, word & (2**29 - 1)
    if at + 8 + length > end:
        raise Damaged("the file ends inside this record: it is truncated")
    return flag, length


def followed(file: BufferedIOBase, at: int, end: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    """Where up to `most` records begin that follow one another from byte `at` on, and their heads (N of HEAD)."""
    starts: list[int] = []
    heads: list[bytes] = []
    base, block, size = at, b"", FEW
    while at + WORDS.size <= end and len(starts) < most:
        inside = at - base
        if inside + HEAD.itemsize > len(block):
            size = min(BLOCK, 4 * size) if inside < 4 * len(block) else FEW  # large records are not read whole
            base, block, inside = at, taken(file, at, size), 0
            if len(block) < WORDS.size:
                break
        magic, word = WORDS.unpack_from(block, inside)
        if magic != MAGIC or word >> 29:
            break
        starts.append(at)
        heads.append(block[inside : inside + HEAD.itemsize].ljust(HEAD.itemsize, b"\0"))
        at += WORDS.size + word + -word % 4
    return np.array(starts, np.int64), np.frombuffer(b"".join(heads), HEAD)


def heads_at(file: BufferedIOBase, starts_N: NDArray[np.int64]) -> NDArray[np.void]:
    """The heads (N of HEAD) of records that begin at `starts_N`; what the file does not hold is 0."""
    return gather(file, starts_N, HEAD.itemsize).view(HEAD)[:, 0]


def plain(starts_N: NDArray[np.int64], heads_N: NDArray[np.void], end: int) -> tuple[int, NDArray[np.int64]]:
    """How many of the first records are images in one part, each where the one before ends; lengths (N) of their data.

    The others are looked at by `record_at`.
    """
    words_N, flags_N = heads_N["word"].astype(np.int64), heads_N["flag"].astype(np.int64)
    fits_N = (heads_N["magic"] == MAGIC) & (words_N < 2**29) & (flags_N <= MAX_LABELS)
    fits_N &= (words_N >= HEADER.size + 4 * flags_N) & (starts_N + WORDS.size + words_N <= end)
    after_N = starts_N + WORDS.size + words_N + -words_N % 4
    chained_N = np.append(True, after_N[:-1] == starts_N[1:])
    stops = np.flatnonzero(~(fits_N & chained_N))
    return int(stops[0]) if len(stops) else len(starts_N), words_N


class Parts(io.RawIOBase):
    """The data of a record in several parts, with the magic put back between them."""

    def __init__(self, file: BufferedIOBase, parts: list[tuple[int, int]]) -> None:
        self._pieces = iter([piece for part in parts for piece in (part, None)][:-1])
        self._file = file
        self._rest: BufferedIOBase | io.BytesIO = io.BytesIO()

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Fill `buffer` from the current part; OSError if the file ends early."""
        while not (data := self._rest.read(len(buffer))):
            try:
                piece = next(self._pieces)
            except StopIteration:
                return 0
            self._rest = io.BytesIO(MAGIC_BYTES) if piece is None else window(self._file, *piece)
        buffer[: len(data)] = data
        return len(data)


def next_record(file: BufferedIOBase, at: int, end: int) -> int:
    """Where the next record may begin: the magic at a multiple of 4 that no continued part follows."""
    size = FEW // 16  # more as nothing is found: a file of nothing but damaged records must not be read again for each
    while at < end:
        file.seek(at)
        block = file.read(size + 8)
        place = block.find(MAGIC_BYTES)
        while 0 <= place <= min(size, len(block) - 8):
            if place % 4 == 0 and block[place + 7] >> 5 in (0, 1):
                return at + place
            place = block.find(MAGIC_BYTES, place + 1)
        at, size = at + size, min(BLOCK, 4 * size)
    return end
