"""TFRecord framing and `tf.train.Example` messages, read in place: no message is held in memory as a whole.

A record is its length (uint64), the masked CRC-32C of those 8 bytes, the data, and the masked CRC-32C of the data
(TensorFlow's `record_writer.cc`); the mask turns a sum by 15 bits and adds a constant. An Example (`example.proto`,
`feature.proto`) is a map of names to lists of bytes, of floats or of integers. The wire format is parsed here because
what matters is where in the file an image lies, which no protobuf library tells.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase

MASK = 0xA282EAD8
FRAME, TAIL = struct.Struct("<QI"), struct.Struct("<I")
MAX_FIELDS = 65536
"""Of one record, at all levels: a record of nothing but fields must not hold the reader up."""
MAX_VALUES = 64
"""Values of one list that are looked at; longer ones are vectors."""
BLOCK = 4096
BYTES, FLOATS, INTEGERS = 1, 2, 3


class Damaged(OSError):
    """What a record's place in the file holds is no record."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One named list of an Example."""

    kind: int
    spans: list[tuple[int, int]]
    """Byte offset and length of each value of a bytes list."""
    numbers: list[float | int]
    """The first `MAX_VALUES` values of the other kinds."""


def crc32c(data: bytes, before: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of `data`, going on from the sum `before`; FormatError if its library lacks."""
    from operators.errors import FormatError

    try:
        import google_crc32c
    except ImportError as error:
        raise FormatError(
            "Reading TFRecord files needs the package google-crc32c: pip install 'unveil[formats]'."
        ) from error
    return int(google_crc32c.extend(before, data))


def masked(crc: int) -> int:
    """A sum as TFRecord files store it."""
    return (((crc >> 15) | (crc << 17)) + MASK) & 0xFFFFFFFF


def frame(file: BufferedIOBase, at: int, end: int) -> tuple[int, int]:
    """Where the data of the record at byte `at` begin, and their length.

    Raises
    ------
    Damaged
        If no record begins there or the file, of `end` bytes, ends inside it.
    """
    file.seek(at)
    head = file.read(FRAME.size)
    if len(head) < FRAME.size:
        raise Damaged("the file ends inside this record: it is truncated")
    length, check = FRAME.unpack(head)
    if masked(crc32c(head[:8])) != check:
        raise Damaged(f"no record begins at byte {at:,}: the checksum of its length does not fit")
    if at + FRAME.size + length + TAIL.size > end:
        raise Damaged("the file ends inside this record: it is truncated")
    return at + FRAME.size, length


class Pieces:
    """Bytes of a file by their offset, a block at a time."""

    def __init__(self, file: BufferedIOBase) -> None:
        self._file, self._start, self._block = file, 0, b""
        self.left = MAX_FIELDS
        """Fields that may still be met."""

    def take(self, at: int, size: int) -> bytes:
        """`size` bytes from byte `at`, fewer at the file's end."""
        inside = at - self._start
        if inside < 0 or inside + size > len(self._block):
            self._file.seek(at)
            self._start, self._block, inside = at, self._file.read(max(size, BLOCK)), 0
        return self._block[inside : inside + size]

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """A variable-length integer and where it ends; Damaged if it does not end before `end`."""
        value = shift = 0
        for step, byte in enumerate(self.take(at, min(10, end - at)), 1):
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (2**64 - 1), at + step
            shift += 7
        raise Damaged("the record is no valid Example: a number does not end")

    def fields(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Number, wire type, offset and length of each field of a message; a number's own bytes are its field."""
        while at < end:
            self.left -= 1
            if self.left < 0:
                raise Damaged(f"the record has more than {MAX_FIELDS:,} fields")
            tag, at = self.varint(at, end)
            kind = tag & 7
            if kind == 2:
                size, at = self.varint(at, end)
            else:
                size = self.varint(at, end)[1] - at if kind == 0 else {1: 8, 5: 4}.get(kind, -1)
            if size < 0 or at + size > end:
                raise Damaged("the record is no valid Example: a field is longer than its message")
            yield tag >> 3, kind, at, size
            at += size


def features(pieces: Pieces, start: int, length: int) -> dict[str, Feature]:
    """The features of the Example in `length` bytes from `start`.

    Raises
    ------
    Damaged
        If these bytes are no Example.
    """
    found: dict[str, Feature] = {}
    pieces.left = MAX_FIELDS
    for number, kind, at, size in pieces.fields(start, start + length):
        if (number, kind) != (1, 2):
            continue
        for inner, wire, begin, extent in pieces.fields(at, at + size):
            if (inner, wire) == (1, 2):
                name, feature = _feature(pieces, begin, extent)
                found[name] = feature
    return found


def _feature(pieces: Pieces, start: int, length: int) -> tuple[str, Feature]:
    """One entry of the map: its key is field 1, the Feature with its one list field 2."""
    name, feature = "", Feature(0, [], [])
    for number, kind, at, size in pieces.fields(start, start + length):
        if (number, kind) == (1, 2):
            name = pieces.take(at, min(size, BLOCK)).decode("utf-8", "backslashreplace")
        elif (number, kind) == (2, 2):
            for inner, wire, begin, extent in pieces.fields(at, at + size):
                if wire == 2 and inner in (BYTES, FLOATS, INTEGERS):
                    feature = _values(pieces, inner, begin, extent)
    return name, feature


def _values(pieces: Pieces, which: int, start: int, length: int) -> Feature:
    """A list of any of the three kinds; numbers may be packed or not."""
    made = Feature(which, [], [])
    for number, kind, at, size in pieces.fields(start, start + length):
        if max(len(made.spans), len(made.numbers)) >= MAX_VALUES:
            break
        if number != 1:
            continue
        if which == BYTES and kind == 2:
            made.spans.append((at, size))
        elif which == FLOATS and kind in (2, 5):
            packed = pieces.take(at, min(size, 4 * MAX_VALUES) // 4 * 4)
            made.numbers.extend(struct.unpack(f"<{len(packed) // 4}f", packed[: len(packed) // 4 * 4]))
        elif which == INTEGERS and kind in (0, 2):
            made.numbers.extend(_integers(pieces, at, at + size))
    return made


def _integers(pieces: Pieces, at: int, end: int) -> Iterator[int]:
    for _ in range(MAX_VALUES):
        if at >= end:
            return
        value, at = pieces.varint(at, end)
        yield value - 2**64 if value >= 2**63 else value


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
