"""What a format finds in a set before any image is read, and the rules for names and labels that all formats share."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from operators.errors import FormatError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".pgm", ".ppm"})
"""What an image file may be called."""

USUAL = frozenset({".jpg", ".png"})
"""What nearly all are called."""


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One record of a set: its key, the person's label, its size, or why it must not be read."""

    key: str
    """`/` separated, unique in the set: the image's name everywhere."""
    identity: str | None
    bytes: int
    """Of the encoded image or vector, as far as the listing says."""
    error: str | None = None
    place: str | None = None
    """Where its bytes are, for the format's own reader; None: the key says it."""
    attributes: Mapping[str, str] | None = None
    """Those that the configuration asks for (`attributes`), as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """All records of a set, and what else was there."""

    entries: Sequence[Entry]
    unlisted: Mapping[str, int]
    """Things that are no records, counted by kind (`.txt`, `linked folder`): reported, never read."""
    notes: Sequence[str] = field(default_factory=list)
    """What the user should know of how the set was read, one sentence each."""


MOST_FAULTS = 2**20
"""So many records of a set may be unreadable, and beyond that as many as can be read. A record that is none takes a few
bytes in a file and hundreds in memory: files of nothing else must not be listed to their end."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Stops the listing of a set while its files are looked through."""

    place: str
    """The set, for the error."""
    limit: int
    """Records that it may have (`limits.max_records`)."""
    before: int = 0
    """Records of files that are listed already."""
    lost: int = 0
    """How many of these cannot be read."""

    def __call__(self, images: int, faults: int, reason: str = "") -> None:
        """Go on with so many records found in this file, the last of the unreadable ones for a `reason`.

        Raises
        ------
        FormatError
            If they are too many, or too many of them cannot be read.
        """
        images, faults = self.before - self.lost + images, self.lost + faults
        if images + faults > self.limit:
            raise FormatError(f"{self.place}: more than {self.limit:,} records; raise limits.max_records of the set.")
        if faults > MOST_FAULTS + images:
            raise FormatError(
                f"{self.place}: {faults:,} records cannot be read and {images:,} can ({reason}). It is damaged or no "
                f"set of images: get it again, or correct the set's `uri`."
            )


def ending(path: str) -> str:
    """The ending of a file's name, in small letters, as `PurePath.suffix` has it."""
    name = path[path.rfind("/") + 1 :]
    at = name.rfind(".")
    return name[at:].lower() if 0 < at < len(name) - 1 else ""


def named_as_image(path: str) -> bool:
    """Whether a file is called as images are."""
    return (path[-4:] in USUAL and path[-5:-4] not in ("", "/")) or ending(path) in EXTENSIONS


BLOCK = 4096
"""Entries made at once."""


class Lazy(Sequence[Entry]):
    """Entries that are kept as columns and made when they are asked for.

    So a listing of millions of records takes the memory of their names and not that of as many objects. A slice is a
    `Part`, by which a reader can read the records without any entry being made.
    """

    def made(self, start: int, stop: int) -> list[Entry]:
        """The entries `start` to `stop`, which are there."""
        raise NotImplementedError

    @overload
    def __getitem__(self, at: int) -> Entry: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Entry]: ...

    def __getitem__(self, at: int | slice) -> Entry | Sequence[Entry]:
        if isinstance(at, int):
            at = range(len(self))[at]
            return self.made(at, at + 1)[0]
        start, stop, step = at.indices(len(self))
        return Part(self, start, max(start, stop)) if step == 1 else [self[one] for one in range(start, stop, step)]

    def __iter__(self) -> Iterator[Entry]:
        return iter(Part(self, 0, len(self)))


class Part(Sequence[Entry]):
    """Entries `start` to `stop` of `whole`."""

    def __init__(self, whole: Lazy, start: int, stop: int) -> None:
        self.whole, self.start, self.stop = whole, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    @overload
    def __getitem__(self, at: int) -> Entry: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Entry]: ...

    def __getitem__(self, at: int | slice) -> Entry | Sequence[Entry]:
        rows = range(self.start, self.stop)[at]
        if isinstance(rows, int):
            return self.whole[rows]
        return (
            Part(self.whole, rows.start, max(rows.start, rows.stop))
            if rows.step == 1
            else [self.whole[one] for one in rows]
        )

    def __iter__(self) -> Iterator[Entry]:
        for start in range(self.start, self.stop, BLOCK):
            yield from self.whole.made(start, min(start + BLOCK, self.stop))


def part_of(entries: Sequence[Entry]) -> Part | None:
    """The rows that `entries` are of a listing kept as columns; None for entries that are objects already."""
    if isinstance(entries, Lazy):
        return Part(entries, 0, len(entries))
    return entries if isinstance(entries, Part) else None


def identity_of(rule: str, key: str, label: str | None, attributes: Mapping[str, str]) -> str | None:
    """The person's label of one record by the rule `identity` of the set's configuration.

    Parameters
    ----------
    rule
        `auto`: the record's own label if the form has one, else as `parent`; `label`: only the form's own; `parent`:
        the folders of the key; `none`; `attribute:NAME`: that attribute.
    key
        The record's key.
    label
        The label that the form itself holds for this record, if it has one.
    attributes
        All attributes that the record has.
    """
    if rule == "none":
        return None
    if rule.startswith("attribute:"):
        return attributes.get(rule.removeprefix("attribute:")) or None
    if rule == "label" or (rule == "auto" and label is not None):
        return label
    return key.rpartition("/")[0] or None


def name_fault(name: str) -> str | None:
    """Why a member's name must not be used, or None: absolute names, `..`, backslashes and control characters."""
    if name.isascii() and name.isprintable() and name and name[0] != "/" and ".." not in name and "\\" not in name:
        return None  # nearly all are as plain as that
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name:
        return "its name leads out of the archive"
    if not name or _CONTROL.search(name):
        return "its name is empty or holds control characters"
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            return "its name is not valid UTF-8"
    return None
