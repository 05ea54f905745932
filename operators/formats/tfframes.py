"""TFRecord framing: where records are in a file, and whether their checksums fit.

A record is its length (uint64), the masked CRC-32C of those 8 bytes, the data, and the masked CRC-32C of the data
(TensorFlow's `record_writer.cc`); the mask turns a sum by 15 bits and adds a constant.
"""

import io
import struct
from collections.abc import Callable
from functools import cache
from io import BufferedIOBase

import numpy as np
from numpy.typing import NDArray

from operators.formats.blocks import pieces_of

MASK = 0xA282EAD8
FRAME, TAIL = struct.Struct("<QI"), struct.Struct("<I")


class Damaged(OSError):
    """What a record's place in the file holds is no record."""


def crc32c(data: bytes, before: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of `data`, going on from the sum `before`; FormatError if its library lacks."""
    return _extend()(before, data)


@cache
def _extend() -> Callable[[int, bytes], int]:
    from operators.errors import FormatError

    try:
        import google_crc32c
    except ImportError as error:
        raise FormatError(
            "Reading TFRecord files needs the package google-crc32c: pip install 'unveil[formats]'."
        ) from error
    found: Callable[[int, bytes], int] = google_crc32c.extend
    return found


def masked(crc: int) -> int:
    """A sum as TFRecord files store it."""
    return (((crc >> 15) | (crc << 17)) + MASK) & 0xFFFFFFFF


@cache
def _tables() -> NDArray[np.uint32]:
    """What a byte adds to a CRC-32C by how many bytes follow it (8, 256): "slicing-by-8" (Kounavis, Berry, 2005)."""
    table_8K = np.zeros((8, 256), np.uint32)
    one = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        one = np.where(one & 1, one >> 1 ^ np.uint32(0x82F63B78), one >> 1)
    table_8K[0] = one
    for after in range(1, 8):
        before = table_8K[after - 1]
        table_8K[after] = before >> 8 ^ table_8K[0][before & 0xFF]
    return table_8K


def heads_of(lengths_N: NDArray[np.int64]) -> NDArray[np.uint8]:
    """What records of these lengths begin with (N, 12): the length and its masked checksum."""
    bytes_N8 = lengths_N.astype("<u8").view(np.uint8).reshape(-1, 8)
    crc_N = np.zeros(len(lengths_N), np.uint32)
    for at in range(8):
        mixed_N = bytes_N8[:, at] ^ np.uint8(0xFF) if at < 4 else bytes_N8[:, at]
        crc_N ^= _tables()[7 - at][mixed_N]
    return np.concatenate([bytes_N8, masked_all(~crc_N).view(np.uint8).reshape(-1, 4)], axis=1)


def masked_all(crc_N: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Sums as TFRecord files store them."""
    return np.asarray((crc_N >> 15 | crc_N << 17) + np.uint32(MASK), "<u4")


def framed(block: memoryview, at: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Records whole in `block` from `at` on: their places (N,), lengths of their data (N,), and where the next begins.

    None is longer than `most`, and the checksums of their lengths fit.
    """
    starts: list[int] = []
    lengths: list[int] = []
    end, first = len(block), at
    while at + FRAME.size <= end:
        length = FRAME.unpack_from(block, at)[0]
        if length > most or at + FRAME.size + length + TAIL.size > end:
            break
        starts.append(at)
        lengths.append(length)
        at += FRAME.size + length + TAIL.size
    starts_N, lengths_N = np.array(starts, np.int64), np.array(lengths, np.int64)
    if starts:
        wrong = np.flatnonzero((pieces_of(block, starts_N, FRAME.size) != heads_of(lengths_N)).any(axis=1))
        if len(wrong):
            return starts_N[: wrong[0]], lengths_N[: wrong[0]], int(starts_N[wrong[0]])
    return starts_N, lengths_N, at if starts else first


def frame(file: BufferedIOBase, at: int, end: int) -> tuple[int, int]:
    """Where the data of the record at byte `at` begin, and their length.

    Raises
    ------
    Damaged
        If no record begins there or the file, of `end` bytes, ends inside it.
    """
    file.seek(at)
    return frame_of(file.read(FRAME.size), at, end)


def frame_of(head: bytes, at: int, end: int) -> tuple[int, int]:
    """As `frame`, where the record's first bytes are known to be `head`."""
    if len(head) < FRAME.size:
        raise Damaged("the file ends inside this record: it is truncated")
    length, check = FRAME.unpack(head)
    if masked(crc32c(head[:8])) != check:
        raise Damaged(f"no record begins at byte {at:,}: the checksum of its length does not fit")
    if at + FRAME.size + length + TAIL.size > end:
        raise Damaged("the file ends inside this record: it is truncated")
    return at + FRAME.size, length


def image_in(data: bytes, at: int, start: int, size: int) -> bytes | None:
    """Bytes `start` to `start + size` of a file whose record from `at` on `data` hold; None if they are not all of it.

    Raises
    ------
    Damaged
        If a checksum does not fit.
    """
    if len(data) < FRAME.size:
        return None
    length, check = FRAME.unpack_from(data)
    end = FRAME.size + length
    if masked(crc32c(data[:8])) != check:
        raise Damaged(f"no record begins at byte {at:,}: the checksum of its length does not fit")
    if len(data) < end + TAIL.size or not at + FRAME.size <= start <= start + size <= at + end:
        return None
    if masked(crc32c(data[FRAME.size : end])) != TAIL.unpack_from(data, end)[0]:
        raise Damaged("the record's checksum does not fit: the file is damaged; get it again")
    return data[start - at : start - at + size]


class Checked(io.RawIOBase):
    """Bytes `start` to `start + size` of a record's data; at the end it is told whether all data fit their checksum."""

    def __init__(self, file: BufferedIOBase, data: tuple[int, int], start: int, size: int) -> None:
        self._file, self._at, self._left = file, start, size
        self._end = data[0] + data[1]
        self._sum = self._add(0, data[0], start)

    def _add(self, before: int, start: int, end: int) -> int:
        """The checksum going on over the bytes from `start` to `end`."""
        self._file.seek(start)
        while start < end:
            block = self._file.read(min(end - start, 2**16))
            if not block:
                raise OSError("the file ends inside this record: it is truncated")
            before, start = crc32c(block, before), start + len(block)
        return before

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Fill `buffer` with the next bytes; OSError where the file ends early or a checksum does not fit."""
        self._file.seek(self._at)
        data = self._file.read(min(len(buffer), self._left))
        if not data and self._left:
            raise OSError("the file ends inside this record: it is truncated")
        buffer[: len(data)] = data
        self._at, self._left = self._at + len(data), self._left - len(data)
        self._sum = crc32c(data, self._sum)
        if not self._left and data:
            total = self._add(self._sum, self._at, self._end)
            self._file.seek(self._end)
            if self._file.read(TAIL.size) != TAIL.pack(masked(total)):
                raise OSError("the record's checksum does not fit: the file is damaged; get it again")
        return len(data)
