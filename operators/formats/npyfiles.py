"""NumPy arrays of vectors: `.npy` and `.npz` (NEP 1), and the files beside them that say what each row is.

No pickles: arrays of objects are refused.
"""

import csv
import io
import json
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators.errors import FormatError
from operators.formats.columns import FILES, LABELS, VECTORS, Columns
from operators.formats.tabular import Group
from operators.formats.zipdir import ZipMember, directory, members
from operators.formats.zips import LOCAL
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

HEADER_BYTES = 2**16
COLUMN_BYTES = 2**28
"""Of an array or file of names, labels or attributes."""

MAX_WIDTH = 2**16
MEMBERS = 1000
STORED, DEFLATED = 0, 8
FAULTS = (OSError, ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError, OverflowError)
"""What damaged headers raise in NumPy, which reads them as Python literals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Array:
    """An array as its header describes it."""

    dtype: Any
    shape: tuple[int, ...]
    start: int
    """Where its values begin, from the beginning of its file or member."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return int(prod(self.shape) * self.dtype.itemsize)

    @property
    def is_vectors(self) -> bool:
        """Whether each row is a vector of floats."""
        return self.dtype.kind == "f" and len(self.shape) == 2 and 2 <= self.shape[1] <= MAX_WIDTH


def header(stream: BufferedIOBase) -> Array:
    """The header of an array; ValueError if it is none, or in Fortran's order, or of Python objects."""
    head = io.BytesIO(stream.read(HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(head)
    except (*FAULTS, tokenize.TokenError) as fault:
        raise ValueError("it has no header of an array") from fault
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which would have to be unpickled, and are not read")
    if fortran and len(shape) > 1 and min(shape) > 1:
        raise ValueError("its values lie column by column; save it anew with numpy.ascontiguousarray")
    if any(not isinstance(one, int) or one < 0 for one in shape):
        raise ValueError("it has no header of an array")
    return Array(dtype=dtype, shape=tuple(shape), start=head.tell())


def is_array(source: Source, file: File) -> bool:
    """Whether a `.npy` or `.npz` file holds vectors."""
    try:
        if file.path.endswith(".npz"):
            return any(array.is_vectors for _, _, _, array in _members(source, file))
        with source.open(file.path) as stream:
            return header(stream).is_vectors
    except FAULTS:
        return False


def vectors(
    source: Source, files: Sequence[File], file: File, options: "SetConfig"
) -> tuple[Columns, Group, Mapping[str, pa.Array]]:
    """The vectors of one file, with what is known of each.

    Raises
    ------
    FormatError
        If it is cut short, or what lies beside it is not as long.
    """
    where = f"{source.uri}: {file.path}"
    try:
        if file.error is not None:
            raise OSError(file.error)
        if file.path.endswith(".npz"):
            group, lists = _from_npz(source, file, options.column)
        else:
            with source.open(file.path) as stream:
                array = header(stream)
            if not array.is_vectors:
                raise ValueError(f"it is no table of floats: {array.dtype} of shape {array.shape}")
            if array.start + array.nbytes > file.size:
                raise ValueError("it is shorter than its header says: it is cut short; get it again")
            group, lists = _group(file, array, ("raw",), ()), dict(_sidecars(source, files, file))
    except FAULTS as fault:
        raise FormatError(f"{where} cannot be read as vectors ({fault}).") from fault
    for name, one in lists.items():
        if len(one) != group.rows:
            raise FormatError(f"{where} holds {group.rows:,} vectors, and {name!r} beside it has {len(one):,} values.")
    return described(list(lists), options, where), group, lists


def described(names: Sequence[str], options: "SetConfig", where: str) -> Columns:
    """What columns called `names` are for; FormatError if one that is wanted is not among them."""
    wanted = [*options.attributes]
    if options.identity.startswith("attribute:"):
        wanted.append(options.identity.removeprefix("attribute:"))
        if wanted[-1] not in names:
            raise FormatError(
                f"{where}: nothing beside it is called {wanted[-1]!r}; there is {', '.join(names) or '-'}."
            )
    label = next((name for known in LABELS for name in names if name.lower() in (known, known + "s")), None)
    files = [name for known in (*FILES, "filenames", "ids") for name in names if name.lower() in (known, known + "s")]
    attributes = dict.fromkeys(one for one in wanted if one in names)
    return Columns(content="", files=[one for one in files if one != label][:1], label=label, attributes=attributes)


def _group(file: File, array: Array, kind: tuple[object, ...], more: tuple[object, ...]) -> Group:
    place = (file.path, *kind, array.dtype.str, array.shape[1], *more, *([] if more else [array.start]))
    return Group(file=file.path, place=place, rows=array.shape[0], first=0, bytes=4 * array.shape[1])


def _members(source: Source, file: File) -> Iterator[tuple[str, ZipMember, int, Array]]:
    """Arrays of an `.npz` file: name, member, where its data begin, and its header."""
    with source.open(file.path) as stream:
        for count, member in enumerate(members(stream, directory(stream))):
            if count >= MEMBERS:
                raise ValueError(f"it has more than {MEMBERS:,} arrays")
            if not member.name.endswith(".npy") or member.method not in (STORED, DEFLATED):
                continue
            stream.seek(member.offset)
            local = LOCAL.unpack(stream.read(LOCAL.size).ljust(LOCAL.size, b"\0"))
            start = member.offset + LOCAL.size + local[9] + local[10]
            try:
                array = header(io.BytesIO(_content(stream, member, start, HEADER_BYTES)))
            except ValueError:
                continue
            yield member.name.removesuffix(".npy"), member, start, array


def _content(stream: BufferedIOBase, member: ZipMember, start: int, most: int) -> bytes:
    """The first bytes of a member, at most `most`; ValueError if it cannot be unpacked."""
    import zlib

    stream.seek(start)
    data = stream.read(min(member.packed, most + 1024))
    try:
        return data[:most] if member.method == STORED else zlib.decompressobj(-15).decompress(data, most)
    except zlib.error as fault:
        raise ValueError(f"{member.name} cannot be unpacked: {fault}") from fault


def _from_npz(source: Source, file: File, column: str | None) -> tuple[Group, dict[str, pa.Array]]:
    found = list(_members(source, file))
    tables = [one for one in found if one[3].is_vectors and column in (None, one[0])]
    tables.sort(key=lambda one: VECTORS.index(one[0].lower()) if one[0].lower() in VECTORS else len(VECTORS))
    if not tables:
        raise ValueError(f"no array of vectors in it; there are {', '.join(one[0] for one in found[:30]) or 'none'}")
    if len(tables) > 1 and tables[0][0].lower() not in VECTORS:
        raise ValueError(f"several arrays of vectors: {', '.join(one[0] for one in tables)}. Give the set's `column`")
    _, member, start, array = tables[0]
    if array.start + array.nbytes != member.size or member.size > 200 * max(member.packed, 1):
        raise ValueError("its array is not as long as its header says")
    if member.method == STORED:
        group = _group(file, Array(dtype=array.dtype, shape=array.shape, start=start + array.start), ("raw",), ())
    else:
        group = _group(file, array, ("deflated",), (array.start, start, member.packed))
    lists = {}
    with source.open(file.path) as stream:
        for name, one, at, other in found:
            if other.shape == array.shape[:1] and other.dtype.kind in "iuUSb" and one.size <= COLUMN_BYTES:
                data = _content(stream, one, at, one.size)
                lists[name] = _column(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False))
    return group, lists


def _column(values: NDArray[Any]) -> pa.Array:
    """An array of texts or whole numbers as a column."""
    if values.dtype.kind == "S":
        return pa.array([one.decode("utf-8", "backslashreplace") for one in values.tolist()], pa.string())
    if values.dtype.kind == "U" and values.size and values.view(f"{values.dtype.byteorder}u4").max() > sys.maxunicode:
        raise ValueError("a text in it is damaged")
    texts = [one.encode("utf-8", "backslashreplace").decode() for one in map(str, values.tolist())]
    return pa.array(texts, pa.string())


def _sidecars(source: Source, files: Sequence[File], file: File) -> Iterator[tuple[str, pa.Array]]:
    """What lies beside a `.npy` file: `NAME.txt/.csv/.tsv/.json`, `ids.txt`, `labels.npy` and the like."""
    folder, _, name = file.path.rpartition("/")
    stem = name.removesuffix(".npy")
    known = {*FILES, *LABELS, *(one + "s" for one in (*FILES, *LABELS))}
    for other in files:
        place, _, base = other.path.rpartition("/")
        own, _, ending = base.rpartition(".")
        word = own.removeprefix(stem).lstrip("_-.") if own.startswith(stem) else own
        if place != folder or other.path == file.path or other.size > COLUMN_BYTES or other.error is not None:
            continue
        if ending == "npy" and word in known:
            with source.open(other.path) as stream:
                yield word, _column(np.lib.format.read_array(stream, allow_pickle=False))
        elif ending in ("txt", "csv", "tsv", "json") and (own == stem or (word in known)):
            with source.open(other.path) as stream:
                yield from _listed(stream.read().decode("utf-8-sig", "backslashreplace"), ending, word or "id")


def _listed(text: str, ending: str, word: str) -> Iterator[tuple[str, pa.Array]]:
    """Columns of a text file: one name a line, a table with a head, or JSON lists."""
    if ending == "txt":
        yield word, pa.array([line.strip() for line in text.splitlines() if line.strip()], pa.string())
    elif ending == "json":
        said = json.loads(text)
        lists = said if isinstance(said, dict) else {word: said}
        for name, values in lists.items():
            if isinstance(values, list) and all(isinstance(one, str | int) for one in values):
                yield str(name), pa.array([str(one) for one in values], pa.string())
    else:
        rows = list(csv.reader(io.StringIO(text), delimiter="\t" if ending == "tsv" else ","))
        rows = [row for row in rows if row]
        if rows and any(name.strip().lower() in (*FILES, *LABELS) for name in rows[0]):
            for at, name in enumerate(rows[0]):
                yield name.strip(), pa.array([row[at] if at < len(row) else None for row in rows[1:]], pa.string())
        elif rows:
            yield word, pa.array([row[0] for row in rows], pa.string())
