"""Where the vectors lie in an HDF5 file: tables of floats, or a dataset for each record, as Idiap's generators write.

libhdf5 only tells where the values are, in a child process with limits, because damaged files can make it hang; the
vectors are then read from those places without it.
"""

import importlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from operators.errors import FormatError
from operators.formats.columns import FILES, LABELS, VECTORS
from operators.formats.h5groups import FAULTS, opened, plain, unsafe
from operators.sandbox import Fault, Sandbox
from operators.sources import File, Source

MAGIC = b"\x89HDF\r\n\x1a\n"
SECONDS = 1800.0
MEMORY_BYTES = 4 * 2**30
LOOK = 1000
MAX_DEPTH = 32
MAX_WIDTH = 2**16
COLUMN_BYTES = 2**28
CHUNK_BYTES = 2**28
DEFLATE, SHUFFLE, CHECKSUM = 1, 2, 3


@dataclass(slots=True)
class Vectors:
    """The vectors of one dataset."""

    name: str
    rows: int
    """0: the dataset is one vector."""
    width: int
    dtype: str
    blocks: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    """Rows, and place: an offset; or offset, size, and filters of a chunk."""
    beside: dict[str, list[str]] = field(default_factory=dict)
    fault: str | None = None


def is_hdf5(source: Source, file: File) -> bool:
    """Whether a file begins as HDF5 files do."""
    try:
        with source.open(file.path) as stream:
            return stream.read(8) == MAGIC
    except OSError:
        return False


def holds_vectors(source: Source, file: File) -> bool:
    """Whether an HDF5 file has vectors among its first objects; False if it is damaged."""
    answer = _asked((source, file.path, None, LOOK))
    return isinstance(answer, list) and bool(answer)


def vectors(source: Source, file: File, column: str | None, most: int) -> list[Vectors]:
    """All vectors of a file; FormatError if it is damaged, h5py is missing, or there is none."""
    answer = _asked((source, file.path, column, most))
    if isinstance(answer, FormatError):
        raise answer
    if isinstance(answer, Fault):
        raise FormatError(f"{source.uri}: {file.path} is damaged, and reading it {answer.reason}. Get it again.")
    if not answer:
        raise FormatError(
            f"{source.uri}: {file.path} has no dataset of floats with two dimensions, and no vectors of single "
            f"records. Name the dataset in the set's `column`."
        )
    found: list[Vectors] = answer
    return found


def _asked(task: tuple[Source, str, str | None, int]) -> Any:
    """The child's answer to one task, or the Fault that it died of."""
    with Sandbox(_serve, seconds=SECONDS, memory_bytes=MEMORY_BYTES) as child:
        return next(iter(list(child.map([task]))))


def _serve() -> Callable[[tuple[Source, str, str | None, int]], Any]:
    return _inside


def _inside(task: tuple[Source, str, str | None, int]) -> "list[Vectors] | FormatError":
    """The vectors of a file, by libhdf5 in this process; refusals are results."""
    source, path, column, most = task
    try:
        with source.open(path) as stream, opened(stream) as held:
            return list(_found(held, column, most))
    except FormatError as refusal:
        return refusal
    except FAULTS as fault:
        return FormatError(f"{source.uri}: {path} cannot be read as HDF5 ({plain(fault)}). Get it again.")


def _found(file: Any, column: str | None, most: int) -> Iterator[Vectors]:
    """Vectors of all groups, each dataset once."""
    h5py = importlib.import_module("h5py")
    todo, seen = [("", file, 0)], 0
    while todo and seen < most:
        path, group, depth = todo.pop()
        tables: dict[str, Any] = {}
        for name in group:
            seen += 1
            if seen > most or not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            one = group[name]
            if isinstance(one, h5py.Group) and depth < MAX_DEPTH:
                todo.append((f"{path}/{name}" if path else name, one, depth + 1))
            elif isinstance(one, h5py.Dataset):
                tables[name] = one
        yield from _of_group(path, tables, column)


def _of_group(path: str, tables: Mapping[str, Any], column: str | None) -> Iterator[Vectors]:
    whole = {name: one for name, one in tables.items() if _is_vectors(one) and column in (None, name, f"{path}/{name}")}
    chosen = sorted(whole, key=lambda name: VECTORS.index(name.lower()) if name.lower() in VECTORS else len(VECTORS))
    if len(chosen) > 1 and chosen[0].lower() in VECTORS:
        chosen = chosen[:1]
    for name in chosen:
        one = whole[name]
        rows = one.shape[0] if len(one.shape) == 2 and one.shape[0] != 1 else 0
        own = path if name.lower() in VECTORS and path and not rows else f"{path}/{name}" if path else name
        made = Vectors(own, rows, one.shape[-1], one.dtype.str, fault=unsafe(one))
        if made.fault is None:
            made.fault = _placed(one, made)
        if rows:
            made.beside = {key: texts for key, col in tables.items() if (texts := _texts(key, col, rows)) is not None}
        yield made


def _is_vectors(one: Any) -> bool:
    shape: tuple[int, ...] = one.shape or ()
    sizes = len(shape) in (1, 2) and 16 <= shape[-1] <= MAX_WIDTH and one.dtype.kind == "f" and shape[0] > 0
    return bool(sizes and one.dtype.itemsize in (2, 4, 8))


def _placed(one: Any, made: Vectors) -> str | None:
    """Note where the values lie; why they cannot be reached, or None."""
    if one.chunks is None:
        offset = one.id.get_offset()
        if offset is None:
            return "its values lie in the file's headers, or nowhere; write it anew as a contiguous dataset"
        made.blocks.append((max(made.rows, 1), (offset,)))
        return None
    plist = one.id.get_create_plist()
    filters = [plist.get_filter(at)[0] for at in range(plist.get_nfilters())]
    if not set(filters) <= {DEFLATE, SHUFFLE, CHECKSUM} or one.chunks[-1] != one.shape[-1]:
        return "its chunks are not whole rows, or are packed by another filter; repack it (h5repack -l CONTI -f NONE)"
    tall = one.chunks[0] if len(one.shape) == 2 else 1
    if tall * made.width * one.dtype.itemsize > CHUNK_BYTES:
        return "its chunks are too large; repack it (h5repack -l CONTI)"
    for at in range(0, one.shape[0] if len(one.shape) == 2 else 1, tall):
        info = one.id.get_chunk_info_by_coord((at, 0) if len(one.shape) == 2 else (0,))
        if info.byte_offset is None or info.filter_mask:
            return "some of its chunks were never written; write it anew"
        code = sum(1 << filter_id for filter_id in filters)
        made.blocks.append((min(tall, max(made.rows, 1) - at), (info.byte_offset, info.size, tall, code)))
    return None


def _texts(name: str, one: Any, rows: int) -> list[str] | None:
    """A column of names, labels or attributes beside a table of vectors, or None."""
    if one.shape != (rows,) or unsafe(one) is not None or one.nbytes > COLUMN_BYTES:
        return None
    h5py = importlib.import_module("h5py")
    if h5py.check_string_dtype(one.dtype) is not None:
        raw: Sequence[Any] = one[()].tolist()
        return [value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value) for value in raw]
    if one.dtype.kind in "iu" or name.lower() in (*FILES, *LABELS):
        return [str(value) for value in np.asarray(one[()]).tolist()]
    return None


def unfiltered(data: bytes, packed: int, size: int, code: int, itemsize: int) -> bytes:
    """The values of an HDF5 chunk; `code` has a bit for each filter that it went through. OSError if it is damaged."""
    if len(data) < packed:
        raise OSError("the file ends inside a chunk: it is truncated; get it again")
    if code >> CHECKSUM & 1:
        data = data[:-4]
    if code >> DEFLATE & 1:
        decoder = zlib.decompressobj()
        try:
            data = decoder.decompress(data, size)
        except zlib.error as fault:
            raise OSError(f"a chunk cannot be unpacked: {fault}; get the file again") from fault
    if len(data) != size:
        raise OSError("a chunk is not as long as it should be: the file is damaged; get it again")
    if code >> SHUFFLE & 1:
        data = np.frombuffer(data, np.uint8).reshape(itemsize, -1).T.tobytes()
    return data
