"""Parquet files of encoded images, as Hugging Face serves them: `data/train-00000-of-00004.parquet`.

Listing reads the columns of names and labels, never that of the images. An image is read by decoding the one page that
it lies in (`pages`). Where the bytes are null and only a path is given, the image is not in the set: other files are
never opened.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase, BytesIO
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from operators.errors import FormatError
from operators.formats import tablesets
from operators.formats.columns import Columns, holds_images
from operators.formats.listing import Listing
from operators.formats.members import located
from operators.formats.naming import TEXT_BYTES
from operators.formats.pages import CODECS, LARGE, MAX_RATIO, Chunk, Values, chunk_of, dictionary, page_of, values
from operators.formats.reading import Content
from operators.formats.tabular import Group, RowReader
from operators.formats.thrift import MAGIC, Page, RowGroup, footer, page_at
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

ENDINGS = (".parquet", ".pq", ".parq")
TOGETHER = 65_536
"""Rows whose names and labels are decoded at once."""

FAULTS = (OSError, pa.ArrowException, ValueError, KeyError, IndexError, MemoryError, OverflowError)
"""What pyarrow raises for files that are damaged."""

KNOWN = frozenset({"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"})
"""Encodings of images that `pages` decodes."""

CHUNKS = 256
"""Column chunks whose pages a reader remembers."""


def candidates(source: Source, files: Sequence[File]) -> list[File]:
    """Files called as Parquet files are, or the only one, by their paths."""
    return tablesets.candidates(source, files, ENDINGS)


def schema_of(source: Source, file: File) -> pa.Schema | None:
    """The columns of a Parquet file, or None if it is none."""
    try:
        with source.open(file.path) as stream:
            if stream.read(4) != MAGIC:
                return None
            with _opened(stream) as table:
                return table.schema_arrow if table.schema_arrow.names else None  # which may be no UTF-8
    except FAULTS:
        return None


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether a Parquet file has a column of images."""
    schemas = (schema_of(source, file) for file in candidates(source, files)[:4])
    return any(schema is not None and holds_images(schema) for schema in schemas)


def listing(source: Source, options: "SetConfig") -> Listing:
    """All rows of all Parquet files; FormatError as `tablesets.listing` raises it."""
    return tablesets.listing(source, options, "Parquet", ENDINGS, tables, ParquetReader(source))


def tables(
    source: Source,
    file: File,
    where: str,
    choose: Callable[[pa.Schema], Columns],
    known: frozenset[str] | None = KNOWN,
) -> Iterator[tuple[Columns, list[Group], dict[str, pa.Array]]]:
    """Row groups of a file, some at a time, with the columns that stand beside the content.

    Raises
    ------
    FormatError
        If the file is damaged, the content has another encoding than those `known`, or `choose` raises it.
    """
    try:
        if file.error is not None:
            raise OSError(file.error)
        with source.open(file.path) as stream, _opened(stream) as table:
            columns = choose(table.schema_arrow)
            leaves = [table.schema.column(at).path for at in range(len(table.schema))]
            texts = [name for name in columns.beside() if _is_text(table.schema_arrow, name)]
            beside = [leaves.index(name) for name in columns.beside()]
            at = next(n for n, leaf in enumerate(leaves) if (leaf + ".").startswith(columns.content + "."))
            parts = footer(stream)
            with _opened(stream, metadata=table.metadata, read_dictionary=texts) as read:
                for groups in _runs(parts, file, at):
                    some = [parts[one.place[2]] for one in groups]
                    for part in some:
                        _check(stream, part, beside, at, file, known)
                    yield columns, groups, _beside(stream, table, read, groups, some, columns)
    except FAULTS as fault:
        reason = str(fault).splitlines()[0] if str(fault) else "damaged"
        raise FormatError(f"{where}: cannot be read as Parquet ({reason}). Get it again, or move it away.") from fault


def _runs(parts: Sequence[RowGroup], file: File, leaf: int) -> Iterator[list[Group]]:
    """The row groups of a file, so many at a time that reading columns of them is worth the call."""
    groups: list[Group] = []
    first = waiting = 0
    for number, part in enumerate(parts):
        if leaf >= len(part.columns):
            raise OSError("a row group lacks columns: its footer is damaged")
        if part.rows > file.size:
            raise OSError(f"{part.rows:,} rows in a file of {file.size:,} bytes: its footer is damaged")
        place = (file.path, leaf, number)
        size = part.columns[leaf].size // max(1, part.rows)
        groups.append(Group(file=file.path, place=place, rows=part.rows, first=first, bytes=size))
        first += part.rows
        waiting += part.rows
        if waiting >= TOGETHER:
            yield groups
            groups, waiting = [], 0
    if groups:
        yield groups


def _check(
    stream: BufferedIOBase, part: RowGroup, beside: Sequence[int], leaf: int, file: File, known: frozenset[str] | None
) -> None:
    """OSError if a row group cannot be read, or a column beside the content asks for too much memory."""
    for at in (leaf, *beside):
        if at >= len(part.columns) or part.columns[at].elsewhere:
            raise OSError("its columns lie in other files, which are not opened")
        if part.columns[at].codec not in (*CODECS, "UNCOMPRESSED"):
            raise OSError(f"compressed by {part.columns[at].codec}; write it anew with Snappy or Zstandard")
    if known is not None and (strange := part.columns[leaf].encodings - known):
        raise OSError(f"the encoding {min(strange)} is not read; write it anew with pyarrow or datasets")
    for at in beside:
        chunk = chunk_of(part.columns[at], 0, 0)
        end = min(chunk.end, file.size)
        while chunk.start < end:
            page = page_at(stream, chunk.start, end)
            if page.size > max(LARGE, MAX_RATIO * page.packed) or page.size > LARGE * 4:
                raise OSError(f"a page of names or labels unpacks to {page.size:,} bytes from {page.packed:,}")
            chunk.start = page.start + page.packed


def _is_text(schema: pa.Schema, name: str) -> bool:
    at = schema.get_field_index(name)
    kind = schema.field(at).type if at >= 0 else pa.null()
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _beside(
    stream: BufferedIOBase, table: Any, read: Any, groups: Sequence[Group], parts: Sequence[RowGroup], columns: Columns
) -> dict[str, pa.Array]:
    """The columns beside the content, each in one piece."""
    numbers = [one.place[2] for one in groups]
    flat = [name for name in columns.beside() if name in table.schema_arrow.names]
    some = read.read_row_groups(numbers, flat, use_threads=False)
    found = {name: some.column(name).unify_dictionaries().combine_chunks() for name in flat}
    for name in columns.beside():
        if name not in found:  # inside a struct, where pyarrow would not keep equal texts once
            at = next(n for n in range(len(table.schema)) if table.schema.column(n).path == name)
            defined = table.schema.column(at).max_definition_level
            chunks = (chunk_of(one.columns[at], one.rows, defined) for one in parts)
            found[name] = pa.array([text for chunk in chunks for text in _texts(stream, chunk)], pa.large_binary())
    return found


def _texts(stream: BufferedIOBase, chunk: Chunk) -> Iterator[bytes | None]:
    """The values of a chunk of texts; None for those that are no name by their length."""
    row, known = 0, None
    while row < chunk.rows:
        first, page = page_of(stream, chunk, row)
        if first == 0:
            known = dictionary(stream, chunk)
        held = values(stream, page, chunk, known)
        data = held.data.tobytes()
        for span in held.spans:
            yield None if span is None or span[1] > TEXT_BYTES else data[span[0] : span[0] + span[1]]
        row = first + page.values


def _opened(stream: BufferedIOBase, **options: Any) -> Any:
    return pq.ParquetFile(stream, pre_buffer=False, arrow_extensions_enabled=False, **options)


class ParquetReader(RowReader):
    """Opens images by `[file, column, row group, row]`; holds one page in memory."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._tables: dict[str, tuple[BufferedIOBase, Sequence[RowGroup], Any]] = {}
        self._chunks: OrderedDict[tuple[str, int, int], Chunk] = OrderedDict()
        self._page: tuple[Page, Chunk, Values] | None = None
        self._first = 0
        """The number of the page's first row."""
        self._dictionary: tuple[Chunk, Values | None] | None = None
        self._near: tuple[str, str, BufferedIOBase, Chunk] | None = None
        """What the place of the last record said up to its row: neighbours in the file differ in no more."""

    def path(self, place: str) -> str:
        """The Parquet file."""
        if self._near is not None and self._near[0] == place.rpartition(",")[0]:
            return self._near[1]
        return located(place, 3)[0]

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """The image of the row; OSError if its bytes are not there, or its page cannot be decoded."""
        return BytesIO(self._found(place, version))

    def read(self, place: str, version: str | None, limit: int) -> bytes:
        """The image of the row, at most `limit` + 1 bytes of it; OSError as `open` raises it."""
        return bytes(self._found(place, version)[: limit + 1])

    def rows_of(
        self, group: Group, file: BufferedIOBase, start: int, stop: int, limit: int
    ) -> Iterator[Sequence[Content]]:
        """Rows `start` to `stop` of a row group, page by page, up to one without bytes; OSError as `open` raises it."""
        chunk = self._chunk(group.file, file, group.place[1], group.place[2])
        while start < min(stop, chunk.rows):
            first, page = page_of(file, chunk, start)
            held = self._values(file, page, chunk)
            self._first = first
            spans, data = held.spans[start - first : stop - first], held.data
            if not spans or None in spans:
                return
            yield [data[span[0] : span[0] + min(span[1], limit + 1)] for span in spans if span is not None]
            start += len(spans)

    def _found(self, place: str, version: str | None) -> memoryview:
        prefix, _, last = place.rpartition(",")
        if self._near is None or self._near[0] != prefix or self._near[2].closed or not last[:-1].isdecimal():
            path, (leaf, group, _) = located(place, 3)
            file = self.held(path, version)
            self._near = prefix, path, file, self._chunk(path, file, leaf, group)
        _, _, file, chunk = self._near
        row = int(last[:-1])
        if row >= chunk.rows:
            raise OSError("the file has fewer rows than when it was listed; run the audit again")
        if self._page is not None and self._page[1] is chunk and 0 <= row - self._first < len(self._page[2].spans):
            held = self._page[2]
        else:
            self._first, page = page_of(file, chunk, row)
            held = self._values(file, page, chunk)
        span = held.spans[row - self._first]
        if span is None:
            raise OSError("the row holds no bytes, at most the path of another file, and other files are not opened")
        return held.data[span[0] : span[0] + span[1]]

    def close(self) -> None:
        """Close all files."""
        self._tables, self._page, self._dictionary, self._near = {}, None, None, None
        self._chunks.clear()
        super().close()

    def _chunk(self, path: str, file: BufferedIOBase, leaf: int, group: int) -> Chunk:
        if path not in self._tables or self._tables[path][0] is not file:
            self._tables = {name: one for name, one in self._tables.items() if not one[0].closed}
            self._chunks = OrderedDict((key, one) for key, one in self._chunks.items() if key[0] != path)
            try:
                table = _opened(file)
                self._tables[path] = file, footer(file), table.schema
            except FAULTS as fault:
                raise OSError("the file cannot be read as Parquet any more; run the audit again") from fault
        key = (path, leaf, group)
        if key not in self._chunks:
            _, parts, schema = self._tables[path]
            if group >= len(parts) or leaf >= min(len(schema), len(parts[group].columns)):
                raise OSError("the file has other columns than when it was listed; run the audit again")
            kind = schema.column(leaf)
            if kind.physical_type != "BYTE_ARRAY" or kind.max_repetition_level:
                raise OSError("the file has other columns than when it was listed; run the audit again")
            part = parts[group]
            self._chunks[key] = chunk_of(part.columns[leaf], part.rows, kind.max_definition_level)
            while len(self._chunks) > CHUNKS:
                self._chunks.popitem(last=False)
        return self._chunks[key]

    def _values(self, file: BufferedIOBase, page: Page, chunk: Chunk) -> Values:
        if self._page is None or self._page[0] is not page:
            self._page = None
            if self._dictionary is None or self._dictionary[0] is not chunk:
                self._dictionary = None
                self._dictionary = chunk, dictionary(file, chunk)
            self._page = page, chunk, values(file, page, chunk, self._dictionary[1])
        return self._page[2]
