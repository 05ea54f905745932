"""Opens one vector of a set of ready embeddings, wherever it lies."""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase, BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from operators.formats import jsonlines
from operators.formats.h5vectors import CHUNK_BYTES, unfiltered
from operators.formats.ipc import Batch, Spot, batch_of, begin, extent, message_at, spots, whole
from operators.formats.npyfiles import MAX_WIDTH
from operators.formats.parquet import FAULTS
from operators.formats.reading import Reader
from operators.formats.thrift import Damaged
from operators.sources import Source

PIECE = 2**20
ROWS = 256
"""Vectors of a Parquet file that are decoded at once."""

BUFFER_BYTES = 2**28
"""Of a compressed Arrow buffer, and of offsets."""

STALE = "the file is not as it was listed; run the audit again"


@dataclass(slots=True)
class _Stream:
    """A compressed array of an `.npz` file, unpacked up to some place."""

    key: tuple[Any, ...]
    decoder: Any
    taken: int
    """Packed bytes read."""
    at: int
    """Unpacked bytes before what comes next."""


@dataclass(slots=True)
class _Run:
    """A row group of which some rows are decoded."""

    key: tuple[Any, ...]
    batches: Iterator[Any]
    first: int
    rows: pa.Array


class VectorReader(Reader):
    """Opens vectors by `[file, kind, ..., row]`; holds one chunk, or some rows, in memory."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._stream: _Stream | None = None
        self._run: _Run | None = None
        self._chunk: tuple[tuple[Any, ...], bytes] | None = None
        self._arrow: dict[str, tuple[BufferedIOBase, list[Spot], int]] = {}
        self._batch: _Batch | None = None
        self._near: tuple[str, str, str, list[Any]] | None = None
        """What the place of the last record said up to its row: neighbours in the file differ in no more."""

    def path(self, place: str) -> str:
        """The file."""
        return self._parts(place)[0]

    def _parts(self, place: str) -> tuple[str, str, list[Any]]:
        before, _, row = place.rpartition(",")
        if self._near is not None and self._near[0] == before and row[:-1].isdecimal() and row[-1] == "]":
            return self._near[1], self._near[2], [*self._near[3], int(row[:-1])]
        path, kind, rest = _parts(place)
        if rest and type(rest[-1]) is int:
            self._near = before, path, kind, rest[:-1]
        return path, kind, rest

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """The vector as little-endian float32; OSError if it is not there or cannot be decoded."""
        return BytesIO(self._found(place, version))

    def read(self, place: str, version: str | None, limit: int) -> bytes:
        """The vector, at most `limit` + 1 bytes of it; OSError as `open` raises it."""
        return self._found(place, version)[: limit + 1]

    def _found(self, place: str, version: str | None) -> bytes:
        path, kind, rest = self._parts(place)
        kinds: dict[str, Callable[..., NDArray[Any]]] = {
            "raw": self._raw,
            "deflated": self._deflated,
            "chunk": self._of_chunk,
            "parquet": self._of_parquet,
            "arrow": self._of_arrow,
            "json": self._of_line,
        }
        if kind not in kinds:
            raise OSError(STALE)
        try:
            values = kinds[kind](path, self.held(path, version), *rest)
        except (TypeError, ValueError, OverflowError) as fault:
            raise OSError(STALE) from fault
        with np.errstate(over="ignore"):
            return values.astype("<f4").tobytes()

    def close(self) -> None:
        """Close all files."""
        self._stream, self._run, self._chunk, self._batch, self._arrow = None, None, None, None, {}
        super().close()

    def _of_line(self, path: str, file: BufferedIOBase, column: str, at: int, size: int) -> NDArray[Any]:
        return jsonlines.read(file, column, at, size)

    def _raw(self, path: str, file: BufferedIOBase, dtype: str, width: int, start: int, row: int) -> NDArray[Any]:
        size = _size(dtype, width)
        return _values(self.ahead(file, start + row * size, size), dtype, width)

    def _deflated(
        self, path: str, file: BufferedIOBase, dtype: str, width: int, head: int, start: int, packed: int, row: int
    ) -> NDArray[Any]:
        """A row of an array that must be unpacked from its beginning: rows in order are read in one pass."""
        key, size = (path, start), _size(dtype, width)
        wanted = head + row * size
        if self._stream is None or self._stream.key != key or self._stream.at > wanted:
            self._stream = _Stream(key, zlib.decompressobj(-15), 0, 0)
        stream = self._stream
        data = b""
        while stream.at < wanted + size:
            most = min(PIECE, wanted - stream.at) if stream.at < wanted else size - len(data)
            piece = self._piece(stream, file, start, packed, most)
            data += piece if stream.at >= wanted else b""
            stream.at += len(piece)
        return _values(data, dtype, width)

    def _piece(self, stream: _Stream, file: BufferedIOBase, start: int, packed: int, most: int) -> bytes:
        """At most `most` unpacked bytes, at least one."""
        while not stream.decoder.eof:
            given = stream.decoder.unconsumed_tail
            if not given:
                file.seek(start + stream.taken)
                given = file.read(min(PIECE, packed - stream.taken))
                stream.taken += len(given)
            try:
                made: bytes = stream.decoder.decompress(given, most)
            except zlib.error as fault:
                self._stream = None
                raise Damaged(f"cannot be unpacked: {fault}") from fault
            if made:
                return made
            if not given:
                break
        self._stream = None
        raise Damaged("the file ends inside this array: it is truncated")

    def _of_chunk(
        self, path: str, file: BufferedIOBase, dtype: str, width: int, start: int, packed: int, *more: int
    ) -> NDArray[Any]:
        """A row of a chunk of an HDF5 dataset; `more` are the chunk's rows, its filters, and the row."""
        tall, code, row = more
        key, size = (path, start), _size(dtype, width)
        if max(packed, tall * size) > CHUNK_BYTES:
            raise OSError(STALE)
        if self._chunk is None or self._chunk[0] != key:
            file.seek(start)
            self._chunk = key, unfiltered(file.read(packed), packed, tall * size, code, np.dtype(dtype).itemsize)
        return _values(self._chunk[1][row * size : (row + 1) * size], dtype, width)

    def _of_parquet(self, path: str, file: BufferedIOBase, leaf: int, group: int, row: int) -> NDArray[Any]:
        """A row of a column of lists; rows in order are decoded in one pass over the row group."""
        key = (path, leaf, group)
        try:
            if self._run is None or self._run.key != key or row < self._run.first:
                table = pq.ParquetFile(file, pre_buffer=False, arrow_extensions_enabled=False)
                top = table.schema.column(leaf).path.partition(".")[0]
                batches = table.iter_batches(ROWS, row_groups=[group], columns=[top], use_threads=False)
                self._run = _Run(key, iter(batches), 0, pa.array([], pa.list_(pa.float32())))
            run = self._run
            while row >= run.first + len(run.rows):
                batch = next(run.batches, None)
                if batch is None or not batch.num_columns:
                    raise OSError(STALE)
                run.first, run.rows = run.first + len(run.rows), batch.column(0)
            return _listed(run.rows[row - run.first])
        except FAULTS as fault:
            self._run = None
            raise OSError(f"its row group cannot be decoded ({str(fault).splitlines()[0]})") from fault

    def _of_arrow(self, path: str, file: BufferedIOBase, at: int, batch: int, row: int) -> NDArray[Any]:
        """A row of a column of lists, by the ranges of its buffers."""
        if self._batch is None or self._batch.key != (path, at, batch):
            self._batch = None
            self._batch = self._arrow_batch(path, file, at, batch)
        held = self._batch
        if row >= held.batch.rows or (held.there and not held.there[row // 8] >> row % 8 & 1):
            raise OSError("the row holds no vector")
        if held.offsets is None:
            start, stop = row * held.width, (row + 1) * held.width
        else:
            start, stop = (int(one) for one in held.offsets[row : row + 2])
        size = held.dtype.itemsize
        if not 0 <= start <= stop or stop - start > MAX_WIDTH or stop * size > held.extent[1]:
            raise OSError("the vector ends behind its buffer: the file is damaged; get it again")
        if held.content is not None:
            return np.frombuffer(held.content[start * size : stop * size], held.dtype)
        file.seek(held.extent[0] + start * size)
        return _values(file.read((stop - start) * size), held.dtype.str, stop - start)

    def _arrow_batch(self, path: str, file: BufferedIOBase, at: int, number: int) -> "_Batch":
        """What is kept of a batch."""
        if path not in self._arrow or self._arrow[path][0] is not file:
            schema, _, end = begin(file)
            self._arrow[path] = file, list(spots(schema).values()), end
        _, columns, end = self._arrow[path]
        message = message_at(file, number, end) if number < end else None
        if message is None or at >= len(columns):
            raise OSError(STALE)
        batch, spot = batch_of(message), columns[at]
        fixed = pa.types.is_fixed_size_list(spot.kind)
        values = spot.buffer + (2 if fixed else 3)  # of the list: its validity, and perhaps offsets; of the child: both
        content = None if batch.codec is None else whole(file, batch, values, BUFFER_BYTES)
        offsets = None
        if not fixed:
            wide = "<i8" if pa.types.is_large_list(spot.kind) else "<i4"
            offsets = np.frombuffer(whole(file, batch, spot.buffer + 1, BUFFER_BYTES), wide)
        return _Batch(
            key=(path, at, number),
            batch=batch,
            dtype=np.dtype(spot.kind.value_type.to_pandas_dtype()).newbyteorder("<"),
            width=spot.kind.list_size if fixed else 0,
            offsets=offsets,
            there=whole(file, batch, spot.buffer, BUFFER_BYTES),
            content=content,
            extent=extent(batch, values) if content is None else (0, len(content)),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """An Arrow record batch of which vectors are read."""

    key: tuple[Any, ...]
    batch: Batch
    dtype: Any
    width: int
    """Of a fixed-size list."""
    offsets: NDArray[Any] | None
    there: memoryview
    """One bit for each row; empty if all are there."""
    content: memoryview | None
    """All values, if they were compressed."""
    extent: tuple[int, int]
    """Where the values are, and their bytes."""


def _listed(scalar: Any) -> NDArray[Any]:
    """A list of a table as an array; nulls in it are not finite numbers, and are left to the caller as such."""
    if not scalar.is_valid:
        raise OSError("the row holds no vector")
    values: NDArray[Any] = scalar.values.to_numpy(zero_copy_only=False)
    return values


def _size(dtype: str, width: int) -> int:
    kind = np.dtype(dtype)
    if kind.kind != "f" or not 0 < width <= MAX_WIDTH:
        raise OSError(STALE)
    return kind.itemsize * width


def _values(data: bytes, dtype: str, width: int) -> NDArray[Any]:
    if len(data) != _size(dtype, width) and width:
        raise OSError("the file ends inside this vector: it is truncated")
    return np.frombuffer(data, dtype)


def _parts(place: str) -> tuple[str, str, list[Any]]:
    """File, kind and the rest of a place; OSError if it is none."""
    try:
        path, kind, *rest = json.loads(place)
    except (ValueError, TypeError) as fault:
        raise OSError("its place cannot be understood; scan the set again") from fault
    if not isinstance(path, str) or not isinstance(kind, str):
        raise OSError("its place cannot be understood; scan the set again")
    return path, kind, rest
