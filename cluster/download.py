"""Files from elsewhere, such as weights, in a folder of this machine: whole and as pinned, or not at all.

`fetch` takes an address, a path or a file inside an installed package, and the SHA-256 that the content must have.
Bytes are gathered in `<file>.part`, which gets its name only when the digest is right; what a broken connection leaves
is resumed, by the next attempt or the next call. Only HTTPS is spoken and followed unless `Limits.schemes` says
otherwise. Nothing that identifies anyone is sent, and what follows `?` in an address is neither logged nor told.
"""

import fcntl
import hashlib
import http.client
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from importlib.util import find_spec
from pathlib import Path
from typing import IO, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from cluster.faults import ClusterError, StorageError
from cluster.storage import private_folder

log = logging.getLogger(__name__)

PACKAGE = "package:"
CHUNK_BYTES = 1 << 20
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be others a moment later."""
OK, PARTIAL, BEYOND = 200, 206, 416
UNPRINTABLE = re.compile(r"[\x00-\x20\x7f]")
RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a download may take."""

    schemes: tuple[str, ...] = ("https",)
    """Schemes of the address and of every redirect."""
    max_bytes: int = 4 << 30
    timeout_s: float = 30.0
    """Longest silence of the other side."""
    total_s: float = 3600.0
    """Longest time for the whole file."""
    attempts: int = 5
    pause_s: float = 1.0
    """Pause after the first failed attempt; it doubles from attempt to attempt."""


class _Broken(Exception):
    """An attempt failed in a way that another one may not."""


def fetch(source: str, sha256: str, cache: str | Path, limits: Limits | None = None) -> Path:
    """The file in `cache` with the content of `source`, fetched unless it is there.

    Parameters
    ----------
    source
        `https://...`, `package:NAME/path` for a file of an installed package (which is not imported), or a path.
    sha256
        Digest of the content, 64 hexadecimal digits.
    cache
        Folder for fetched files; made private (0700). A file is kept in it as `<digest>-<name>`.
    limits
        What it may take; None for the defaults.

    Raises
    ------
    ClusterError
        If the source is refused, cannot be reached, is too large or has another digest. It says what to do.
    StorageError
        If the folder cannot be written.
    """
    given, limits = sha256.lower(), limits or Limits()
    try:
        urlsplit(source)
    except ValueError as error:
        raise ClusterError(f"{source!r}: not an address ({error}). Correct it.") from error
    if not re.fullmatch("[0-9a-f]{64}", given):
        raise ClusterError(f"{_shown(source)}: the SHA-256 must be 64 hexadecimal digits. Got {sha256!r}.")
    folder = private_folder(Path(cache))
    target = folder / f"{given}-{_file_name(source)}"
    with _alone(target):
        if target.is_file() and _digest(target) == given:
            return target
        part = target.with_name(target.name + ".part")
        if _is_address(source):
            _download(source, part, target, given, limits)
        else:
            _copy(_local(source), part, limits.max_bytes)
        found = _digest(part)
        if found != given:
            part.unlink()
            raise ClusterError(
                f"{_shown(source)}: SHA-256 is {found}, pinned is {given}. What came was deleted. Correct the source, "
                f"or pin the digest of the file that you trust."
            )
        os.replace(part, target)
    log.info("%s: in place as %s", _shown(source), target)
    return target


def _download(url: str, part: Path, target: Path, sha256: str, limits: Limits) -> None:
    """Bring `part` to its full length, attempt after attempt."""
    _refuse_address(url, limits.schemes)
    deadline, reason = time.monotonic() + limits.total_s, ""
    for attempt in range(limits.attempts):
        if attempt:
            log.info("%s: %s; attempt %s of %s", _shown(url), reason, attempt + 1, limits.attempts)
            time.sleep(min(limits.pause_s * 2 ** (attempt - 1), max(0.0, deadline - time.monotonic())))
        try:
            return _attempt(url, part, limits, deadline)
        except _Broken as error:
            reason = str(error)
        if time.monotonic() >= deadline:
            break
    raise ClusterError(
        f"{_shown(url)}: cannot be fetched ({reason}). Run again to go on where it stopped. Without a connection: "
        f"fetch it elsewhere, check that its SHA-256 is {sha256}, and put it here as {target}."
    )


def _attempt(url: str, part: Path, limits: Limits, deadline: float) -> None:
    """One request for what `part` lacks, appended to it."""
    held = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": "unveil", "Accept-Encoding": "identity"} | ({"Range": f"bytes={held}-"} if held else {})
    request = Request(url, headers=headers)  # noqa: S310 - the scheme is one of limits.schemes
    try:
        with build_opener(_Redirects(limits.schemes)).open(request, timeout=limits.timeout_s) as answer:
            start, total = _span(answer.status, answer.headers, held)
            if start not in (0, held):
                part.unlink()
                raise _Broken(f"the server begins at byte {start}, asked for was {held}")
            _refuse_size(url, total, limits.max_bytes, part)
            with _open(part, "ab" if start else "wb") as file:
                size = _append(answer, file, start, limits.max_bytes, deadline)
            _refuse_size(url, size, limits.max_bytes, part)
    except HTTPError as error:
        with error:
            return _answered(url, error, part, held)
    except (URLError, OSError, ValueError, http.client.HTTPException) as error:
        raise _Broken(_reason(error)) from error
    if total is not None and size < total:
        raise _Broken(f"the connection ended after {size:,} of {total:,} bytes")


def _append(answer: http.client.HTTPResponse, file: IO[bytes], size: int, most: int, deadline: float) -> int:
    """Write the answer's body behind the `size` bytes of the file, until it has more than `most`; the new size."""
    while size <= most and (data := answer.read1(CHUNK_BYTES)):
        size += len(data)
        _write(file, data)
        if time.monotonic() >= deadline:
            raise _Broken("it took longer than Limits.total_s")
    return size


def _answered(url: str, error: HTTPError, part: Path, held: int) -> None:
    """Deal with a status that is an error: pass, if `part` is whole already; try again; or refuse."""
    if error.code == BEYOND and held:
        _, total = _span(error.code, error.headers, held)
        if total == held:
            return
        part.unlink()
        raise _Broken("what was left of an earlier download does not belong to the file") from error
    answer = f"the server answers {error.code} {_reason(error)}"
    if error.code in TRY_AGAIN:
        raise _Broken(answer) from error
    raise ClusterError(f"{_shown(url)}: {answer}. Correct the address.") from error


def _span(status: int, headers: Message, held: int) -> tuple[int, int | None]:
    """Where the body begins in the file, and the file's size where the server tells it."""
    if status in (PARTIAL, BEYOND):
        match = RANGE.fullmatch(headers.get("Content-Range", ""))
        if not match:
            return held, None
        return int(match[1] or held), int(match[2]) if match[2] != "*" else None
    length = headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to the allowed schemes only."""

    def __init__(self, schemes: tuple[str, ...]) -> None:
        self.schemes = schemes

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Request | None:
        """The request to go on with; ClusterError for a scheme that is not allowed."""
        try:
            _refuse_address(newurl, self.schemes)
        except ClusterError as error:
            fp.close()
            raise ClusterError(f"{_shown(req.full_url)}: redirects to where it must not. {error}") from error
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _refuse_address(url: str, schemes: tuple[str, ...]) -> None:
    parts = urlsplit(url)
    if parts.scheme.lower() not in schemes or not parts.hostname or UNPRINTABLE.search(url):
        raise ClusterError(f"{_shown(url)}: only {' and '.join(schemes)} addresses are fetched. Give such a one.")
    if "@" in parts.netloc:
        raise ClusterError(f"{_shown(url)}: an address must not hold a name and a password. Take them out.")


def _refuse_size(source: str, size: int | None, most: int, part: Path) -> None:
    if size is not None and size > most:
        part.unlink(missing_ok=True)
        raise ClusterError(
            f"{_shown(source)}: has more than {most:,} bytes, the limit. Correct it, or raise max_bytes."
        )


def _is_address(source: str) -> bool:
    return "://" in source


def _local(source: str) -> Path:
    """The path that a source without an address means."""
    if not source.startswith(PACKAGE):
        return Path(source)
    package, _, inside = source.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier() or not inside or ".." in Path(inside).parts or Path(inside).is_absolute():
        raise ClusterError(f"{source}: must be {PACKAGE}NAME/path, a path inside the top-level package NAME.")
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / inside).is_file():
            return path
    raise ClusterError(f"{source}: no such file in an installed package. Install {package}, or correct the path.")


def _copy(path: Path, part: Path, most: int) -> None:
    try:
        source = path.open("rb")
    except OSError as error:
        raise ClusterError(f"{path}: cannot be read ({error.strerror}). Correct the path.") from error
    with source, _open(part, "wb") as file:
        _refuse_size(str(path), os.fstat(source.fileno()).st_size, most, part)
        while data := source.read(CHUNK_BYTES):
            _write(file, data)


def _open(path: Path, mode: str) -> BinaryIO:
    """The file for writing, readable to its owner only; never one behind a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if mode == "ab" else os.O_TRUNC)
    try:
        return os.fdopen(os.open(path, flags, 0o600), "wb")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}). Choose another cache folder.") from error


def _write(file: IO[bytes], data: bytes) -> None:
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        raise StorageError(f"{file.name}: cannot be written ({error.strerror}). Free space there.") from error


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock of `target`: of several processes that fetch a file, one does and the others find it."""
    with _open(target.with_name(target.name + ".lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_name(source: str) -> str:
    """The last part of the source's path, of harmless characters."""
    path = unquote(urlsplit(source).path) if _is_address(source) else source
    return re.sub(r"[^\w.-]", "_", path.rstrip("/").rpartition("/")[2], flags=re.ASCII).lstrip(".")[-80:] or "file"


def _shown(source: str) -> str:
    """The source without what may be secret: name, password, query and fragment of an address."""
    if not _is_address(source):
        return source
    parts = urlsplit(source)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{UNPRINTABLE.sub('_', parts.path)}"


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, URLError) else error
    return (str(cause).splitlines() or [type(cause).__name__])[0]
