"""Where sets live, and how their files are listed and opened; sets are read and never written.

A set's `uri` is a folder, one file, or a pattern (`shards-{0000..0031}.tar`, `part-*.parquet`) on this machine or in
object storage. Whatever it is, a format sees a `Source`: a place with files named by `/` separated paths.
"""

import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from operators.addresses import bare, public
from operators.errors import FormatError

SCHEMES = ("s3", "gs", "http", "https")
"""Places other than this machine, as the part of a `uri` before `://`."""

OPENED = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
"""How files are opened: one that turned into a pipe must not block."""


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
    """As the user gave it, without what may be secret (`operators.addresses.public`)."""

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
        self._known: Sequence[File] | None = None
        self._folder: tuple[str, int] | None = None
        self._lock = threading.Lock()
        path = Path(uri)
        self._matches: list[Path] | None = None
        if path.exists():
            self.root = path if path.is_dir() else path.resolve().parent  # the file itself may be a link
        else:
            self._matches = [Path(one) for one in expanded(uri)]
            self.root = _common(self._matches) if self._matches else path

    def __getstate__(self) -> dict[str, Any]:
        """What another process opens files by: neither what was listed nor the folder that is open here."""
        return {key: one for key, one in self.__dict__.items() if key not in ("_lock", "_folder", "_known")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_known": None, "_folder": None, "_lock": threading.Lock()}

    def __del__(self) -> None:
        held = self.__dict__.get("_folder")
        if held is not None:
            os.close(held[1])

    @cached_property
    def single(self) -> str | None:
        """The name of the file that `uri` is."""
        path = Path(self.uri)
        return path.resolve().name if path.is_file() else None

    def remember(self, files: Sequence[File]) -> None:
        """Have the next `files` give these, which the last one gave: looking at a million files takes a while."""
        self._known = files

    def files(self) -> Iterator[File]:
        """All regular files; FormatError if there is no such place or a folder of it cannot be listed."""
        known, self._known = self._known, None
        if known is not None:
            yield from known
        elif self.single is not None:
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
        self._links = 0
        todo = [("", os.fspath(self.root))]
        while todo:
            before, folder = todo.pop()
            try:
                with os.scandir(folder) as found:
                    entries = sorted(found, key=lambda one: one.name)
            except OSError as error:
                raise FormatError(
                    f"{error.filename}: cannot be listed ({error.strerror}). Give access to it or move it away."
                ) from error
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    todo.append((f"{before}{entry.name}/", entry.path))
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    self._links += 1
                else:
                    yield self._met(before + entry.name, entry)

    def _met(self, path: str, entry: "os.DirEntry[str]") -> File:
        """A file of a folder that no link leads to: only what is unusual about it is looked at closely."""
        if path.isprintable() and entry.is_file(follow_symlinks=False):
            try:
                return File(path, entry.stat(follow_symlinks=False).st_size)
            except OSError:
                pass  # gone, or not to be looked at
        return self._file(Path(entry.path))

    def linked_folders(self) -> int:
        """Links to folders that the last listing met and did not follow."""
        return self._links

    def open(self, path: str, version: str | None = None) -> BufferedIOBase:
        """The file as a stream; OSError if it is gone or is no regular file inside the set's folder."""
        return os.fdopen(self._opened(path)[0], "rb")

    def read(self, path: str, limit: int) -> bytes:
        """At most `limit` + 1 bytes from the beginning of a file; OSError as `open` raises it."""
        file, size = self._opened(path)
        try:
            data = os.read(file, min(size, limit) + 1)
            if len(data) == min(size, limit + 1):
                return data
            with os.fdopen(file, "rb", closefd=False) as rest:  # it grew, shrank, or gave less than it has
                return data + rest.read(limit + 1 - len(data))
        finally:
            os.close(file)

    def _opened(self, path: str) -> tuple[int, int]:
        """A regular file inside the set's folder: its descriptor and size.

        The folder that holds it is kept open for its neighbours. Neither a link put in the file's place nor one in that
        of a folder above can lead out of the set from then on.
        """
        if "\0" in path:
            raise OSError("not a regular file inside the set's folder")
        folder, _, name = path.rpartition("/")
        file = -1
        with self._lock:
            if self._folder is None or self._folder[0] != folder:
                self._enter(folder)
            if self._folder is not None and name not in ("", ".", ".."):
                try:
                    file = os.open(name, OPENED | os.O_NOFOLLOW, dir_fd=self._folder[1])
                except OSError as error:
                    if error.errno not in (errno.ELOOP, errno.ENOENT, errno.ENXIO):
                        raise
        if file < 0:
            chosen = self.root / path
            if not self._inside(chosen):
                raise OSError("not a regular file inside the set's folder")
            file = os.open(os.path.realpath(chosen), OPENED | os.O_NOFOLLOW)
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            os.close(file)
            raise OSError("not a regular file inside the set's folder")
        return file, found.st_size

    def _enter(self, folder: str) -> None:
        """Keep `folder` open in place of the last one, if it is one and lies inside the set's folder."""
        if self._folder is not None:
            os.close(self._folder[1])
            self._folder = None
        real = os.path.realpath(self.root / folder)
        if Path(real).is_relative_to(self._real):
            try:
                self._folder = folder, os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                return  # `_opened` says what is wrong

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
        if scheme.partition(":/")[0].lower() in SCHEMES:  # no path, and what follows may be secret
            raise FormatError("a `uri` begins like an address and lacks a `/`. Correct it.")
    elif scheme not in SCHEMES:
        raise FormatError(f"{public(uri)}: `{scheme}://` is not known. Use a path, or one of {', '.join(SCHEMES)}.")
    return scheme if mark else None


def absolute(uri: str) -> str:
    """`uri` so that it means the same in every process of this machine, without what may be secret."""
    return public(uri) if remote_scheme(uri) else os.path.abspath(uri)


def within(inner: str, outer: str) -> bool:
    """Whether the place `inner` is `outer` or lies in it."""
    schemes = remote_scheme(inner), remote_scheme(outer)
    if schemes != (None, None):
        inner, outer = (bare(one).rstrip("/") + "/" for one in (inner, outer))
        return schemes[0] == schemes[1] and inner.startswith(outer)
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
