"""Records that are ranges of files, kept as columns: RecordIO, LMDB, TFRecord.

Names are checked, and copies of a name found, for all records at once; objects are made where they are asked for.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators.errors import FormatError
from operators.formats.blocks import BLOCK, slices
from operators.formats.listing import Entry, Lazy, identity_of, name_fault, part_of
from operators.formats.naming import UNSAFE, plain, unique
from operators.formats.reading import Content, Reader
from operators.formats.tabular import Texts

if TYPE_CHECKING:
    from operators.formats import SetConfig

NOWHERE = -1
"""In place of where an image begins: it is not one range of the file, and is read by its place alone."""


TOGETHER = 65_536
"""Rows looked at in one go."""

Check = Callable[[memoryview, int, int, int], Sequence[int]]
"""Of a block of a file, the place of the block, and which of the rows lie in it: those that are not what was listed,
counted from the first."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """Where N records of one file are, in bytes."""

    file: str
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    """Of all that is read for a record."""
    starts: NDArray[np.int64]
    """Where its image begins, or `NOWHERE`."""
    sizes: NDArray[np.int64]
    """Of its image."""
    whole: bool = True
    """A place is `[file, begin, length]`; else it names where the image is, too."""
    tails: Sequence[str] | None = None
    """What stands at the end of each record's place."""

    def place(self, row: int) -> str:
        """The place of one record, for the form's reader."""
        begin = int(self.begins[row])
        made = f"{json.dumps(self.file)},{begin},{int(self.ends[row]) - begin}"
        if not self.whole:
            made = f"{made},{int(self.starts[row])},{int(self.sizes[row])}"
        return f"[{made}{self.tails[row] if self.tails is not None else ']'}"


class Spans(Lazy):
    """The entries of such records; of several under one name, all but the first become rejected rows of their own."""

    def __init__(self, uri: str, options: "SetConfig") -> None:
        self._uri, self._options = uri, options
        self.ranges: list[Ranges | None] = []
        """In the order of the entries; None for records of which only a fault is known."""
        self.firsts: list[int] = []
        self.faults: dict[int, str] = {}
        """Why a record is not read, by its row."""
        self._count = 0
        self._names: list[pa.Array] = []
        self._all: pa.ChunkedArray = pa.chunked_array([], pa.large_string())
        self._labels = Texts()
        self._attributes: dict[int, Mapping[str, str]] = {}
        self._keys: dict[int, str] = {}
        self.odd = np.zeros(0, np.int64)
        """The rows of `faults`."""

    @property
    def wants(self) -> bool:
        """Whether anybody will look at attributes."""
        return bool(self._options.attributes) or self._options.identity.startswith("attribute:")

    def add(
        self,
        ranges: Ranges,
        names: pa.Array,
        labels: pa.Array,
        attributes: Mapping[int, Mapping[str, str]] | None = None,
        faults: Mapping[int, str] | None = None,
    ) -> None:
        """Append N records: their names and labels (N, as text); attributes and faults by row of these N.

        Raises
        ------
        FormatError
            If there are too many records.
        """
        large_N = np.flatnonzero(ranges.sizes > (limit := self._options.limits.max_member_bytes))
        said = {row: f"{int(ranges.sizes[row]):,} bytes; the limit is {limit:,} (limits.max_member_bytes of the set)"
                for row in large_N.tolist()}  # fmt: skip
        self._append(ranges, names, labels, {**said, **(faults or {})})
        for row, one in (attributes or {}).items():
            self._attributes[self._count - len(names) + row] = one

    def refuse(self, names: Sequence[str], reasons: Sequence[str]) -> None:
        """Append records that cannot be read."""
        texts = pa.array(names, pa.large_string())
        self._append(None, texts, pa.nulls(len(names), pa.large_string()), dict(enumerate(reasons)))

    def _append(self, ranges: Ranges | None, names: pa.Array, labels: pa.Array, faults: Mapping[int, str]) -> None:
        if not len(names):
            return
        self.ranges.append(ranges)
        self.firsts.append(self._count)
        self.faults |= {self._count + row: fault for row, fault in faults.items()}
        self._names.append(names)
        self._labels.add(labels)
        self._count += len(names)
        if self._count > (limit := self._options.limits.max_records):
            raise FormatError(f"{self._uri}: more than {limit:,} records; raise limits.max_records of the set.")

    def settle(self) -> "Spans":
        """All was added: refuse bad names, and copies of names."""
        self._all = pa.chunked_array(self._names, pa.large_string())
        self._names = []
        unsafe = [] if plain(self._all) else pc.indices_nonzero(pc.match_substring_regex(self._all, UNSAFE)).to_pylist()
        for row in unsafe:
            fault = name_fault(self._all[row].as_py())
            if fault is not None:
                self.faults.setdefault(row, fault)
        if not unique(self._all):
            self._tell_apart()
        self.odd = np.array(sorted(self.faults), np.int64)
        return self

    def _tell_apart(self) -> None:
        """Give every copy of a name a key of its own."""
        seen: set[str] = set()
        copies: dict[str, int] = {}
        for row, name in enumerate(self._all.to_pylist()):
            key = name
            if name in seen:
                copy = copies.get(name, 1) + 1
                while (key := f"{name} ({copy})") in seen:
                    copy += 1
                copies[name], self._keys[row] = copy, key
                self.faults.setdefault(row, f"a record of the same name, {name!r}, came before; names must be unique")
            seen.add(key)

    def __len__(self) -> int:
        return self._count

    def made(self, start: int, stop: int) -> list[Entry]:
        """The entries of rows `start` to `stop`."""
        names = self._all.slice(start, stop - start).to_pylist()
        labels = self._labels.between(start, stop)
        rule, wanted = self._options.identity, self._options.attributes
        made = []
        for ranges, first, low, high in self.parts(start, stop):
            for row in range(low, high):
                name, own = names[row - start], self._attributes.get(row, {})
                fault = self.faults.get(row)
                made.append(
                    Entry(
                        key=self._keys.get(row, name),
                        identity=identity_of(rule, name, labels[row - start], own),
                        bytes=int(ranges.sizes[row - first]) if ranges is not None else 0,
                        error=fault,
                        place=ranges.place(row - first) if ranges is not None and fault is None else None,
                        attributes={one: own[one] for one in wanted if one in own} or None if own else None,
                    )
                )
        return made

    def parts(self, start: int, stop: int) -> Iterator[tuple[Ranges | None, int, int, int]]:
        """The ranges that rows `start` to `stop` lie in: the first row of each, and which of those rows are there."""
        at = bisect_right(self.firsts, start) - 1
        while start < stop:
            end = min(stop, self.firsts[at + 1] if at + 1 < len(self.firsts) else self._count)
            yield self.ranges[at], self.firsts[at], start, end
            start, at = end, at + 1


class SpanReader(Reader):
    """Reads records that are ranges of files by few large reads, where their listing says where they are."""

    def some(self, entries: Sequence[Entry], limit: int) -> Iterator[Sequence[Content]]:
        """The records of each run of neighbours; what is unusual is read by itself."""
        part = part_of(entries)
        if part is None or not isinstance(part.whole, Spans):
            yield from super().some(entries, limit)
            return
        for start in range(part.start, part.stop, TOGETHER):
            for ranges, first, low, high in part.whole.parts(start, min(start + TOGETHER, part.stop)):
                yield from self._of_file(part.whole, ranges, first, low, high, limit)

    def _of_file(
        self, spans: Spans, ranges: Ranges | None, first: int, start: int, stop: int, limit: int
    ) -> Iterator[Sequence[Content]]:
        """The records of rows `start` to `stop`, which lie in one file, of whose records `first` is the first."""
        odd = spans.odd[slice(*np.searchsorted(spans.odd, (start, stop)))].tolist()
        if ranges is not None:
            rows = slice(start - first, stop - first)
            most_N = np.maximum(ranges.sizes[rows], ranges.ends[rows] - ranges.begins[rows] - BLOCK)
            odd = sorted({*odd, *(np.flatnonzero((most_N > limit) | (ranges.starts[rows] < 0)) + start).tolist()})
        for row in (*odd, stop):
            if ranges is not None and row > start:
                yield from self._between(spans, ranges, first, start, row, limit)
            if row < stop:
                yield (self.one(spans[row], limit),)
            start = row + 1

    def _between(
        self, spans: Spans, ranges: Ranges, first: int, start: int, stop: int, limit: int
    ) -> Iterator[Sequence[Content]]:
        """The records of rows `start` to `stop`, none of which is unusual."""
        try:
            file = self.held(ranges.file, self.source.version(ranges.file))
        except OSError as fault:
            yield [fault] * (stop - start)
            return
        rows = slice(start - first, stop - first)
        begins_N, ends_N, starts_N = ranges.begins[rows], ranges.ends[rows], ranges.starts[rows]
        spoiled, stops_N = self.check(ranges, rows), starts_N + ranges.sizes[rows]
        for low, high, base, found, block in slices(file, begins_N, ends_N, starts_N, stops_N):
            if not found:
                yield [self.one(entry, limit) for entry in spans[start + low : start + high]]
                continue
            made: list[Content] = [*found]
            for row in spoiled(block, base, low, high):
                made[row] = self.one(spans[start + low + row], limit)
            yield made

    def check(self, ranges: Ranges, rows: slice) -> Check:
        """What says which records of some rows are not what was listed; they are read by themselves, which says why."""
        return lambda block, base, low, high: ()
