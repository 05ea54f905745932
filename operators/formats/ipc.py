"""Arrow's IPC messages as they lie in a file (Columnar.rst, "Serialization and Interprocess Communication").

pyarrow reads whole record batches, images included, and asks for whatever memory a compressed one says. Here the
message headers are read (FlatBuffers, every offset checked) and then only the buffers, or parts of them, that are
wanted. Files are not mapped into memory: one that shrinks meanwhile would end the process.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import SEEK_END, BufferedIOBase
from typing import Any

import pyarrow as pa

from operators.formats.pages import unpacked
from operators.formats.thrift import Damaged

MAGIC = b"ARROW1"
GO_ON = b"\xff\xff\xff\xff"
SCHEMA, BATCH = 1, 3
HEADER_BYTES = 2**24
"""Of one message's header."""

MAX_FIELDS = 10_000
MAX_RATIO = 200
"""Of a large compressed buffer's size to its size in the file."""

CODECS = ("lz4", "zstd")


class Flat:
    """A table of a FlatBuffers message (FlatBuffers' "Internals"): fields by number, every offset checked."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self._fields = at - self._get("<i", at)
        self._size = self._get("<H", self._fields)

    @classmethod
    def root(cls, data: bytes) -> "Flat":
        """The table that a message begins with."""
        return cls(data, _get(data, "<I", 0))

    def _get(self, code: str, at: int) -> int:
        return _get(self.data, code, at)

    def _where(self, field: int) -> int | None:
        slot = 4 + 2 * field
        offset = self._get("<H", self._fields + slot) if slot + 2 <= self._size else 0
        return self.at + offset if offset else None

    def number(self, field: int, code: str, default: int = 0) -> int:
        """A number, `default` where it is not written."""
        at = self._where(field)
        return default if at is None else self._get(code, at)

    def table(self, field: int) -> "Flat | None":
        """A table inside."""
        at = self._where(field)
        return None if at is None else Flat(self.data, at + self._get("<I", at))

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """A vector of structures of two 64-bit numbers."""
        at = self._where(field)
        if at is None:
            return []
        at += self._get("<I", at)
        count = self._get("<I", at)
        if count > MAX_FIELDS or at + 4 + 16 * count > len(self.data):
            raise Damaged("a message's header is damaged; get the file again")
        return list(struct.iter_unpack("<qq", self.data[at + 4 : at + 4 + 16 * count]))


def _get(data: bytes, code: str, at: int) -> int:
    if not 0 <= at <= len(data) - struct.calcsize(code):
        raise Damaged("a message's header is damaged; get the file again")
    return int(struct.unpack_from(code, data, at)[0])


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its kind, where its body is, and where the next begins."""

    at: int
    kind: int
    header: Flat | None
    raw: bytes
    body: int
    size: int

    @property
    def after(self) -> int:
        """Where the next message begins."""
        return self.body + self.size


def message_at(file: BufferedIOBase, at: int, end: int) -> Message | None:
    """The message at `at`; None at the end of the stream; Damaged if it does not fit into the file."""
    file.seek(at)
    head = file.read(8)
    if not head or head == GO_ON + bytes(4):
        return None
    length = int.from_bytes(head[4:], "little", signed=True)
    if head[:4] != GO_ON or len(head) < 8 or not 0 < length <= HEADER_BYTES:
        raise Damaged(f"no message begins at byte {at:,}: the file is damaged, or cut short; get it again")
    raw = file.read(length)
    if len(raw) < length:
        raise Damaged("it ends inside a message's header: it is cut short; get it again")
    root = Flat.root(raw)
    size = root.number(3, "<q")
    body = at + 8 + length
    if not 0 <= size <= end - body:
        raise Damaged(f"the message at byte {at:,} goes on behind the end of the file: it is cut short; get it again")
    return Message(at, root.number(1, "<B"), root.table(2), head + raw, body, size)


def begin(file: BufferedIOBase) -> tuple[pa.Schema, int, int]:
    """Schema of a file or stream, where its first message after that begins, and where its messages end at most.

    Raises
    ------
    Damaged
        If it is no Arrow file, or is cut short.
    """
    end = file.seek(0, SEEK_END)
    file.seek(0)
    start = 0
    if file.read(6) == MAGIC:
        file.seek(max(8, end - 10))
        tail = file.read(10)
        footer = int.from_bytes(tail[:4], "little", signed=True)
        if tail[4:] != MAGIC or not 0 < footer <= end - 18:
            raise Damaged("its end is missing: it is cut short; get it again")
        start, end = 8, end - 10 - footer
    message = message_at(file, start, end)
    if message is None or message.kind != SCHEMA or message.header is None:
        raise Damaged("it does not begin with a schema: it is no Arrow file, or damaged")
    if message.header.number(0, "<h"):
        raise Damaged("it was written by a big-endian machine; write it anew with pyarrow")
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(message.raw))
        spots(schema)  # its names may be no UTF-8
        return schema, message.after, end
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as fault:
        if isinstance(fault, Damaged):
            raise
        raise Damaged("its schema is damaged; get the file again") from fault


@dataclass(frozen=True, slots=True)
class Batch:
    """A record batch: where its buffers are."""

    at: int
    rows: int
    nodes: Sequence[tuple[int, int]]
    buffers: Sequence[tuple[int, int]]
    codec: str | None
    body: int
    size: int


def batches(file: BufferedIOBase, start: int, end: int) -> Iterator[Batch]:
    """All record batches from the first message on."""
    while start < end and (message := message_at(file, start, end)) is not None:
        if message.kind == BATCH:
            yield batch_of(message)
        start = message.after


def batch_of(message: Message) -> Batch:
    """The record batch that a message holds; Damaged if it holds none."""
    header = message.header
    if message.kind != BATCH or header is None:
        raise Damaged("no record batch is where one was listed; run the audit again")
    packing = header.table(3)
    codec = None
    if packing is not None:
        kind = packing.number(0, "<b")
        if kind not in (0, 1):
            raise Damaged("it is compressed in an unknown way; write it anew with pyarrow")
        codec = CODECS[kind]
    rows, nodes, buffers = header.number(0, "<q"), header.pairs(1), header.pairs(2)
    return Batch(message.at, rows, nodes, buffers, codec, message.body, message.size)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a column's parts come in a batch."""

    kind: pa.DataType
    node: int
    buffer: int
    parents: tuple[int, ...]
    """Validity buffers of the structures that it lies in."""


def spots(schema: pa.Schema) -> Mapping[str, Spot]:
    """All columns, and those inside structures, by their dotted paths; Damaged if there is one of an unknown kind."""
    found: dict[str, Spot] = {}
    node = buffer = 0
    for one in schema:
        node, buffer = _place(found, one.name, one.type, node, buffer, ())
    return found


def _place(
    found: dict[str, Spot], name: str, kind: pa.DataType, node: int, buffer: int, parents: tuple[int, ...]
) -> tuple[int, int]:
    """Note a column and those inside; the numbers of the node and buffer that come after."""
    kind = getattr(kind, "storage_type", kind)
    found.setdefault(name, Spot(kind, node, buffer, parents))
    types = pa.types
    if types.is_dictionary(kind):
        return node + 1, buffer + 2
    if types.is_nested(kind):
        listed = types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind)
        if not (listed or types.is_struct(kind) or types.is_fixed_size_list(kind)):
            raise Damaged(f"its column {name!r} is a {kind}, which is not read; write the file anew without it")
        inside = (*parents, buffer) if types.is_struct(kind) else parents
        after = node + 1, buffer + (2 if listed else 1)
        for at in range(kind.num_fields):
            inner: Any = kind.field(at)
            after = _place(found, f"{name}.{inner.name}", inner.type, *after, inside)
        return after
    if kind in (pa.string_view(), pa.binary_view()):
        raise Damaged(f"its column {name!r} is a {kind}, which is not read; write the file anew without views")
    if types.is_null(kind):
        return node + 1, buffer
    long = types.is_binary(kind) or types.is_string(kind) or types.is_large_binary(kind) or types.is_large_string(kind)
    return node + 1, buffer + (3 if long else 2)


def extent(batch: Batch, number: int) -> tuple[int, int]:
    """Where a buffer is in the file; Damaged if it is not inside its message."""
    offset, size = batch.buffers[number] if number < len(batch.buffers) else (-1, 0)
    if offset < 0 or size < 0 or offset + size > batch.size:
        raise Damaged("a buffer is not inside its message: the file is damaged; get it again")
    return batch.body + offset, size


def whole(file: BufferedIOBase, batch: Batch, number: int, limit: int) -> memoryview:
    """A buffer without compression; Damaged if it is longer than `limit` or cannot be decompressed."""
    start, size = extent(batch, number)
    file.seek(start)
    if batch.codec is None or size == 0:
        if size > limit:
            raise Damaged(f"a buffer of {size:,} bytes; the limit is {limit:,}. Write the file anew in smaller batches")
        data = memoryview(file.read(size))
        length = -1
    else:
        length = int.from_bytes(file.read(8), "little", signed=True)
        if size < 8 or length < -1:
            raise Damaged("a compressed buffer is damaged; get the file again")
        if max(length, size) > limit or length > max(2**24, MAX_RATIO * size):
            raise Damaged(
                f"a buffer that unpacks to {length:,} bytes from {size:,}; the limits are {limit:,} and {MAX_RATIO} "
                f"times. Write the file anew in smaller batches"
            )
        data, size = memoryview(file.read(size - 8)), size - 8
    if len(data) < size:
        raise Damaged("the file ends inside a buffer: it is cut short; get it again")
    return data if length < 0 else unpacked(data, str(batch.codec), length)
