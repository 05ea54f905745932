"""MXNet RecordIO as InsightFace (`train.rec`, `.idx`, `.lst`, `property`) and DCFace (`file.rec`, `list.txt`) ship it.

The file is read from its beginning to its end; an index only names records, and tells which are missing. In files of
InsightFace, record 0 holds no image but the numbers of the first identity record and of the one after the last; those,
at the end, hold the range of each identity's images.
"""

import io
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from operators.errors import FormatError
from operators.formats.dmlc import ONE, WORDS, Damaged, Parts, Record, image_in, next_record, plain_at, record_at, words
from operators.formats.indexes import Entries, Names, Offsets, label_of, lines, names, offsets
from operators.formats.listing import Listing
from operators.formats.members import WHOLE, located, located_near
from operators.formats.reading import Reader, window
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


@dataclass(slots=True)
class _Found:
    """What one `.rec` file holds, kept small: a release has millions of records."""

    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    starts: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    spans: "array[int]" = field(default_factory=lambda: array("q"))
    """Bytes of each record from its beginning; of several parts, of the first."""
    labels: "array[float]" = field(default_factory=lambda: array("d"))
    more: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """All labels of records that have several, by their number, where attributes are asked for."""
    faults: list[tuple[int | None, int, str]] = field(default_factory=list)
    """Number, offset and reason of what cannot be read."""
    ranges: int = 0
    """Records without an image: InsightFace's header and identities."""
    first_identity: int | None = None
    """The number of the first identity record, by the header record."""


def _scan(file: BufferedIOBase, end: int, index: Offsets, several: bool) -> _Found:
    """All records from the beginning of a file to its end; what is damaged is stepped over to the next record."""
    found, at, known, count = _Found(), 0, 0, 0
    unmet: list[int] = []
    while at < end:
        while known < len(index.starts) and index.starts[known] < at:
            unmet.append(known)
            known += 1
        here = known < len(index.starts) and index.starts[known] == at
        number = index.indices[known] if here else (count if not index.starts else None)
        known, count = known + here, count + 1
        if not several and (one := plain_at(file, at, end)) is not None:
            found.numbers.append(-1 - count if number is None else number)
            found.starts.append(at)
            found.sizes.append(one[0] - ONE.size)
            found.spans.append(one[0])
            found.labels.append(one[1])
            at += one[0] + -one[0] % 4
            continue
        try:
            record = record_at(file, at, end)
        except Damaged as fault:
            found.faults.append((number, at, str(fault)))
            at = next_record(file, at + 4, end)
            continue
        _keep(found, at, -1 - count if number is None else number, record, several)
        at = record.after
    for one in (*unmet, *range(known, len(index.starts))):
        number = index.indices[one]
        if found.first_identity is None or number < found.first_identity:
            where = index.starts[one]
            found.faults.append((number, where, f"the index names this record at byte {where:,}, where none begins"))
    return found


def _keep(found: _Found, at: int, number: int, record: Record, several: bool) -> None:
    if record.size == 0 and record.flag >= 2:
        found.ranges += 1
        if at == 0 and record.labels[0] < 2**24:  # beyond, a float32 cannot hold every number
            found.first_identity = int(record.labels[0]) if record.labels[0] > 0 else None
        return
    found.numbers.append(number)
    found.starts.append(at)
    found.sizes.append(record.size)
    found.spans.append(WORDS.size + record.parts[0][1])
    found.labels.append(record.labels[0])
    if several:
        found.more[number] = record.labels


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
    entries, used, ranges = Entries(options), set(chosen), 0
    notes: list[str] = []
    for path in chosen:
        sides = {kind: _side(source, files, path, kind) for kind in (".idx", ".lst", "list.txt", "property")}
        used.update(one for one in sides.values() if one is not None)
        found = _found(source, files[path], sides, entries.wants)
        ranges += found.ranges
        prefix = path.removesuffix(".rec") + "/" if len(chosen) > 1 else ""
        _enter(entries, found, path, prefix, _named(source, sides))
        notes += _doubts(source, path, found, sides["property"])
    unlisted = Counter(PurePosixPath(path).suffix or "no extension" for path in files.keys() - used)
    unlisted["header or identity record"] += ranges
    return Listing(entries=entries.made, unlisted=dict(sorted((+unlisted).items())), notes=notes)


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


def _found(source: Source, file: File, sides: dict[str, str | None], several: bool) -> _Found:
    if file.error is not None:
        found = _Found()
        found.faults.append((None, 0, file.error))
        return found
    index = offsets(source, sides[".idx"]) if sides[".idx"] is not None else Offsets()
    try:
        with source.open(file.path) as stream:
            return _scan(stream, file.size, index, several)
    except OSError as error:
        raise FormatError(f"{source.uri}: {file.path} cannot be read ({error.strerror or error}).") from error


def _named(source: Source, sides: dict[str, str | None]) -> Names:
    path = sides["list.txt"] or sides[".lst"]
    return names(source, path) if path is not None else Names()


def _enter(entries: Entries, found: _Found, path: str, prefix: str, named: Names) -> None:
    file = json.dumps(path)
    # DCFace writes the label 0 into every header and the identity into the path.
    constant = bool(named.paths) and len(set(found.labels)) <= 1
    people = {label: None if constant else label_of(label) for label in set(found.labels)}
    columns = (found.numbers, found.starts, found.sizes, found.spans, found.labels)
    for number, start, size, span, label in zip(*columns, strict=True):
        person = named.labels.get(number) or people.get(label)
        name = named.paths.get(number) or f"{person}/{number if number >= 0 else f'at-{start}'}.jpg"
        more = found.more.get(number) if found.more else None
        own = {f"label_{at}": f"{one:g}" for at, one in enumerate(more)} if more else None
        entries.add(prefix + name, size, place=f"[{file},{start},{span}]", label=person, attributes=own)
    for index, start, reason in found.faults:
        known = None if index is None else named.paths.get(index, f"{index}.jpg")
        remedy = "; get the file again" if "get the file" not in reason else ""
        entries.add(f"{prefix}{known or f'damaged-at-{start}'}", 0, error=f"{reason}{remedy}")


def _doubts(source: Source, path: str, found: _Found, declared: str | None) -> Iterator[str]:
    """What does not fit what the file and its `property` say of themselves."""
    images = len(found.numbers)
    if found.first_identity is not None and found.first_identity != images + 1:
        yield f"{path} announces {found.first_identity - 1:,} images in its header record and holds {images:,}"
    if declared is None:
        return
    first = next(lines(source, declared), "").split(",")[0]
    people = len(set(found.labels))
    if first.isdecimal() and int(first[:18]) != people and images:
        yield f"{declared} announces {int(first[:18]):,} identities and {path} holds {people:,}"


class RecordReader(Reader):
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
