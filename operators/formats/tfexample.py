"""`tf.train.Example` messages, read in place: no message is held in memory as a whole.

An Example (`example.proto`,
`feature.proto`) is a map of names to lists of bytes, of floats or of integers. The wire format is parsed here because
what matters is where in the file an image lies, which no protobuf library tells.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase

from operators.formats.tfframes import Damaged

MAX_FIELDS = 65536
"""Of one record, at all levels: a record of nothing but fields must not hold the reader up."""
MAX_VALUES = 64
"""Values of one list that are looked at; longer ones are vectors."""
BLOCK = 4096
BYTES, FLOATS, INTEGERS = 1, 2, 3
HEAD = 256
"""Bytes in which the names and lengths of a usual feature lie."""
_INSIDE, _LISTS, _VALUE = b"\x12", b"\x0a\x12\x1a", b"\x0a"
"""Tags of a map's value, of the three kinds of lists, and of a value or of packed numbers."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One named list of an Example."""

    kind: int
    spans: list[tuple[int, int]]
    """Byte offset and length of each value of a bytes list."""
    numbers: list[float | int]
    """The first `MAX_VALUES` values of the other kinds."""


class Pieces:
    """Bytes of a file by their offset; the last two blocks are kept, as images lie between the numbers."""

    def __init__(self, file: BufferedIOBase) -> None:
        self._file, self._start, self._block = file, 0, b""
        self._other = 0, b""
        self.left = MAX_FIELDS
        """Fields that may still be met."""

    def take(self, at: int, size: int) -> bytes:
        """`size` bytes from byte `at`, fewer at the file's end."""
        inside = at - self._start
        if inside < 0 or inside + size > len(self._block):
            self._other, (self._start, self._block) = (self._start, self._block), self._other
            inside = at - self._start
        if inside < 0 or inside + size > len(self._block):
            self._file.seek(at)
            self._start, self._block, inside = at, self._file.read(max(size, BLOCK)), 0
        return self._block[inside : inside + size]

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """A variable-length integer and where it ends; Damaged if it does not end before `end`."""
        inside, block = at - self._start, self._block
        if 0 <= inside < len(block) - 1 and at < end - 1:
            low, high = block[inside], block[inside + 1]
            if low < 0x80:
                return low, at + 1
            if high < 0x80:
                return low & 0x7F | high << 7, at + 2
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
            inside, block = at - self._start, self._block
            if 0 <= inside < len(block) - 2 and at < end - 2 and block[inside] & 0x87 == 2 and block[inside + 2] < 0x80:
                tag, low = block[inside], block[inside + 1]  # nearly all: a byte of tag, one or two of length
                if low < 0x80:
                    size, at = low, at + 2
                else:
                    size, at = low & 0x7F | block[inside + 2] << 7, at + 3
                if at + size > end:
                    raise Damaged("the record is no valid Example: a field is longer than its message")
                yield tag >> 3, 2, at, size
                at += size
                continue
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
                name, feature = _usual(pieces, begin, extent) or _feature(pieces, begin, extent)
                found[name] = feature
    return found


def _usual(pieces: Pieces, start: int, length: int) -> tuple[str, Feature] | None:
    """What `_feature` finds in an entry as every library writes it, with one value; None for any other.

    Key and Feature, the Feature's list and the list's one field each fill what they are in.
    """
    head = pieces.take(start, min(length, HEAD))
    if len(head) < 2 or head[0] != 0x0A or head[1] > HEAD - 64:
        return None
    named = at = 2 + head[1]
    if named + 24 > len(head) and length > len(head):
        return None
    for tags in (_INSIDE, _LISTS, _VALUE):
        if at + 2 > len(head) or head[at] not in tags:
            return None
        tag = head[at]
        size, at = _varint(head, at + 1)
        if at + size != length:
            return None
        if tags is _LISTS:
            which = tag >> 3
    try:
        name = head[2:named].decode()
    except UnicodeDecodeError:
        return None
    if which == BYTES:
        return name, Feature(BYTES, [(start + at, size)], [])
    return (name, Feature(INTEGERS, [], [head[at]])) if which == INTEGERS and size == 1 and head[at] < 0x80 else None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer of at most four bytes and where it ends; 2^32, which fits nowhere, for longer ones."""
    value = shift = 0
    for one in data[at : at + 4]:
        value |= (one & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if one < 0x80:
            return value, at
    return 2**32, at


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
