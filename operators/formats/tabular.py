"""Records of tables: what stands beside the images is kept as columns, and entries are made when they are asked for.

So a listing of millions of records takes the memory of their names and not that of as many objects.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators.errors import FormatError
from operators.formats.columns import Columns
from operators.formats.indexes import label_of
from operators.formats.listing import Entry, Lazy, identity_of, part_of
from operators.formats.members import printable
from operators.formats.naming import TEXT_BYTES, faults, joined, may_name, plain_names, stem_of, tidied, unique
from operators.formats.reading import Content, Reader

if TYPE_CHECKING:
    from operators.formats import SetConfig

MET = 65_536
"""Values of a column whose texts are remembered."""

ENDINGS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp", b"P5": ".pgm", b"P6": ".ppm"}
"""Endings of images by their first bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Records that lie together in a file: a row group, a record batch, an array."""

    file: str
    place: Sequence[Any]
    """What the place of each record begins with; the record's number in the group comes after it."""
    rows: int
    first: int
    """The number of its first record in its file."""
    bytes: int
    """Of one record, on average where it is not known."""
    fault: str | None = None
    """Why none of its records can be read."""


class Texts:
    """A column of texts of which many are equal."""

    def __init__(self) -> None:
        self.values: list[str | None] = [None]
        self._known: dict[str | None, int] = {None: 0}
        self._met: dict[Any, dict[object, int]] = {}
        """Codes of values as they come, by their type and classes."""
        self._codes: list[NDArray[np.int32]] = []
        self._joined: NDArray[np.int32] | None = None

    def add(self, column: pa.Array, classes: Sequence[str] | None = None) -> None:
        """Append a column; numbers become texts, or names of `classes` if these are given."""
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        values = column.dictionary
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            values = values.cast(pa.large_binary())  # nobody has checked that it is UTF-8
        known = self._met.setdefault((values.type, tuple(classes) if classes is not None else None), {})
        own = []
        for one in values.to_pylist():
            code = known.get(one)
            if code is None:
                code = self._code(text_of(one, classes))
                if len(known) < MET:
                    known[one] = code
            own.append(code)
        at = column.indices.fill_null(len(own)).to_numpy(zero_copy_only=False).astype(np.int64)
        self._codes.append(np.array([*own, 0], np.int32)[at])
        self._joined = None

    def _code(self, value: str | None) -> int:
        code = self._known.setdefault(value, len(self.values))
        if code == len(self.values):
            self.values.append(value)
        return code

    def between(self, start: int, stop: int) -> list[str | None]:
        """Texts of rows `start` to `stop`."""
        if self._joined is None:
            self._joined = np.concatenate(self._codes) if self._codes else np.zeros(0, np.int32)
            self._codes = [self._joined]
        return [self.values[code] for code in self._joined[start:stop].tolist()]


def text_of(value: object, classes: Sequence[str] | None = None) -> str | None:
    """A scalar as text; None for nothing, for what is too long, and for numbers below zero that stand for a class."""
    if isinstance(value, int) and not isinstance(value, bool) and classes is not None:
        return None if value < 0 else (classes[value] if value < len(classes) else str(value))
    if isinstance(value, float):
        return label_of(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    text = "" if value is None else printable(str(value))
    return text if 0 < len(text) <= TEXT_BYTES else None


class Rows(Lazy):
    """The entries of all tables of a set."""

    def __init__(self, uri: str, options: "SetConfig") -> None:
        self._uri, self._options = uri, options
        self.groups: list[Group] = []
        self._firsts: list[int] = []
        self._count = 0
        self._files: list[list[pa.Array] | None] = []
        self._labels = Texts()
        self._attributes: dict[str, Texts] = {}
        self._names: pa.ChunkedArray | None = None
        self._labelled = False
        self.endings: Mapping[str, str] = {}
        """What the names of rows that have none end with, by file."""
        self._faults: dict[int, str] = {}
        self._odd = np.zeros(0, np.int64)
        """The rows of `_faults`."""

    def add(self, groups: Iterable[Group], columns: Columns, beside: Mapping[str, pa.Array]) -> None:
        """Append groups with the columns that stand beside them, which are as long as all groups together.

        Raises
        ------
        FormatError
            If there are too many records.
        """
        start = self._count
        for group in groups:
            self.groups.append(group)
            self._firsts.append(self._count)
            self._count += group.rows
        limit = self._options.limits.max_records
        if self._count > limit:
            raise FormatError(f"{self._uri}: more than {limit:,} records; raise limits.max_records of the set.")
        if any(len(one) != self._count - start for one in beside.values()):
            raise FormatError(f"{self._uri}: columns of different lengths: a file is damaged. Get it again.")
        nothing = pa.nulls(self._count - start, pa.string())
        if not self._files and start == 0:
            self._files = [[] for _ in range(2)]
        for at, kept in enumerate(self._files):
            if kept is not None:
                name = columns.files[at] if at < len(columns.files) else None
                texts = beside[name] if name is not None else nothing
                self._files[at] = [*kept, plain_names(texts)] if may_name(texts) else None
        self._labels.add(beside[columns.label] if columns.label is not None else nothing, columns.classes)
        for name in columns.attributes:
            if name not in self._attributes:
                self._attributes[name] = Texts()
                self._attributes[name].add(pa.nulls(start, pa.string()))
        for name, one in self._attributes.items():
            one.add(beside[name] if name in columns.attributes else nothing)

    def name(self) -> bool:
        """All was added: settle how records are called; True if they have no names of their own that could be used."""
        for kept in self._files:
            if not kept:
                continue
            names = tidied(pa.chunked_array(kept))
            if unique(names):
                self._names = names
            elif len(self._labels.values) > 1:
                joined_names = joined(self._labels.between(0, self._count), names)
                self._names = joined_names if unique(joined_names) else None
                self._labelled = self._names is not None
            if self._names is not None:
                break
        self._files = []
        if self._names is not None:
            self._faults = dict(faults(self._names))
            self._odd = np.array(sorted(self._faults), np.int64)
        return self._names is None

    def __len__(self) -> int:
        return self._count

    def made(self, start: int, stop: int) -> list[Entry]:
        """The entries of rows `start` to `stop`."""
        made: list[Entry] = []
        for group, first, low, high in self.parts(start, stop):
            made += self._of_group(group, first, low, high)
        return made

    def parts(self, start: int, stop: int) -> Iterator[tuple[Group, int, int, int]]:
        """The groups that rows `start` to `stop` lie in: the first row of each, and which of those rows are in it."""
        at = bisect_right(self._firsts, start) - 1
        while start < stop:
            end = min(stop, self._firsts[at] + self.groups[at].rows)
            if start < end:
                yield self.groups[at], self._firsts[at], start, end
            start, at = max(start, end), at + 1

    def unusual(self, group: Group, start: int, stop: int) -> bool:
        """Whether any of the rows `start` to `stop`, all in `group`, is listed with a fault."""
        if group.fault is not None or group.bytes > self._options.limits.max_member_bytes:
            return True
        low, high = np.searchsorted(self._odd, (start, stop))
        return bool(low < high)

    def _of_group(self, group: Group, first: int, start: int, stop: int) -> list[Entry]:
        """Entries of rows `start` to `stop` of the set, which all lie in `group`."""
        place = json.dumps(group.place, separators=(",", ":"))[:-1] + ","
        labels = self._labels.between(start, stop)
        said = {name: one.between(start, stop) for name, one in self._attributes.items()}
        rule, wanted = self._options.identity, self._options.attributes
        names: Sequence[str | None] = [None] * (stop - start)
        if self._names is not None:
            names = self._names.slice(start, stop - start).to_pylist()
        stem, ending = stem_of(group.file), self.endings.get(group.file, "")
        limit, large = self._options.limits.max_member_bytes, None
        if group.bytes > limit:
            large = f"{group.bytes:,} bytes; the limit is {limit:,} (limits.max_member_bytes)"
        made = []
        for at, (name, label) in enumerate(zip(names, labels, strict=True)):
            row = start + at - first
            own = {key: text for key, texts in said.items() if (text := texts[at]) is not None} if said else {}
            key = name if name is not None else f"{stem}/{group.first + row:08d}{ending}"
            fault = self._faults.get(start + at) if self._faults else None
            if fault is not None:
                key = f"{printable(key)} (record {start + at})"
            parent = "" if name is None else (name.partition("/")[2] if self._labelled else name)
            made.append(
                Entry(
                    key=key,
                    identity=identity_of(rule, parent, label, own),
                    bytes=group.bytes,
                    error=fault or group.fault or large,
                    place=f"{place}{row}]",
                    attributes=({one: own[one] for one in wanted if one in own} or None) if own else None,
                )
            )
        return made


class RowReader(Reader):
    """Reads rows of tables by the groups that they lie in, where their listing says which these are."""

    def some(self, entries: Sequence[Entry], limit: int) -> Iterator[Sequence[Content]]:
        """The rows of each group; those of a group that holds anything unusual one by one."""
        part = part_of(entries)
        if part is None or not isinstance(part.whole, Rows):
            yield from super().some(entries, limit)
            return
        for group, first, start, stop in part.whole.parts(part.start, part.stop):
            done = start
            if not part.whole.unusual(group, start, stop):
                try:
                    file = self.held(group.file, self.source.version(group.file))
                    for found in self.rows_of(group, file, start - first, stop - first, limit):
                        yield found
                        done += len(found)
                except OSError:
                    pass  # what is wrong with a row is said where it is read by itself
            yield from super().some(part.whole[done:stop], limit)

    def rows_of(
        self, group: Group, file: BufferedIOBase, start: int, stop: int, limit: int
    ) -> Iterator[Sequence[Content]]:
        """Rows `start` to `stop` of a group, or fewer from the first on; the others are read one by one.

        Raises
        ------
        OSError
            If the next row cannot be read.
        """
        return iter(())


def first_endings(reader: Reader, rows: Rows) -> Mapping[str, str]:
    """The ending that fits the first image of each file; files of which it cannot be read have none."""
    found: dict[str, str] = {}
    with reader:
        for group in rows.groups:
            if group.file not in found and group.rows:
                try:
                    with reader.open(json.dumps([*group.place, 0])) as stream:
                        head = stream.read(16)
                except OSError:
                    head = b""
                found[group.file] = next((one for start, one in ENDINGS.items() if head.startswith(start)), "")
    return found
