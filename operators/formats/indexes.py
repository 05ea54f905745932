"""Side files that come with record files, and the names that they give to records."""

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from operators.errors import FormatError
from operators.formats.listing import Entry, identity_of, name_fault
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

LINE_BYTES = 65536
"""A line of a side file is shorter."""

PIECE = 2**20
NO_PAIR = re.compile(rb"^(?!\Z|[ \t]*[0-9]{1,18}[ \t]+[0-9]{1,18}[ \t]*\r?$)", re.MULTILINE)
"""Beginning of a line that is not two numbers."""


class Entries:
    """Collects the entries of a listing: names are checked, copies of a name become rejected rows of their own."""

    def __init__(self, options: "SetConfig") -> None:
        self.made: list[Entry] = []
        self._options = options
        self._limit = options.limits.max_member_bytes
        self._seen: set[str] = set()
        self._copies: dict[str, int] = {}
        self._identities: dict[str | None, str | None] = {}

    def add(
        self,
        name: str,
        size: int,
        *,
        place: str | None = None,
        label: str | None = None,
        attributes: Mapping[str, str] | None = None,
        error: str | None = None,
    ) -> None:
        """One record; `label` is the form's own, `attributes` are all that it has."""
        error = error or name_fault(name)
        if error is None and size > self._limit:
            error = f"{size:,} bytes; the limit is {self._limit:,} (limits.max_member_bytes of the set)"
        key = name
        if name in self._seen:
            copy = self._copies.get(name, 1) + 1
            while (key := f"{name} ({copy})") in self._seen:
                copy += 1
            self._copies[name] = copy
            error = error or f"a record of the same name, {name!r}, came before; names must be unique"
        self._seen.add(key)
        identity = identity_of(self._options.identity, name, label, attributes or {})
        kept = {one: attributes[one] for one in self._options.attributes if one in attributes} if attributes else None
        self.made.append(
            Entry(
                key=key,
                identity=self._identities.setdefault(identity, identity),
                bytes=size,
                error=error,
                place=None if error else place,
                attributes=kept or None,
            )
        )

    @property
    def wants(self) -> bool:
        """Whether anybody will look at attributes."""
        return bool(self._options.attributes) or self._options.identity.startswith("attribute:")


@dataclass(frozen=True, kw_only=True, slots=True)
class Offsets:
    """Where records begin in a file, by the `.idx` file that came with it, in file order."""

    starts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    indices: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """The number under which each record is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """What a list file says of records, by their numbers."""

    paths: Mapping[int, str] = field(default_factory=dict)
    labels: Mapping[int, str] = field(default_factory=dict)


def lines(source: Source, path: str) -> Iterator[str]:
    """The lines of a side file; what is not UTF-8 is escaped.

    Raises
    ------
    FormatError
        If it cannot be read, or is no text.
    """
    try:
        with source.open(path) as file:
            while line := file.readline(LINE_BYTES):
                if len(line) == LINE_BYTES:
                    raise FormatError(f"{source.uri}: {path} is no list of records. Remove it, or get the right file.")
                yield line.decode("utf-8", "backslashreplace").rstrip("\r\n")
    except OSError as error:
        raise FormatError(f"{source.uri}: {path} cannot be read ({error.strerror or error}).") from error


def offsets(source: Source, path: str) -> Offsets:
    """An MXNet `.idx` file: lines of a record's number and its byte offset.

    Raises
    ------
    FormatError
        If it cannot be read or a line is not of this form.
    """
    parts = []
    for number, text in _pieces(source, path):
        if wrong := NO_PAIR.search(text):
            _refuse_line(source, path, number + text.count(b"\n", 0, wrong.start()) + 1)
        parts.append(np.fromstring(text, np.int64, sep=" ").reshape(-1, 2))
    pairs_N2 = np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)
    starts_N = pairs_N2[:, 1]
    if (starts_N[1:] < starts_N[:-1]).any():
        pairs_N2 = pairs_N2[np.argsort(starts_N, kind="stable")]
    return Offsets(starts=np.ascontiguousarray(pairs_N2[:, 1]), indices=np.ascontiguousarray(pairs_N2[:, 0]))


def _pieces(source: Source, path: str) -> Iterator[tuple[int, bytes]]:
    """A text in pieces of whole lines, and how many lines came before each; errors as of `lines`."""
    try:
        with source.open(path) as file:
            before, rest = 0, b""
            while block := file.read(PIECE):
                whole, mark, rest = (rest + block).rpartition(b"\n")
                if len(rest) >= LINE_BYTES:
                    raise FormatError(f"{source.uri}: {path} is no list of records. Remove it, or get the right file.")
                yield before, whole + mark
                before += whole.count(b"\n") + len(mark)
            yield before, rest
    except OSError as error:
        raise FormatError(f"{source.uri}: {path} cannot be read ({error.strerror or error}).") from error


def _refuse_line(source: Source, path: str, number: int) -> NoReturn:
    """FormatError for a line that is not a number and an offset."""
    raise FormatError(
        f"{source.uri}: line {number:,} of {path} is not a number and an offset: the index is damaged or cut short. "
        f"Get it again, or remove it: the records can be read without it."
    )


def names(source: Source, path: str) -> Names:
    """A list of records: DCFace's `list.txt`, MXNet's `.lst`, or InsightFace's `.lst`.

    Lines are separated by tabs: number, path, perhaps a label (DCFace); number, labels, path (MXNet); or, in
    InsightFace's own, a flag that is always the same, path, label, and the number is that of the line, from 1.

    Raises
    ------
    FormatError
        If it cannot be read, or a line has no number and path.
    """
    numbers, paths, labels = array("q"), [], []
    for at, line in enumerate(lines(source, path), 1):
        if not line.strip():
            continue
        fields = line.split("\t")
        column = next((n for n, one in enumerate(fields[1:], 1) if not _is_number(one)), len(fields) - 1)
        if len(fields) < 2 or not fields[0].isdecimal() or len(fields[0]) > 18 or not fields[column]:
            raise FormatError(
                f"{source.uri}: line {at:,} of {path} is not a number and a path, separated by tabs. Get it again, or "
                f"remove it: the records can be read without it."
            )
        rest = fields[1:column] + fields[column + 1 :]
        numbers.append(int(fields[0]))
        paths.append(fields[column])
        labels.append(label_of(float(rest[0])) if rest and _is_number(rest[0]) else (rest[0] if rest else None))
    if len(numbers) > 1 and len(set(numbers)) == 1:
        numbers = array("q", range(1, len(paths) + 1))
    clean = relative(paths)
    return Names(
        paths=dict(zip(numbers, clean, strict=True)),
        labels={n: label for n, label in zip(numbers, labels, strict=True) if label is not None},
    )


ShardIndex = Mapping[tuple[str, int], tuple[str | None, str | None]]
"""Name and label of the record at an offset of a file."""


def shard_index(source: Source, files: Sequence[File]) -> tuple[ShardIndex, set[str]]:
    """What TFace's `NAME.index` files say, and their paths.

    Their lines are path, shard and offset, or set, shard, offset and label, separated by tabs; shards are called
    `NAME-00000.tfrecord`. Other files of that name are left alone.
    """
    found: dict[tuple[str, int], tuple[str | None, str | None]] = {}
    read = set()
    for file in files:
        if not file.path.endswith(".index") or file.error is not None:
            continue
        rows = [line.split("\t") for line in lines(source, file.path)]
        width = len(rows[0]) if rows else 0
        if width not in (3, 4) or not all(len(row) == width and (row[1] + row[2]).isdecimal() for row in rows):
            continue
        stem = file.path.removesuffix(".index")
        named = relative([row[0] for row in rows]) if width == 3 else []
        for at, row in enumerate(rows):
            where = f"{stem}-{int(row[1][:18] or 0):05d}.tfrecord", int(row[2][:18] or 0)
            found[where] = (None, row[3]) if width == 4 else (named[at], None)
        read.add(file.path)
    return found, read


def relative(paths: Sequence[str]) -> list[str]:
    """`paths`, without the folder that they share if they lead out of the set as those of a publisher's machine do."""
    if not any(one.startswith(("/", "..", "~")) or one[1:2] == ":" for one in paths):
        return [one.removeprefix("./") for one in paths]
    # A folder that the first and the last in order share is shared by all between; an image's own may be its label.
    first, last = (one.split("/")[:-2] for one in (min(paths), max(paths)))
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return ["/".join(one.split("/")[shared:]) for one in paths]


def label_of(value: float) -> str | None:
    """A label stored as a float, as text: whole numbers without a point; None if it is not finite."""
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return str(int(value)) if value == int(value) else f"{value:g}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
