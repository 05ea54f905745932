"""Arrow IPC files and streams of encoded images, as `datasets` saves them: `data-00000-of-00001.arrow`.

Listing reads the buffers of names and labels, never those of the images; an image is one range of the file, or a
part of a compressed buffer (`ipc`).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase, BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators.errors import FormatError
from operators.formats import tablesets
from operators.formats.blocks import slices
from operators.formats.columns import Columns, holds_images
from operators.formats.ipc import GO_ON, MAGIC, Batch, Spot, batch_of, batches, begin, extent, message_at, spots, whole
from operators.formats.listing import Listing
from operators.formats.members import located, stored
from operators.formats.reading import Content
from operators.formats.tabular import Group, RowReader
from operators.formats.thrift import Damaged
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

ENDINGS = (".arrow", ".arrows", ".ipc", ".feather")
BESIDE_BYTES = 2**28
"""Of one buffer of names or labels, and of offsets that are kept."""

CONTENT_BYTES = 2**29
"""Of one compressed buffer of images."""

USUAL = 2**16
"""Rows of a batch whose offsets are kept as Python's integers."""

KEPT = 16
"""Batches whose offsets a reader keeps."""


def candidates(source: Source, files: Sequence[File]) -> list[File]:
    """Files called as Arrow files are, or the only one, by their paths."""
    return tablesets.candidates(source, files, ENDINGS)


def schema_of(source: Source, file: File) -> pa.Schema | None:
    """The columns of an Arrow file or stream, or None if it is none."""
    try:
        with source.open(file.path) as stream:
            if not stream.read(6).startswith((MAGIC, GO_ON)):
                return None
            return begin(stream)[0]
    except OSError:
        return None


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether an Arrow file has a column of images."""
    schemas = (schema_of(source, file) for file in candidates(source, files)[:4])
    return any(schema is not None and holds_images(schema) for schema in schemas)


def listing(source: Source, options: "SetConfig") -> Listing:
    """All rows of all Arrow files; FormatError as `tablesets.listing` raises it."""
    return tablesets.listing(source, options, "Arrow", ENDINGS, tables, ArrowReader(source))


def tables(
    source: Source, file: File, where: str, choose: Callable[[pa.Schema], Columns]
) -> Iterator[tuple[Columns, list[Group], dict[str, pa.Array]]]:
    """Record batches of a file, with the columns that stand beside the content.

    Raises
    ------
    FormatError
        If the file is damaged, or `choose` raises it.
    """
    try:
        if file.error is not None:
            raise OSError(file.error)
        with source.open(file.path) as stream:
            schema, start, end = begin(stream)
            columns, where_is = choose(schema), spots(schema)
            at = list(where_is).index(columns.content)
            first = 0
            for batch in batches(stream, start, end):
                if not 0 <= batch.rows <= batch.size + 1:
                    raise Damaged("a batch has no possible number of rows; get the file again")
                size = batch.size // max(1, batch.rows)
                group = Group(file=file.path, place=(file.path, at, batch.at), rows=batch.rows, first=first, bytes=size)
                beside = {name: column(stream, batch, where_is[name]) for name in columns.beside()}
                yield columns, [group], beside
                first += batch.rows
    except (OSError, pa.ArrowException) as fault:
        reason = str(fault).splitlines()[0] if str(fault) else "damaged"
        raise FormatError(f"{where}: cannot be read as Arrow ({reason}). Get it again, or move it away.") from fault


def column(file: BufferedIOBase, batch: Batch, spot: Spot) -> pa.Array:
    """A column of texts or numbers; ArrowInvalid or Damaged if its buffers do not fit."""
    kind = spot.kind
    if pa.types.is_dictionary(kind) or pa.types.is_null(kind):
        raise Damaged(f"a column of names or labels is a {kind}, which is not read; write it anew as plain text")
    long = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    parts = [whole(file, batch, spot.buffer + at, BESIDE_BYTES) for at in range(3 if long else 2)]
    length, nulls = batch.nodes[spot.node] if spot.node < len(batch.nodes) else (-1, 0)
    if length != batch.rows:
        raise Damaged("a column is not as long as its batch; get the file again")
    buffers = [pa.py_buffer(part) if at or (nulls and len(part)) else None for at, part in enumerate(parts)]
    plain = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(kind, kind)
    made = pa.Array.from_buffers(plain, length, buffers)
    made.validate(full=True)
    return made


class ArrowReader(RowReader):
    """Opens images by `[file, column, place of the batch, row]`."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._files: dict[str, tuple[BufferedIOBase, Sequence[Spot], int]] = {}
        self._batches: OrderedDict[tuple[str, int, int], _Held] = OrderedDict()
        self._near: tuple[str, str, BufferedIOBase, _Held] | None = None
        """What the place of the last record said up to its row: neighbours in the file differ in no more."""

    def path(self, place: str) -> str:
        """The Arrow file."""
        if self._near is not None and self._near[0] == place.rpartition(",")[0]:
            return self._near[1]
        return located(place, 3)[0]

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """The image of the row; OSError if its bytes are not there, or its batch is damaged."""
        file, content, start, size = self._found(place, version)
        return stored(file, start, size) if content is None else BytesIO(content[start : start + size])

    def read(self, place: str, version: str | None, limit: int) -> bytes:
        """The image of the row, at most `limit` + 1 bytes of it; OSError as `open` raises it."""
        file, content, start, size = self._found(place, version)
        size = min(size, limit + 1)
        return self.ahead(file, start, size) if content is None else bytes(content[start : start + size])

    def rows_of(
        self, group: Group, file: BufferedIOBase, start: int, stop: int, limit: int
    ) -> Iterator[Sequence[Content]]:
        """Rows `start` to `stop` of a batch if all of them are there; OSError if the next cannot be read."""
        held = self._batch(group.file, file, group.place[1], group.place[2])
        offsets_N = held.offsets(start, stop)
        if offsets_N is None or int((offsets_N[1:] - offsets_N[:-1]).max(initial=0)) > limit:
            return
        if held.batch.codec is not None:
            data, places = self._content(held, file, held.spot.buffer + 2), offsets_N.tolist()
            if places[-1] <= len(data):
                yield [data[at:end] for at, end in pairwise(places)]
        elif int(offsets_N[-1]) <= held.extent[1]:
            begins_N, ends_N = held.extent[0] + offsets_N[:-1], held.extent[0] + offsets_N[1:]
            for _, _, _, found, _ in slices(file, begins_N, ends_N, begins_N, ends_N):
                if not found:
                    return
                yield found

    def _found(self, place: str, version: str | None) -> tuple[BufferedIOBase, memoryview | None, int, int]:
        """The file, or what it unpacks to, that the image is in, the image's place there, and its size."""
        prefix, _, last = place.rpartition(",")
        if self._near is None or self._near[0] != prefix or self._near[2].closed or not last[:-1].isdecimal():
            path, (at, batch, _) = located(place, 3)
            file = self.held(path, version)
            self._near = prefix, path, file, self._batch(path, file, at, batch)
        _, _, file, held = self._near
        row = int(last[:-1])
        if row >= held.rows:
            raise OSError("the batch has fewer rows than when it was listed; run the audit again")
        span = held.span(file, row)
        if span is None:
            raise OSError("the row holds no bytes, at most the path of another file, and other files are not opened")
        start, size = span
        number = held.spot.buffer + 2
        if held.batch.codec is not None:
            data = self._content(held, file, number)
            if start + size > len(data):
                raise OSError("the image ends behind its buffer: the file is damaged; get it again")
            return file, data, start, size
        where, length = held.extent
        if start + size > length:
            raise OSError("the image ends behind its buffer: the file is damaged; get it again")
        return file, None, where + start, size

    def close(self) -> None:
        """Close all files."""
        self._files, self._near = {}, None
        self._batches.clear()
        super().close()

    def _content(self, held: "_Held", file: BufferedIOBase, number: int) -> memoryview:
        """The decompressed images of a batch; one batch's are kept."""
        if held.content is None:
            for other in self._batches.values():
                other.content = None
            held.content = whole(file, held.batch, number, CONTENT_BYTES)
        return held.content

    def _batch(self, path: str, file: BufferedIOBase, at: int, batch: int) -> "_Held":
        if path not in self._files or self._files[path][0] is not file:
            self._files = {name: one for name, one in self._files.items() if not one[0].closed}
            self._batches = OrderedDict((key, one) for key, one in self._batches.items() if key[0] != path)
            schema, _, end = begin(file)
            self._files[path] = file, list(spots(schema).values()), end
        _, columns, end = self._files[path]
        key = (path, at, batch)
        if key not in self._batches:
            message = message_at(file, batch, end) if batch < end else None
            spot = columns[at] if at < len(columns) else None
            binary = spot is not None and (pa.types.is_binary(spot.kind) or pa.types.is_large_binary(spot.kind))
            if message is None or spot is None or not binary:
                raise OSError("the file has other batches than when it was listed; run the audit again")
            self._batches[key] = _Held(file, batch_of(message), spot)
            while len(self._batches) > KEPT:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        return self._batches[key]


class _Held:
    """A batch whose offsets are in memory, if they are few enough."""

    def __init__(self, file: BufferedIOBase, batch: Batch, spot: Spot) -> None:
        self.batch, self.spot = batch, spot
        self.content: memoryview | None = None
        self.rows = batch.rows
        self.extent = extent(batch, spot.buffer + 2)
        self._type = np.dtype("<i8" if pa.types.is_large_binary(spot.kind) else "<i4")
        there = [self._bits(file, one) for one in (*spot.parents, spot.buffer)]
        self._there = [bits for bits in there if len(bits)]
        raw = whole(file, batch, spot.buffer + 1, BESIDE_BYTES)
        self._offsets = np.frombuffer(raw[: len(raw) // self._type.itemsize * self._type.itemsize], self._type)
        self._usual: list[int] = []
        """The offsets once more where all rows are there, none has an impossible length, and they are not many."""
        if not self._there and batch.rows < len(self._offsets) <= USUAL:
            some = self._offsets[: batch.rows + 1]
            self._usual = some.tolist() if some[0] >= 0 and bool((some[1:] >= some[:-1]).all()) else []

    def _bits(self, file: BufferedIOBase, number: int) -> memoryview:
        return whole(file, self.batch, number, BESIDE_BYTES)

    def offsets(self, start: int, stop: int) -> NDArray[np.int64] | None:
        """Where the images of rows `start` to `stop` begin, and the last ends; None unless all are there and sound."""
        some_N = self._offsets[start : stop + 1].astype(np.int64)
        if self._there or len(some_N) != stop - start + 1 or stop > self.rows:
            return None
        return some_N if some_N[0] >= 0 and bool((some_N[1:] >= some_N[:-1]).all()) else None

    def span(self, file: BufferedIOBase, row: int) -> tuple[int, int] | None:
        """Where the image is in its buffer; None if there is none; Damaged if that cannot be."""
        if self._usual:
            start = self._usual[row]
            return start, self._usual[row + 1] - start
        for bits in self._there:
            if row // 8 >= len(bits) or not bits[row // 8] >> row % 8 & 1:
                return None
        if row + 1 >= len(self._offsets):
            raise Damaged("a batch has fewer values than rows: the file is damaged; get it again")
        start, stop = self._offsets[row : row + 2].tolist()
        if not 0 <= start <= stop:
            raise Damaged("an image has no possible length: the file is damaged; get it again")
        return start, stop - start
