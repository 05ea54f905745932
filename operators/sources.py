"""Where sets live, and how their files are listed and opened; sets are read and never written.

A set's `uri` is a folder, one file, or a pattern (`shards-{0000..0031}.tar`, `part-*.parquet`) on this machine or in
object storage. Whatever it is, a format sees a `Source`: a place with files named by `/` separated paths.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Protocol

from operators.errors import FormatError

SCHEMES = ("s3", "gs", "http", "https")
"""Places other than this machine, as the part of a `uri` before `://`."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of a source."""

    path: str
    """Relative to the source, `/` separated."""
    size: int
    error: str | None = None
    """Why it must not be opened."""


class Source(Protocol):
    """The files of one set."""

    uri: str
    """As the user gave it; holds no credentials."""

    @property
    def single(self) -> str | None:
        """The path of the only file, if the `uri` names one; None for folders and patterns."""

    def files(self) -> Iterator[File]:
        """All files, in any order.

        Raises
        ------
        FormatError
            If the place is missing or cannot be listed.
        """

    def linked_folders(self) -> int:
        """Folders that were not entered because they are links; known after `files` has ended."""

    def open(self, path: str, version: str | None = None) -> BufferedIOBase:
        """A file as a stream that can seek.

        Raises
        ------
        OSError
            If it is gone, cannot be read, is no regular file of the set, or has another version than `version`.
        """

    def version(self, path: str) -> str | None:
        """What names this state of the file (an ETag); None where the place has no such thing."""


class LocalSource:
    """A folder, file or pattern on this machine.

    Links are followed only inside the set's folder: a link that leaves it could make the audit read and show any file
    of the machine.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._links = 0
        path = Path(uri)
        self._matches: list[Path] | None = None
        if path.exists():
            self.root = path if path.is_dir() else path.resolve().parent  # the file itself may be a link
        else:
            self._matches = [Path(one) for one in expanded(uri)]
            self.root = _common(self._matches) if self._matches else path

    @property
    def single(self) -> str | None:
        """The name of the file that `uri` is."""
        path = Path(self.uri)
        return path.resolve().name if path.is_file() else None

    def files(self) -> Iterator[File]:
        """All regular files; FormatError if there is no such place or a folder of it cannot be listed."""
        if self.single is not None:
            yield self._file(self.root / self.single)
        elif self._matches is not None:
            if not self._matches:
                raise FormatError(f"{self.uri}: no such file or folder. Correct the set's `uri`.")
            yield from map(self._file, self._matches)
        elif not Path(self.uri).is_dir():
            raise FormatError(f"{self.uri}: neither a folder nor a regular file. Correct the set's `uri`.")
        else:
            yield from self._walk()

    def _walk(self) -> Iterator[File]:
        def refuse(error: OSError) -> None:
            raise FormatError(
                f"{error.filename}: cannot be listed ({error.strerror}). Give access to it or move it away."
            )

        self._links = 0
        for folder, folders, names in os.walk(self.root, followlinks=False, onerror=refuse):
            self._links += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
            for name in names:
                yield self._file(Path(folder, name))

    def linked_folders(self) -> int:
        """Links to folders that the last listing met and did not follow."""
        return self._links

    def open(self, path: str, version: str | None = None) -> BufferedIOBase:
        """The file as a stream; OSError if it is gone or is no regular file inside the set's folder."""
        chosen = self.root / path
        if not self._inside(chosen):
            raise OSError("not a regular file inside the set's folder")
        return chosen.open("rb")

    def version(self, path: str) -> str | None:
        """None: digests of the images say whether they changed."""
        return None

    def _file(self, path: Path) -> File:
        raw = os.fsencode(str(PurePosixPath(path.relative_to(self.root))))
        name = raw.decode("utf-8", "backslashreplace")
        if raw != name.encode():
            return File(name, 0, "the file name is not valid UTF-8; rename the file")
        if not self._inside(path):
            return File(name, 0, "not a regular file inside the set's folder (links that leave it are not followed)")
        return File(name, os.path.getsize(path))

    @cached_property
    def _real(self) -> str:
        return os.path.realpath(self.root)

    def _inside(self, path: Path) -> bool:
        """Whether `path` leads to a regular file below the root; what cannot be looked at does not."""
        return os.path.isfile(path) and Path(os.path.realpath(path)).is_relative_to(self._real)


def open_source(uri: str, anonymous: bool = False) -> Source:
    """The place that `uri` names; `anonymous` asks object storage without credentials.

    Raises
    ------
    FormatError
        If the scheme is not known or its library is not installed.
    """
    scheme = remote_scheme(uri)
    if scheme is None:
        return LocalSource(uri)
    from operators.remote import RemoteSource

    return RemoteSource(uri, anonymous=anonymous)


def remote_scheme(uri: str) -> str | None:
    """The scheme of a `uri` that is not on this machine, else None; FormatError if nothing here can read it."""
    scheme, mark, _ = uri.partition("://")
    if not mark:
        return None
    if scheme not in SCHEMES:
        raise FormatError(f"{uri}: `{scheme}://` is not known. Use a path, or one of {', '.join(SCHEMES)}.")
    return scheme


def absolute(uri: str) -> str:
    """`uri` so that it means the same in every process of this machine."""
    return uri if remote_scheme(uri) else os.path.abspath(uri)


def within(inner: str, outer: str) -> bool:
    """Whether the place `inner` is `outer` or lies in it."""
    schemes = remote_scheme(inner), remote_scheme(outer)
    if schemes != (None, None):
        return schemes[0] == schemes[1] and (inner.rstrip("/") + "/").startswith(outer.rstrip("/") + "/")
    return Path(inner).resolve().is_relative_to(Path(outer).resolve())


def expanded(uri: str) -> list[str]:
    """The local files of a pattern with `{a,b}`, `{0000..0031}`, `*`, `?` or `[...]`, sorted; each once."""
    import glob

    import bracex

    found: set[str] = set()
    for one in bracex.iexpand(uri, limit=100_000):
        found.update(path for path in glob.glob(one) if os.path.isfile(path))
    return sorted(found)


def _common(paths: list[Path]) -> Path:
    return Path(os.path.commonpath([path.parent for path in paths]))
