"""Sets in object storage and on web servers, as a `Source`: `s3://`, `gs://`, and `http(s)://`.

Nothing is copied to this machine and nothing is written there. A file keeps the ETag with which it was opened: reading
on after it was replaced is an error, and so is opening it with the ETag of an earlier listing.
"""

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cached_property
from io import BufferedIOBase
from typing import Any, Protocol
from urllib.parse import urlsplit

from operators.addresses import HIDDEN, hidden, public
from operators.errors import FormatError
from operators.remote_faults import Gone, changed
from operators.remote_google import GoogleBucket
from operators.remote_http import Server
from operators.remote_objects import Bucket
from operators.remote_streams import Remote, stream
from operators.sources import File

MOST_FILES = 100_000
"""Files that a pattern with braces may name."""
WEB = ("http", "https")
"""Schemes of web servers."""
KNOWN_FILES = 256
"""Files whose ETags are remembered; those of a folder of images are asked for once each anyway."""
FRESH_S = 10.0
"""For so long a file opened for its ETag serves for reading too, which saves a request."""

_MAGIC = re.compile(r"[*?\[]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Place(Protocol):
    """A bucket, or a web server."""

    shown: str

    def sizes(self, keys: list[str]) -> Iterator[tuple[str, int | None]]:
        """Each key with the size of its file, None where there is none."""

    def size(self, key: str) -> int | None:
        """Size of a file, or None if there is none."""

    def open(self, key: str) -> Remote:
        """The file as it is now; Gone if there is none."""

    def listed(self, folder: str) -> Iterator[tuple[str, int]]:
        """Keys and sizes of all files below a folder."""


class RemoteSource:
    """A prefix, an object or a pattern in object storage, or files of a web server. May be used by several threads."""

    def __init__(self, uri: str, anonymous: bool = False) -> None:
        """Look at the address; the first request is made when it is needed.

        Raises
        ------
        FormatError
            If the address holds credentials that are not for a web server, or is none.
        """
        refuse_address(uri)
        self.uri, self._whole, self._anonymous = public(uri), uri, anonymous
        scheme, _, rest = uri.partition("://")
        rest, _, query = rest.partition("?") if scheme in WEB else (rest, "", "")
        name, _, key = rest.partition("/")
        self._place = Server(scheme, name, query) if scheme in WEB else _bucket(scheme, name, anonymous)
        self._key = key
        self._pattern = bool(re.search(r"[*?\[{]", key))
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[str | None, Remote | None, float]] = OrderedDict()

    @cached_property
    def single(self) -> str | None:
        """The name of the only file, if the address is one; asks the place."""
        return None if self._size is None else self._key.rpartition("/")[2]

    @cached_property
    def _size(self) -> int | None:
        """Size of the only file."""
        if self._pattern or not self._key or self._key.endswith("/"):
            return None
        return self._place.size(self._key)

    @cached_property
    def _root(self) -> str:
        """What the keys of all files begin with: empty, or up to and with a `/`."""
        if self._pattern:
            folders = [_folder(one).split("/") for one in _braces(self.uri, self._key)]
            common = folders[0]
            for other in folders[1:]:
                same = [a == b for a, b in zip(common, other, strict=False)]
                common = common[: same.index(False) if False in same else len(same)]
            return "".join(f"{part}/" for part in common if part)
        if self.single is not None:
            return self._key[: len(self._key) - len(self.single)]
        return f"{self._key.rstrip('/')}/" if self._key else ""

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process connects for itself."""
        return RemoteSource, (self._whole, self._anonymous)

    def files(self) -> Iterator[File]:
        """All files; FormatError if there is no such place, it may not be listed, or a file named by it is missing."""
        if self._pattern:
            yield from map(self._file, sorted(self._matches()))
        elif self._size is not None:
            yield self._file((self._key, self._size))
        else:
            count = 0
            for found in self._place.listed(self._root.rstrip("/")):
                count += 1
                yield self._file(found)
            if not count:
                raise FormatError(f"{self.uri}: there is nothing. Correct the set's `uri`.")

    def linked_folders(self) -> int:
        """0: there are no links."""
        return 0

    def open(self, path: str, version: str | None = None) -> BufferedIOBase:
        """A file as a stream; OSError if it is gone or has another ETag than `version`, at once or while it is read."""
        refuse_path(path)
        known, remote, since = self._seen(path)
        if remote is None or time.monotonic() - since > FRESH_S:
            remote = self._place.open(self._root + path)
        self._see(path, remote.etag, None)
        wanted = version if version is not None else known
        if wanted is not None and remote.etag != wanted:
            raise changed(wanted, remote.etag)
        return stream(remote)

    def version(self, path: str) -> str | None:
        """The file's ETag as this source first saw it; OSError if it is gone."""
        refuse_path(path)
        known, _, _ = self._seen(path)
        if known is None:
            remote = self._place.open(self._root + path)
            known = remote.etag
            self._see(path, known, remote)
        return known

    def _seen(self, path: str) -> tuple[str | None, Remote | None, float]:
        with self._lock:
            return self._known.get(path, (None, None, 0.0))

    def _see(self, path: str, etag: str | None, remote: Remote | None) -> None:
        """Remember the ETag of a file that is seen for the first time, and the file as it was opened for it."""
        with self._lock:
            first = self._known.get(path, (etag, None, 0.0))[0]
            self._known[path] = first, remote, time.monotonic()
            self._known.move_to_end(path)
            while len(self._known) > KNOWN_FILES:
                self._known.popitem(last=False)

    def _matches(self) -> Iterable[tuple[str, int]]:
        """Keys and sizes of what the pattern names; FormatError if a file that it names outright is missing."""
        named: list[str] = []
        folders: dict[str, list[re.Pattern[str]]] = {}
        for one in _braces(self.uri, self._key):
            if _MAGIC.search(one):
                folders.setdefault(_folder(one), []).append(_compiled(one))
            else:
                named.append(one)
        found = dict(self._sized(named))
        for folder, patterns in folders.items():
            for key, size in self._place.listed(folder):
                if any(pattern.fullmatch(key) for pattern in patterns):
                    found[key] = size
        if not found:
            raise FormatError(f"{self.uri}: no such file. Correct the set's `uri`.")
        return found.items()

    def _sized(self, keys: list[str]) -> Iterator[tuple[str, int]]:
        missing = []
        for key, size in self._place.sizes(keys):
            if size is None:
                missing.append(key.removeprefix(self._root))
            else:
                yield key, size
        if missing:
            raise FormatError(
                f"{self.uri}: {len(missing):,} of the {len(keys):,} files that it names are missing, such as "
                f"{missing[0]}. Get them, or correct the pattern: images must not be lost unnoticed."
            )

    def _file(self, found: tuple[str, int]) -> File:
        key, size = found
        path = key.removeprefix(self._root)
        try:
            refuse_path(path)
        except OSError as error:
            return File(path, 0, str(error))
        return File(path, size)


def _bucket(scheme: str, name: str, anonymous: bool) -> Place:
    return GoogleBucket(name, anonymous) if scheme == "gs" else Bucket(name, anonymous)


def refuse_address(uri: str) -> None:
    """FormatError if an address holds what nothing can use, names no host or bucket, or could be read in two ways."""
    said, scheme = public(uri), uri.partition("://")[0]
    if hidden(uri):
        raise FormatError(
            f"{said}: this is how an address with a password or signature is stored, without them. Give the whole "
            f"address in the set's `uri`."
        )
    try:
        parts = urlsplit(uri.replace("[", "_").replace("]", "_"))
    except ValueError:
        raise FormatError(f"{said}: not an address. Correct the set's `uri`.") from None
    if scheme not in WEB and said != uri:
        raise FormatError(
            f"{said}: an address of object storage must not hold a name, a password or a signature. Take them out; "
            f"credentials are found in their usual places. A signed address begins with https."
        )
    if said == f"{scheme}://{HIDDEN}":
        raise FormatError(f"{said}: not an address. In a password, write `/`, `?`, `#` and `@` as %2F, %3F, %23, %40.")
    if not parts.netloc.rpartition("@")[2] or _CONTROL.search(uri):
        raise FormatError(f"{said!r}: names no bucket or host, or holds control characters. Correct the set's `uri`.")
    if scheme in WEB and "#" in uri:
        raise FormatError(f"{said}: `#` begins what a server is not told. Leave it out, or write it as %23.")


def refuse_path(path: str) -> None:
    """OSError for a name that object stores allow and that nothing can open safely."""
    if any(part in ("", ".", "..") for part in path.split("/")) or _CONTROL.search(path):
        raise Gone("its name has empty parts, `.`, `..` or control characters; rename the object")


def _braces(uri: str, key: str) -> list[str]:
    """The keys or patterns that a key with `{a,b}` and `{0000..0031}` stands for."""
    import bracex

    try:
        return list(dict.fromkeys(bracex.iexpand(key, limit=MOST_FILES, keep_escapes=True)))
    except bracex.ExpansionLimitException as error:
        raise FormatError(f"{uri}: names more than {MOST_FILES:,} files. Use `*`, or a folder.") from error


def _folder(pattern: str) -> str:
    """The folder that holds everything that one pattern can name."""
    magic = _MAGIC.search(pattern)
    return pattern[: magic.start() if magic else len(pattern)].rpartition("/")[0]


def _compiled(pattern: str) -> re.Pattern[str]:
    """A glob pattern as a regular expression: `*` and `?` do not cross `/`, as in a shell."""
    parts = []
    for one in re.findall(r"\*+|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL):
        if one.startswith("*"):
            parts.append("[^/]*")
        elif one == "?":
            parts.append("[^/]")
        elif len(one) > 1:
            inside = one[1:-1].replace("\\", "\\\\")
            parts.append(f"(?!/)[{'^' + inside[1:] if inside.startswith('!') else inside}]")
        else:
            parts.append(re.escape(one))
    return re.compile("".join(parts), re.DOTALL)
