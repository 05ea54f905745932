"""Parquet's column chunks of byte strings, read page by page (parquet-format's README.md and Encodings.md).

pyarrow decodes a row group from its beginning and asks for whatever memory the file says. Here one page is in memory
at a time, no more than a bound, and any row is reached by the headers of the pages before it.
"""

import struct
import zlib
from dataclasses import dataclass, field
from io import BufferedIOBase

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators.formats.thrift import DATA, DATA_V2, DICTIONARY, ColumnPart, Damaged, Page, page_at

PAGE_BYTES = 2**29
"""Of one page without compression; a larger one is refused."""

MAX_RATIO = 200
"""Of a large page's size to its size in the file; images hardly compress."""

LARGE = 2**24
MAX_VALUES = 2**20
"""Of one page."""

PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8
CODECS = {
    "SNAPPY": "snappy",
    "GZIP": "gzip",
    "ZSTD": "zstd",
    "LZ4_RAW": "lz4_raw",
    "BROTLI": "brotli",
}
LENGTH = struct.Struct("<I")
Spans = list[tuple[int, int] | None]
"""Where each value begins, and its length; None for nulls."""


@dataclass(slots=True)
class Chunk:
    """One column chunk, as the file's footer describes it."""

    start: int
    end: int
    rows: int
    codec: str
    """`UNCOMPRESSED` or a key of `CODECS`."""
    defined: int
    """Definition level of a value that is there."""
    pages: list[tuple[int, Page]] = field(default_factory=list)
    """Data pages met so far, and the number of the first row of each."""
    dictionary: Page | None = None
    met: int = 0
    """Where the next page begins, from `start`."""
    counted: int = 0
    """Rows of the pages met so far."""


def chunk_of(part: ColumnPart, rows: int, defined: int) -> Chunk:
    """A column chunk by the footer."""
    return Chunk(part.start, part.start + part.packed, rows, part.codec, defined)


@dataclass(frozen=True, slots=True)
class Values:
    """The values of a page."""

    data: memoryview
    spans: Spans


def page_of(file: BufferedIOBase, chunk: Chunk, row: int) -> tuple[int, Page]:
    """The data page that holds `row`, and the number of its first row; Damaged if there is none."""
    while chunk.counted <= row:
        at = chunk.start + chunk.met
        if at >= chunk.end:
            raise Damaged("its part of the file has fewer rows than the footer says: it is damaged; get it again")
        page = page_at(file, at, chunk.end)
        chunk.met = page.start + page.packed - chunk.start
        if page.kind == DICTIONARY:
            chunk.dictionary = page
        elif page.kind in (DATA, DATA_V2):
            if page.values > chunk.rows - chunk.counted:
                raise Damaged("a page has more rows than the footer says: the file is damaged; get it again")
            chunk.pages.append((chunk.counted, page))
            chunk.counted += page.values
    low, high = 0, len(chunk.pages) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if chunk.pages[middle][0] <= row else (low, middle - 1)
    return chunk.pages[low]


def content(file: BufferedIOBase, page: Page, codec: str) -> memoryview:
    """A page without compression; Damaged if it is too large, or not as long as its header says."""
    too_much = page.size > max(LARGE, MAX_RATIO * page.packed)
    if max(page.size, page.packed) > PAGE_BYTES or too_much or page.values > MAX_VALUES:
        raise Damaged(
            f"lies in a page of {page.values:,} values that unpacks to {page.size:,} bytes from {page.packed:,}; the "
            f"limits are {MAX_VALUES:,}, {PAGE_BYTES:,} and {MAX_RATIO} times. Write the file anew with smaller pages"
        )
    file.seek(page.start)
    data = file.read(page.packed)
    if len(data) < page.packed:
        raise Damaged("the file ends inside a page: it is truncated; get it again")
    if page.crc is not None and zlib.crc32(data) != page.crc & 0xFFFFFFFF:
        raise Damaged("a page's checksum is wrong: the file is damaged; get it again")
    before = sum(page.levels)
    if codec == "UNCOMPRESSED" or not page.compressed:
        if page.size != page.packed:
            raise Damaged("a page is not as long as its header says: the file is damaged; get it again")
        return memoryview(data)
    values = unpacked(memoryview(data)[before:], CODECS[codec], page.size - before)
    return memoryview(data[:before] + bytes(values)) if before else values


def unpacked(data: memoryview, codec: str, size: int) -> memoryview:
    """`size` bytes from `data`; Damaged if there are more or fewer.

    Decompressors are given memory of that size, and what they do not fill would be whatever was there before, so that
    lengths are checked where they do not do it themselves.
    """
    try:
        if size == 0:
            return memoryview(b"")
        if codec == "gzip":
            engine = zlib.decompressobj(31)
            made = engine.decompress(data, size)
            if len(made) != size or engine.decompress(engine.unconsumed_tail, 1):
                raise Damaged("a page is not as long as its header says: the file is damaged; get it again")
            return memoryview(made)
        if codec == "snappy" and _snappy_size(data) != size:
            raise Damaged("a page is not as long as its header says: the file is damaged; get it again")
        engine = pa.Codec(codec)
        if codec in ("lz4_raw", "lz4", "brotli") and _fits(engine, data, size - 1):
            raise Damaged("a page is shorter than its header says: the file is damaged; get it again")
        return memoryview(engine.decompress(pa.py_buffer(data), size)).cast("B")
    except (pa.ArrowException, zlib.error, OSError, ValueError) as fault:
        if isinstance(fault, Damaged):
            raise
        raise Damaged("a page cannot be decompressed: the file is damaged; get it again") from fault


def _fits(engine: pa.Codec, data: memoryview, size: int) -> bool:
    try:
        engine.decompress(pa.py_buffer(data), size)
    except (pa.ArrowException, OSError):
        return False
    return True


def _snappy_size(data: memoryview) -> int:
    """The length that a Snappy block begins with (format_description.txt, 1)."""
    value = 0
    for at, one in enumerate(data[:5].tolist()):
        value |= (one & 0x7F) << 7 * at
        if one < 0x80:
            return value
    return -1


def dictionary(file: BufferedIOBase, chunk: Chunk) -> Values | None:
    """The values that a chunk's pages may refer to."""
    if chunk.dictionary is None:
        return None
    data = content(file, chunk.dictionary, chunk.codec)
    return Values(data, _plain(data, 0, chunk.dictionary.values))


def values(file: BufferedIOBase, page: Page, chunk: Chunk, known: Values | None) -> Values:
    """The values of one data page; Damaged if they cannot be decoded."""
    data = content(file, page, chunk.codec)
    at, levels = 0, page.levels[1]
    if page.kind == DATA_V2:
        at = page.levels[0]
    elif chunk.defined:
        if len(data) < 4:
            raise Damaged("a page is too short: the file is damaged; get it again")
        at, levels = 4, LENGTH.unpack_from(data)[0]
    there_N = np.ones(page.values, np.bool_)
    if chunk.defined:
        there_N = hybrid(data[at : at + levels], chunk.defined.bit_length(), page.values) == chunk.defined
        at += levels
    count = int(there_N.sum())
    if page.encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY):
        if known is None or at >= len(data) or data[at] > 31:
            raise Damaged("a page refers to a dictionary that is not there: the file is damaged; get it again")
        codes = hybrid(data[at + 1 :], data[at], count)
        if count and int(codes.max()) >= len(known.spans):
            raise Damaged("a page refers to a value that is not there: the file is damaged; get it again")
        data, found = known.data, [known.spans[code] for code in codes.tolist()]
    elif page.encoding == PLAIN:
        found = _plain(data, at, count)
    else:
        raise Damaged(f"its page has the encoding {page.encoding}, which is not read. Write the file anew with pyarrow")
    if count == page.values:
        return Values(data, found)
    left = iter(found)
    return Values(data, [next(left) if there else None for there in there_N.tolist()])


def _plain(data: memoryview, at: int, count: int) -> Spans:
    """Byte strings, each after its length of four bytes."""
    end = len(data)
    found: Spans = []
    for _ in range(count):
        if at + 4 > end:
            raise Damaged("a page has fewer values than its header says: the file is damaged; get it again")
        size = LENGTH.unpack_from(data, at)[0]
        found.append((at + 4, size))
        at += 4 + size
    if at > end:
        raise Damaged("a value is longer than its page: the file is damaged; get it again")
    return found


def hybrid(data: memoryview, width: int, count: int) -> NDArray[np.int64]:
    """`count` numbers of `width` bits in runs of one number and runs of packed ones; Damaged if there are fewer."""
    parts: list[NDArray[np.int64]] = []
    at, left, size = 0, count, (width + 7) // 8
    while left > 0:
        head = shift = 0
        while True:
            if at >= len(data) or shift > 35:
                raise Damaged("a page has fewer values than its header says: the file is damaged; get it again")
            head |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                break
        if head & 1:
            groups = min(head >> 1, (left + 7) // 8)
            run = _packed(data[at : at + groups * width], width, groups * 8)
            at += (head >> 1) * width
        else:
            value = int.from_bytes(data[at : at + size], "little")
            run = np.full(min(head >> 1, left), value, np.int64)
            at += size
        if not len(run):
            raise Damaged("a page has an empty run: the file is damaged; get it again")
        parts.append(run[:left])
        left -= len(parts[-1])
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _packed(data: memoryview, width: int, count: int) -> NDArray[np.int64]:
    """Up to `count` numbers of `width` bits each, the lowest first."""
    if width == 0:
        return np.zeros(count, np.int64)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    whole = bits[: len(bits) // width * width].reshape(-1, width).astype(np.int64)
    return np.asarray(whole @ (1 << np.arange(width, dtype=np.int64)), np.int64)
