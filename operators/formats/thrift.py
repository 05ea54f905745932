"""Parquet's page headers and footer, in Thrift's compact protocol (thrift-compact-protocol.md of Apache Thrift).

The footer is read here and not through pyarrow, because pyarrow ends the process at some damaged ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import SEEK_END, BufferedIOBase
from typing import Any

HEAD_BYTES = 2**20
"""A page's header is not longer: it may hold the smallest and largest value of the page."""

MAX_DEPTH = 16
DATA, DICTIONARY, DATA_V2 = 0, 2, 3
"""Kinds of pages (parquet.thrift, PageType)."""


class Damaged(OSError):
    """A page is not what it should be."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a column chunk."""

    kind: int
    values: int
    encoding: int
    start: int
    """Where its data begin in the file."""
    packed: int
    """Bytes in the file."""
    size: int
    """Bytes without compression."""
    crc: int | None
    levels: tuple[int, int]
    """Of pages of version 2: bytes of repetition and definition levels, which lie uncompressed before the values."""
    compressed: bool


class _Short(Exception):
    """More of the header must be read."""


class _Compact:
    """Reads one structure."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        if self.at >= len(self.data):
            raise _Short
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            one = self.byte()
            value |= (one & 0x7F) << shift
            shift += 7
            if one < 0x80:
                return value
            if shift > 63:
                raise Damaged("a page's header is damaged; get the file again")

    def number(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def take(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self.data):
            raise _Short
        return self.data[self.at - count : self.at]

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Fields by their numbers."""
        fields: dict[int, Any] = {}
        last = 0
        while head := self.byte():
            last = last + (head >> 4) if head >> 4 else self.number()
            fields[last] = self.value(head & 15, depth, inside=False)
        return fields

    def value(self, kind: int, depth: int, inside: bool) -> Any:
        """One value; booleans of lists (`inside`) have a byte of their own."""
        if depth > MAX_DEPTH:
            raise Damaged("a page's header is nested too deeply; get the file again")
        if kind in (1, 2):
            return self.byte() == 1 if inside else kind == 1
        if kind in (3, 7):
            return self.take(1 if kind == 3 else 8)
        if kind in (4, 5, 6):
            return self.number()
        if kind == 8:
            return self.take(self.varint())
        if kind == 12:
            return self.struct(depth + 1)
        if kind in (9, 10):
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.varint()
            return [self.value(head & 15, depth + 1, inside=True) for _ in range(count)]
        raise Damaged("a page's header is damaged; get the file again")


def page_at(file: BufferedIOBase, at: int, end: int) -> Page:
    """The page whose header begins at `at`, in a column chunk that ends at `end`.

    Raises
    ------
    Damaged
        If there is none, or it does not fit into the chunk.
    """
    length = 256
    while True:
        file.seek(at)
        data = file.read(min(length, end - at))
        compact = _Compact(data)
        try:
            return _page(compact.struct(), at + compact.at, end)
        except _Short:
            if len(data) < length or length >= HEAD_BYTES:
                raise Damaged("the file ends inside a page's header, or it is damaged; get it again") from None
            length *= 16


def _page(fields: Mapping[int, Any], start: int, end: int) -> Page:
    kind, size, packed = (_whole(fields.get(number)) for number in (1, 2, 3))
    said = fields.get({DATA: 5, DICTIONARY: 7, DATA_V2: 8}.get(kind, -1))
    levels, encoding, compressed = (0, 0), 0, True
    if kind in (DATA, DICTIONARY, DATA_V2):
        if not isinstance(said, dict):
            raise Damaged("a page's header is damaged; get the file again")
        encoding = _whole(said.get(4 if kind == DATA_V2 else 2))
        if kind == DATA_V2:
            levels, compressed = (_whole(said.get(6)), _whole(said.get(5))), said.get(7, True) is True
    if packed > end - start or sum(levels) > min(size, packed):
        raise Damaged("a page is longer than its part of the file: it is damaged or cut short; get it again")
    values = _whole(said.get(1)) if isinstance(said, dict) else 0
    crc = fields.get(4) if isinstance(fields.get(4), int) else None
    return Page(kind, values, encoding, start, packed, size, crc, levels, compressed)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise Damaged("a page's header is damaged; get the file again")
    return value


CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4_HADOOP", "ZSTD", "LZ4_RAW")
ENCODINGS = {
    0: "PLAIN",
    2: "PLAIN_DICTIONARY",
    3: "RLE",
    4: "BIT_PACKED",
    5: "DELTA_BINARY_PACKED",
    6: "DELTA_LENGTH_BYTE_ARRAY",
    7: "DELTA_BYTE_ARRAY",
    8: "RLE_DICTIONARY",
    9: "BYTE_STREAM_SPLIT",
}
MAGIC = b"PAR1"
FOOTER_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class ColumnPart:
    """A column chunk by the footer."""

    codec: str
    encodings: frozenset[str]
    start: int
    packed: int
    size: int
    elsewhere: bool
    """Whether it lies in another file."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that lie together, and their columns."""

    rows: int
    columns: Sequence[ColumnPart]


def footer(file: BufferedIOBase) -> list[RowGroup]:
    """The row groups of a Parquet file; Damaged if its footer cannot be read."""
    end = file.seek(0, SEEK_END)
    file.seek(max(0, end - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or not 0 < length <= min(end - 8, FOOTER_BYTES):
        raise Damaged("its footer is missing: it is cut short, or no Parquet file")
    file.seek(end - 8 - length)
    try:
        fields = _Compact(file.read(length)).struct()
        groups = [_row_group(one) for one in fields.get(4, [])]
    except (_Short, AttributeError, TypeError) as fault:
        raise Damaged("its footer is damaged") from fault
    if sum(one.rows for one in groups) != fields.get(3):
        raise Damaged("its row groups have other numbers of rows than its footer says")
    return groups


def _row_group(fields: Mapping[int, Any]) -> RowGroup:
    rows = fields.get(3)
    if type(rows) is not int or not 0 <= rows < 2**40:
        raise Damaged("a row group has no possible number of rows")
    return RowGroup(rows, [_part(one) for one in fields.get(1, [])])


def _part(fields: Mapping[int, Any]) -> ColumnPart:
    said = fields.get(3, {})
    numbers = [said.get(at) for at in (4, 6, 7, 9)]
    before = said.get(11, 0)
    if any(type(one) is not int or not 0 <= one < 2**62 for one in (*numbers, before)):
        raise Damaged("a column has no possible place")
    codec, size, packed, start = numbers
    names = frozenset(ENCODINGS.get(one, str(one)) for one in said.get(2, []))
    return ColumnPart(
        codec=CODECS[codec] if codec < len(CODECS) else str(codec),
        encodings=names,
        start=before if 0 < before < start else start,
        packed=packed,
        size=size,
        elsewhere=1 in fields,
    )
