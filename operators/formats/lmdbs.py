"""LMDB databases: HSFace's layout (msgpack of image and label under each key), or keys with encoded images as values.

The file is read as it lies, by the layout of LMDB's data version 1 (`mdb.c`: meta pages, a B+ tree of branch and leaf
pages, overflow pages for long values), not through LMDB itself: that maps the file into memory and follows its page
numbers unchecked, so that a damaged file ends the process, and it cannot read object storage. An image is one range of
the file. Nothing is unpickled: values that are pickles are refused.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from io import BufferedIOBase
from itertools import chain
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators.errors import FormatError
from operators.formats.blocks import as_arrow, begin, numbers
from operators.formats.btree import MAGIC, Damaged, Tree, Value, open_tree
from operators.formats.listing import Bound, Listing
from operators.formats.lmdbscan import HEAD, TAIL, Found, scan
from operators.formats.members import located, located_near, stored
from operators.formats.naming import written
from operators.formats.rasters import SIGNATURES
from operators.formats.spans import Ranges, SpanReader, Spans
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

SHORT = 32
"""Bytes of a value that no image has: a count, or the label of another key."""
LOCKS = ("lock.mdb", "-lock")
NO_IMAGE = "values that are no images"
SIZES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
"""msgpack's byte strings, and text as old writers used it for bytes: type and how the length is stored."""
INTEGERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether a file called `data.mdb` or `*.lmdb`, or the only file, begins with LMDB's meta page."""
    return any(_is_database(source, file) for file in _candidates(source, files)[:8])


def _candidates(source: Source, files: "list[File]") -> "list[File]":
    some = [file for file in files if file.path.endswith((".mdb", ".lmdb")) or source.single is not None]
    return sorted((one for one in some if not one.path.endswith("lock.mdb")), key=lambda file: file.path)


def _is_database(source: Source, file: File) -> bool:
    try:
        with source.open(file.path) as stream:
            return stream.read(24)[16:20] == struct.pack("<I", MAGIC)
    except OSError:
        return False


def _unpacked(tree: Tree, value: Value) -> tuple[int, int, str | None] | None:
    """Where the image is in msgpack of (image, label) or (image, feature, label), its size, and the label.

    None if the value is no array; Damaged if it is one and not of these.
    """
    if value.head[:1] not in (b"\x92", b"\x93"):
        return None
    start, size = at, extent = _string(value.start + 1, value.head[1:])
    for _ in range(value.head[0] - 0x92):
        tree.file.seek(at + extent)
        at, extent = _string(at + extent, tree.file.read(5))
    tree.file.seek(at + extent)
    left = value.start + value.size - at - extent
    data = tree.file.read(max(0, min(left, 9)))
    code = INTEGERS.get(data[0]) if data else None
    if len(data) == 1 == left and (data[0] < 0x80 or data[0] >= 0xE0):
        return start, size, str(data[0] - 256 if data[0] >= 0xE0 else data[0])
    if code is None or left != len(data) or len(data) != 1 + struct.calcsize(code):
        raise Damaged("its value is no msgpack of an image and a number")
    return start, size, str(struct.unpack(code, data[1:])[0])


def _string(at: int, head: bytes) -> tuple[int, int]:
    """Where the bytes of a msgpack byte string at `at` begin, and their number; Damaged if it is none."""
    if head and 0xA0 <= head[0] < 0xC0:
        return at + 1, head[0] - 0xA0
    code = SIZES.get(head[0]) if head else None
    width = struct.calcsize(code) if code is not None else 0
    if code is None or len(head) < 1 + width:
        raise Damaged("its value is no msgpack of an image and a number")
    return at + 1 + width, int(struct.unpack_from(code, head, 1)[0])


def listing(source: Source, options: "SetConfig") -> Listing:
    """All images of all databases, named `<label>/<key>` where values hold labels, else by their keys.

    Raises
    ------
    FormatError
        If there is no database, its first pages are damaged, or its values are pickles or of no known kind.
    """
    files = list(source.files())
    chosen = _candidates(source, files)
    if not chosen:
        raise FormatError(f"{source.uri}: no LMDB database (`data.mdb`, `*.lmdb`) here. Correct the set's `uri`.")
    entries, unlisted, notes = Spans(source.uri, options), Counter[str](), list[str]()
    for file in chosen:
        prefix = file.path.removesuffix(".mdb").removesuffix(".lmdb").removesuffix("/data") + "/"
        if file.error is not None:
            entries.refuse([file.path], [file.error])
            continue
        try:
            with source.open(file.path) as stream:
                tree = open_tree(stream, f"{source.uri}: {file.path}")
                bound = Bound(source.uri, options.limits.max_records, len(entries), len(entries.faults))
                notes += _enter(entries, unlisted, tree, file.path, prefix if len(chosen) > 1 else "", bound)
        except OSError as error:
            raise FormatError(f"{source.uri}: {file.path} cannot be read ({error.strerror or error}).") from error
    entries.settle()
    if not len(entries) or (notes and len(entries.faults) == len(entries)):
        what = "; ".join(notes) or ", ".join(f"{count:,} x {kind}" for kind, count in unlisted.items())
        raise FormatError(f"{source.uri}: no image can be read from this database ({what}). Correct the set's `uri`.")
    others = {file.path for file in files} - {file.path for file in chosen}
    unlisted.update(PurePosixPath(path).suffix or "no extension" for path in others if not path.endswith(LOCKS))
    return Listing(entries=entries, unlisted=dict(sorted(unlisted.items())), notes=notes)


def _enter(entries: Spans, unlisted: Counter[str], tree: Tree, path: str, prefix: str, bound: Bound) -> Iterator[str]:
    """Make the entries of one file; what does not fit what it announces."""
    found = scan(tree, bound)
    usual_N = _usual(entries, found, path, prefix)
    for value in chain(found.others, _unusual(found, usual_N)):
        _one(entries, unlisted, tree, (path, prefix), value)
        faults = len(entries.faults) - bound.lost
        bound(len(entries) - bound.before - faults, faults, NO_IMAGE)
    damaged = sum(one.fault is not None and one.key.startswith(b"damaged-page-") for one in found.others)
    count = len(usual_N) + len(found.others) - damaged
    if count != tree.entries:
        yield f"{path} announces {tree.entries:,} keys, and {count:,} were found: it is damaged; get it again"


def _unusual(found: Found, usual_N: NDArray[np.bool_]) -> Iterator[Value]:
    """The values, one by one, that are not `usual_N`."""
    for at in np.flatnonzero(~usual_N).tolist():
        size = int(found.sizes[at])
        head = found.heads[at, : min(size, HEAD)].tobytes()
        yield Value(found.keys[at].as_py(), int(found.starts[at]), size, head)


def _usual(entries: Spans, found: Found, path: str, prefix: str) -> NDArray[np.bool_]:
    """Make the entries of encoded images and of msgpack of an image and a number; which (N,) values they are."""
    heads_N, kinds_N = found.heads[:, 0], found.heads[:, 1]
    plain_N = begin(found.heads, SIGNATURES)
    plain_N &= found.sizes >= max(map(len, SIGNATURES))
    begins_N, sizes_N, packed_N = found.starts.copy(), found.sizes.copy(), np.zeros(len(heads_N), np.bool_)
    for kind, code in SIZES.items():
        of_N = ~plain_N & (heads_N == 0x92) & (kinds_N == kind)
        width = np.dtype(code).itemsize
        begins_N[of_N] += 2 + width
        sizes_N[of_N] = numbers(found.heads[of_N], 2, code)
        packed_N |= of_N
    left_N = np.where(packed_N, found.starts + found.sizes - begins_N - sizes_N, 0)
    values_N = np.zeros(len(heads_N), np.int64)
    told_N = np.zeros(len(heads_N), np.bool_)
    last_N = found.tails[:, -1].astype(np.int64)
    small_N = (left_N == 1) & ((last_N < 0x80) | (last_N >= 0xE0))
    values_N[small_N] = (last_N - 256 * (last_N >= 0xE0))[small_N]
    told_N |= small_N
    for kind, code in INTEGERS.items():
        width = np.dtype(code).itemsize
        of_N = (left_N == 1 + width) & (found.tails[:, -1 - width] == kind)
        values_N[of_N] = numbers(found.tails[of_N], TAIL - width, code)
        told_N |= of_N & (values_N >= (0 if code[1].isupper() else -(2**63)))
    packed_N &= told_N
    if (own_N := pc.starts_with(found.keys, b"__").to_numpy(zero_copy_only=False)).any():
        packed_N &= ~(own_N & pc.ends_with(found.keys, b"__").to_numpy(zero_copy_only=False))
    usual_N: NDArray[np.bool_] = plain_N | packed_N
    begins_N, sizes_N = begins_N[usual_N], sizes_N[usual_N]
    codes, at_N = np.unique(values_N[usual_N], return_inverse=True)
    which = as_arrow(at_N.astype(np.int32), packed_N[usual_N])
    labels = pa.DictionaryArray.from_arrays(which, as_arrow(codes).cast(pa.large_string()))
    names = _names(found.keys if usual_N.all() else found.keys.filter(as_arrow(usual_N)))
    if packed_N.any():
        names = pc.coalesce(written(labels.dictionary_decode(), "/", names), names)
    ranges = Ranges(file=path, begins=begins_N, ends=begins_N + sizes_N, starts=begins_N, sizes=sizes_N)
    entries.add(ranges, written(prefix, names) if prefix else names, labels)
    return usual_N


def _names(keys: pa.Array) -> pa.Array:
    """Keys as text, or in hexadecimal digits if they are none."""
    signs = np.frombuffer(keys.buffers()[2] or b"", np.uint8)
    if not len(signs) or (int(signs.min()) >= 0x20 and int(signs.max()) < 0x7F):
        return keys.cast(pa.large_string())
    return pa.array([_name(key) for key in keys.to_pylist()], pa.large_string())


def _name(key: bytes) -> str:
    return key.decode() if _is_text(key) else "0x" + key.hex()


def _one(entries: Spans, unlisted: Counter[str], tree: Tree, path: tuple[str, str], value: Value) -> None:
    """Make the entry of a value that is looked at by itself, or count what it is; `path` are its file and a prefix."""
    if value.kind is not None:
        unlisted[value.kind] += 1
        return
    name, fault, place, label = _name(value.key), value.fault, (value.start, value.size), None
    if fault is None and not value.head.startswith(SIGNATURES):
        try:
            found = _unpacked(tree, value) if not _is_own(value.key) else None
        except Damaged as error:
            found, fault = None, str(error)
        if found is not None:
            *where, label = found
            place, name = (where[0], where[1]), f"{label}/{name}"
        elif fault is None and (_is_own(value.key) or value.size < SHORT):
            unlisted["index of the writer" if _is_own(value.key) else "value that is no image"] += 1
            return
        elif fault is None:
            fault = _unknown(path[0], value, first=not len(entries))
    if fault is not None:
        entries.refuse([path[1] + name], [fault])
        return
    start_1, size_1 = (np.array([one], np.int64) for one in place)
    ranges = Ranges(file=path[0], begins=start_1, ends=start_1 + size_1, starts=start_1, sizes=size_1)
    entries.add(ranges, pa.array([path[1] + name], pa.large_string()), pa.array([label], pa.large_string()))


def _is_own(key: bytes) -> bool:
    return key.startswith(b"__") and key.endswith(b"__")


def _is_text(key: bytes) -> bool:
    try:
        return key.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _is_pickle(value: Value) -> bool:
    return len(value.head) > 2 and value.head[0] == 0x80 and value.head[1] in (2, 3, 4, 5)


def _unknown(path: str, value: Value, first: bool) -> str:
    """Why a value is not read; FormatError if it is a pickle and the first of the set: all others will be."""
    if not _is_pickle(value):
        return "its value is neither an encoded image nor msgpack of an image and a number"
    if first:
        raise FormatError(
            f"{path}: its values are Python pickles, which can run any code and are not read. Write the images into "
            f"an LMDB as msgpack of (image, label), or into a folder, where you trust the file."
        )
    return "its value is a Python pickle, which can run any code and is not read"


class LmdbReader(SpanReader):
    """Opens images of LMDB databases by `[file, offset, size]`."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._near: tuple[str, str] | None = None

    def path(self, place: str) -> str:
        """The database file."""
        return located(place, 2)[0]

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """The image in the range `place`; OSError if the file ends before."""
        path, (start, size) = located(place, 2)
        return stored(self.held(path, version), start, size)

    def read(self, place: str, version: str | None, limit: int) -> bytes:
        """The image in the range `place`, at most `limit` + 1 bytes of it; OSError if the file ends before."""
        path, (start, size), self._near = located_near(place, 2, self._near)
        return self.ahead(self.held(path, version), start, min(size, limit + 1))
