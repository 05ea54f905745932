"""What archives share: which members count as images, their keys and places, and how their bytes are read."""

import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from io import BufferedIOBase, BytesIO
from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from operators.errors import FormatError
from operators.formats.listing import EXTENSIONS, Entry, Listing, identity_of, name_fault
from operators.formats.reading import window
from operators.sources import File

if TYPE_CHECKING:
    from operators.formats import SetConfig

ARCHIVES = frozenset({".zip", ".tar", ".tgz", ".gz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar"})
"""Endings of members that may hold images, which are not looked for there."""

NESTED = "archive inside the archive"
LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})

KINDS = 64
"""Kinds of other members that are told apart."""

WHOLE = 2**22
"""Members of up to so many bytes are read in one go; larger ones as a stream."""


class Gathered:
    """Entries of the members of one or several archives, in the order in which they are added."""

    def __init__(self, uri: str, options: "SetConfig", archives: Sequence[str], prefixed: bool = True) -> None:
        """Begin with nothing.

        Parameters
        ----------
        uri
            Of the set, for messages.
        options
            Of the set.
        archives
            Their paths, in the order in which their members will be added.
        prefixed
            Where there are several archives, put their names before all keys, else only before keys that several
            archives have.
        """
        self.entries: list[Entry] = []
        self.unlisted: Counter[str] = Counter()
        self.notes: list[str] = []
        self._uri, self._options = uri, options
        self._archives, self._prefixed = archives, prefixed
        self._numbers = {path: at for at, path in enumerate(archives)}
        self._prefixes = prefixes(archives)
        self._shared: dict[str | None, str | None] = {}
        self._own, self._from = array("q"), array("L")

    def passes(self, name: str, word: str | None = None) -> bool:
        """Whether `name` is called as images are; else it is counted as `word` or by its ending, if it is no folder."""
        kind = kind_of(name)
        if kind is not None and not name.endswith("/"):
            kind = word or kind
            self.unlisted[kind if kind in self.unlisted or len(self.unlisted) < KINDS else "other endings"] += 1
        return kind is None

    def add(
        self,
        archive: str,
        name: str,
        size: int,
        place: str,
        error: str | None = None,
        said: tuple[str | None, Mapping[str, str]] = (None, {}),
    ) -> None:
        """One image-like member of `archive`, with its label and attributes; FormatError if there are too many."""
        limits = self._options.limits
        if len(self.entries) >= limits.max_records:
            raise FormatError(
                f"{self._uri}: more than {limits.max_records:,} images; raise limits.max_records of the set."
            )
        fault = _fault(name)
        if size > limits.max_member_bytes:
            error = error or f"{size:,} bytes; the limit is {limits.max_member_bytes:,} (limits.max_member_bytes)"
        identity = identity_of(self._options.identity, name, *said) if fault is None else None
        kept = said[1] and {wanted: said[1][wanted] for wanted in self._options.attributes if wanted in said[1]}
        self._own.append(hash(name))
        self._from.append(self._numbers[archive])
        self.entries.append(
            Entry(
                key=self._prefixes[archive] * self._prefixed + printable(name),
                identity=self._shared.setdefault(identity, identity),
                bytes=size,
                error=fault or error,
                place=place,
                attributes=kept or None,
            )
        )

    def reject(self, at: int, error: str) -> None:
        """Give entry `at` an error if it has none."""
        if self.entries[at].error is None:
            self.entries[at] = replace(self.entries[at], error=error)

    def listing(self) -> Listing:
        """All that was added, each under a key of its own; FormatError if there is no image."""
        if not self.entries:
            others = ", ".join(f"{count:,} {kind}" for kind, count in self.unlisted.most_common(5))
            raise FormatError(
                f"{self._uri}: no image ({', '.join(sorted(EXTENSIONS))}) in the archive; it holds "
                f"{others or 'nothing'}. Correct the set's `uri`."
            )
        repeated = self._repeated()
        if repeated and len(self._archives) > 1:
            self._tell_apart() if self._prefixed else self._prefix(repeated)
        if repeated:
            self._separate()
        if nested := self.unlisted[NESTED]:
            self.notes.append(f"{nested:,} archives inside the archive were not read; unpack them if they hold images.")
        return Listing(entries=self.entries, unlisted=dict(sorted((+self.unlisted).items())), notes=self.notes)

    def _repeated(self) -> list[int]:
        """Entries whose names occur more than once, in one archive or in several."""
        _, which, counts = np.unique(np.frombuffer(self._own, np.int64), return_inverse=True, return_counts=True)
        found: list[int] = np.flatnonzero(counts[which] > 1).tolist()
        return found

    def _tell_apart(self) -> None:
        """Where archives repeat each other's names, a folder's name does not stand for one person in all of them."""
        rule = self._options.identity
        if rule not in ("auto", "parent"):
            return
        self.notes.append(
            "Some names occur in several of the archives, so equal folders of different archives were taken for "
            "different persons; say who is who in a list file if they are not."
        )
        for at, entry in enumerate(self.entries):
            if entry.error is None or entry.identity is not None:
                self.entries[at] = replace(entry, identity=identity_of("parent", entry.key, None, {}))

    def _prefix(self, repeated: Sequence[int]) -> None:
        """Put the archive's name before keys that several archives have."""
        holders: dict[str, set[int]] = {}
        for at in repeated:
            holders.setdefault(self.entries[at].key, set()).add(self._from[at])
        for at in repeated:
            key = self.entries[at].key
            if len(holders[key]) > 1:
                before = self._prefixes[self._archives[self._from[at]]]
                self.entries[at] = replace(self.entries[at], key=before + key)

    def _separate(self) -> None:
        """Give every later record of the same key a key of its own, `key (2)`, and an error, so that none is lost."""
        taken = {entry.key for entry in self.entries}
        seen: set[str] = set()
        copies: Counter[str] = Counter()
        for at, entry in enumerate(self.entries):
            key = entry.key
            while key in seen or (key != entry.key and key in taken):
                copies[entry.key] += 1
                key = f"{entry.key} ({copies[entry.key] + 1})"
            seen.add(key)
            if key != entry.key:
                self.entries[at] = replace(entry, key=key)
                self.reject(at, f"another record has the same name {entry.key!r}; give each its own")


def kind_of(name: str) -> str | None:
    """What a member is by its name if it is no image: its ending, or a word; None for images."""
    base = name.rpartition("/")[2]
    if _litter(name):
        return "file of the desktop (._*, __MACOSX, .DS_Store)"
    dot = base.rfind(".")
    ending = base[dot:].lower() if dot > 0 else ""
    if ending in EXTENSIONS:
        return None
    if ending in ARCHIVES:
        return NESTED
    return printable(ending) or "no extension"


def _litter(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.startswith("._") or base in LITTER or name.startswith("__MACOSX/")


def tidy(name: str) -> str:
    """`name` without `.` and empty parts, as in `./ann//1.jpg`; a leading `/` stays."""
    if not name.startswith("./") and "//" not in name and "/./" not in name:
        return name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/" * name.startswith("/") + "/".join(parts)


def decoded(raw: bytes) -> str:
    """A name of unsaid encoding: UTF-8, with surrogates for what is not."""
    return raw.decode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    """`name` with escapes for what must not stand in a key."""
    if name.isascii() and name.isprintable():
        return name
    name = "".join(sign if ord(sign) >= 32 and sign != "\x7f" else f"\\x{ord(sign):02x}" for sign in name)
    return name.encode("utf-8", "backslashreplace").decode()


def _fault(name: str) -> str | None:
    plain = name.isascii() and name.isprintable() and ".." not in name and "\\" not in name
    if plain and name and name[0] != "/":
        return None
    fault = name_fault(name)
    return fault and f"{fault}; pack the archive anew with plain relative names"


def prefixes(archives: Sequence[str]) -> Mapping[str, str]:
    """What the keys of each archive's members begin with: nothing for one, else its path without its endings."""
    if len(archives) < 2:
        return dict.fromkeys(archives, "")
    short = {path: path.removesuffix("".join(_endings(path))) + "/" for path in archives}
    ordered = sorted(short.values())
    mixed = any(later.startswith(name) for name, later in pairwise(ordered))
    return {path: printable(path + "/" if mixed else name) for path, name in short.items()}


def _endings(path: str) -> Sequence[str]:
    last = PurePosixPath(path).suffixes[-2:]
    return last if [one.lower() for one in last[:1]] == [".tar"] else last[-1:]


def named(files: Sequence[File], endings: tuple[str, ...], single: str | None) -> list[File]:
    """The files with one of the endings, by path; without any, the only file, whatever it is called."""
    chosen = [file for file in files if file.path.lower().endswith(endings) and not _litter(file.path)]
    return sorted(chosen or (files if single is not None else []), key=lambda file: file.path)


def kinds_beside(files: Sequence[File], chosen: Sequence[File]) -> Counter[str]:
    """Kinds of the files that were not chosen, counted."""
    paths = {file.path for file in chosen}
    return Counter(kind_of(file.path) or "image beside the archives" for file in files if file.path not in paths)


@lru_cache(maxsize=16)  # a reader asks for the version of a place, then opens it
def located(place: str, count: int) -> tuple[str, tuple[int, ...]]:
    """File and `count` numbers of a place; OSError if it is none."""
    try:
        path, *numbers = json.loads(place)
    except (ValueError, TypeError):
        path, numbers = None, []
    if not isinstance(path, str) or len(numbers) != count or set(map(type, numbers)) != {int} or min(numbers) < 0:
        raise OSError("its place cannot be understood; scan the set again")
    return path, tuple(numbers)


def located_near(place: str, count: int, near: tuple[str, str] | None) -> tuple[str, tuple[int, ...], tuple[str, str]]:
    """As `located`, and what it needs for the next place: the JSON text of the file's name, and the name.

    Neighbours lie in the same file, whose name need not be parsed again.
    """
    if near is not None and place.startswith(near[0]) and place.endswith("]"):
        parts = place[len(near[0]) : -1].split(",")
        if len(parts) == count and "".join(parts).isdecimal() and "" not in parts:
            return near[1], tuple(map(int, parts)), near
    path, numbers = located(place, count)
    return path, numbers, (f"[{json.dumps(path)},", path)


def stored(file: BufferedIOBase, offset: int, size: int) -> BufferedIOBase:
    """Bytes `offset` to `offset + size` of `file`; OSError, now or when reading, if it ends before."""
    if size > WHOLE:
        return window(file, offset, size)
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise OSError("the file ends inside this record: it is truncated")
    return BytesIO(data)
