"""MXNet RecordIO as InsightFace (`train.rec`, `.idx`, `.lst`, `property`) and DCFace (`file.rec`, `list.txt`) ship it.

The file is read from its beginning to its end; an index only names records, and tells which are missing. In files of
InsightFace, record 0 holds no image but the numbers of the first identity record and of the one after the last; those,
at the end, hold the range of each identity's images.
"""

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from io import BufferedIOBase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators.errors import FormatError
from operators.formats.blocks import as_arrow, pieces_of
from operators.formats.dmlc import MAGIC, ONE, WORDS, Parts, image_in, record_at, words
from operators.formats.indexes import Names, Offsets, label_of, lines, names, offsets
from operators.formats.listing import Bound, Listing
from operators.formats.members import WHOLE, located, located_near
from operators.formats.naming import written
from operators.formats.reading import window
from operators.formats.recordscan import Found, scan
from operators.formats.spans import Check, Ranges, SpanReader, Spans
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether a file called `.rec`, or the only file, begins with a record."""
    some = [file for file in files if file.path.endswith(".rec") or source.single is not None]
    return any(_is_record(source, file) for file in some[:8])


def _is_record(source: Source, file: File) -> bool:
    try:
        with source.open(file.path) as stream:
            return words(stream, 0, file.size)[0] in (0, 1)
    except OSError:
        return False


def listing(source: Source, options: "SetConfig") -> Listing:
    """All image records of all `.rec` files; named by `list.txt` or the `.lst` file, else `<label>/<number>.jpg`.

    Raises
    ------
    FormatError
        If there is no record file, or an index or list that came with it is damaged.
    """
    files = {file.path: file for file in source.files()}
    chosen = [path for path in sorted(files) if path.endswith(".rec") or source.single is not None]
    if not chosen:
        raise FormatError(f"{source.uri}: no `.rec` file here. Correct the set's `uri`.")
    entries, used, ranges = Spans(source.uri, options), set(chosen), 0
    notes: list[str] = []
    for path in chosen:
        sides = {kind: _side(source, files, path, kind) for kind in (".idx", ".lst", "list.txt", "property")}
        used.update(one for one in sides.values() if one is not None)
        bound = Bound(source.uri, options.limits.max_records, len(entries), len(entries.faults))
        found = _found(source, files[path], sides, entries.wants, bound)
        ranges += found.ranges
        prefix = path.removesuffix(".rec") + "/" if len(chosen) > 1 else ""
        _enter(entries, found, path, prefix, _named(source, sides))
        notes += _doubts(source, path, found, sides["property"])
    unlisted = Counter(PurePosixPath(path).suffix or "no extension" for path in files.keys() - used)
    unlisted["header or identity record"] += ranges
    return Listing(entries=entries.settle(), unlisted=dict(sorted((+unlisted).items())), notes=notes)


def _side(source: Source, files: dict[str, File], path: str, kind: str) -> str | None:
    """The path of a side file of the record file `path`, if there is one."""
    folder, _, name = path.rpartition("/")
    wanted = name.removesuffix(".rec") + kind if kind.startswith(".") else kind
    wanted = f"{folder}/{wanted}" if folder else wanted
    if wanted in files:
        return wanted
    if source.single is not None:
        try:
            source.open(wanted).close()
        except OSError:
            return None
        return wanted
    return None


def _found(source: Source, file: File, sides: dict[str, str | None], several: bool, bound: Bound) -> Found:
    if file.error is not None:
        found = Found()
        found.faults.append((None, 0, file.error))
        return found
    index = offsets(source, sides[".idx"]) if sides[".idx"] is not None else Offsets()
    try:
        with source.open(file.path) as stream:
            return scan(stream, file.size, index, several, bound)
    except OSError as error:
        raise FormatError(f"{source.uri}: {file.path} cannot be read ({error.strerror or error}).") from error


def _named(source: Source, sides: dict[str, str | None]) -> Names:
    path = sides["list.txt"] or sides[".lst"]
    return names(source, path) if path is not None else Names()


def _enter(entries: Spans, found: Found, path: str, prefix: str, named: Names) -> None:
    numbers_N, starts_N, spans_N, sizes_N, images_N = found.joined()
    values, codes_N = np.unique(found.labels(), return_inverse=True)
    # DCFace writes the label 0 into every header and the identity into the path.
    constant = bool(named.paths) and len(values) <= 1
    people = pa.array([None if constant else label_of(one) for one in values.tolist()], pa.large_string())
    labels = pa.DictionaryArray.from_arrays(as_arrow(codes_N.astype(np.int32)), people)
    if named.labels:
        labels = pc.coalesce(_told(named.labels, numbers_N), labels.dictionary_decode())
    said = _text(numbers_N)
    if len(numbers_N) and numbers_N.min() < 0:
        said = pc.if_else(as_arrow(numbers_N < 0), written("at-", _text(starts_N)), said)
    texts = labels.dictionary_decode() if pa.types.is_dictionary(labels.type) else labels
    names = written(prefix, texts.fill_null("None"), "/", said, ".jpg")
    if named.paths:
        told = _told(named.paths, numbers_N)
        names = pc.coalesce(written(prefix, told) if prefix else told, names)
    more = enumerate(numbers_N.tolist()) if found.more else ()
    several = {row: {f"label_{at}": f"{one:g}" for at, one in enumerate(found.more[number])} for row, number in more}
    ranges = Ranges(file=path, begins=starts_N, ends=starts_N + spans_N, starts=images_N, sizes=sizes_N)
    entries.add(ranges, names, labels, several)
    refused = []
    for index, start, reason in found.faults:
        known = None if index is None else named.paths.get(index, f"{index}.jpg")
        remedy = "; get the file again" if "get the file" not in reason else ""
        refused.append((f"{prefix}{known or f'damaged-at-{start}'}", f"{reason}{remedy}"))
    entries.refuse([name for name, _ in refused], [reason for _, reason in refused])


def _told(texts: Mapping[int, str], numbers_N: NDArray[np.int64]) -> pa.Array:
    return pa.array([texts.get(number) or None for number in numbers_N.tolist()], pa.large_string())


def _text(numbers_N: NDArray[np.int64]) -> pa.Array:
    return as_arrow(numbers_N).cast(pa.large_string())


def _doubts(source: Source, path: str, found: Found, declared: str | None) -> Iterator[str]:
    """What does not fit what the file and its `property` say of themselves."""
    labels_N = found.labels()
    images = len(labels_N)
    if found.first_identity is not None and found.first_identity != images + 1:
        yield f"{path} announces {found.first_identity - 1:,} images in its header record and holds {images:,}"
    if declared is None:
        return
    first = next(lines(source, declared), "").split(",")[0]
    people = len(np.unique(labels_N))
    if first.isdecimal() and int(first[:18]) != people and images:
        yield f"{declared} announces {int(first[:18]):,} identities and {path} holds {people:,}"


class RecordReader(SpanReader):
    """Opens image records by `[file, offset, size of the first part with its two words]`."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._near: tuple[str, str] | None = None
        self._end: tuple[BufferedIOBase | None, int] = (None, 0)

    def path(self, place: str) -> str:
        """The record file."""
        return located(place, 2)[0]

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """The image of the record at `place`; OSError if there is none."""
        path, (at, _) = located(place, 2)
        file = self.held(path, version)
        if self._end[0] is not file:
            self._end = file, file.seek(0, io.SEEK_END)
        record = record_at(file, at, self._end[1])
        start, length = record.parts[0]
        if len(record.parts) == 1:
            return window(file, start + length - record.size, record.size)
        stream = io.BufferedReader(Parts(file, record.parts))
        stream.read(sum(length for _, length in record.parts) + 4 * (len(record.parts) - 1) - record.size)
        return stream

    def read(self, place: str, version: str | None, limit: int) -> bytes:
        """The image of the record at `place`, at most `limit` + 1 bytes of it; OSError if there is none."""
        path, (at, span), self._near = located_near(place, 2, self._near)
        if span <= min(WHOLE, limit):
            image = image_in(self.ahead(self.held(path, version), at, span))
            if image is not None:
                return image
        return super().read(place, version, limit)

    def check(self, ranges: Ranges, rows: slice) -> Check:
        """Records must begin with the magic, their length and their number of labels."""
        begins_N = ranges.begins[rows]
        lengths_N = ranges.ends[rows] - begins_N - WORDS.size
        labels_N = (ranges.starts[rows] - begins_N - ONE.size) // 4
        heads_N3 = np.stack([np.full_like(lengths_N, MAGIC), lengths_N, labels_N], axis=1).astype("<u4")

        def spoiled(block: memoryview, base: int, low: int, high: int) -> list[int]:
            found_N3 = pieces_of(block, begins_N[low:high] - base, 12).view("<u4")
            rows: list[int] = np.flatnonzero((found_N3 != heads_N3[low:high]).any(axis=1)).tolist()
            return rows

        return spoiled
