"""Buckets of S3, and of whatever speaks its protocol, through `pyarrow.fs`.

`pyarrow.fs` asks for an object's metadata when it opens it, and for ranges of it afterwards, without naming its ETag.
So every request for a range of a larger object is followed by one for its metadata: the ETag being what it was, the
range is of the same state. An object that comes with one request is of one state anyway.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa

from operators.remote_faults import Gone, Passing, changed, persistently, understood
from operators.remote_streams import WHOLE_BYTES, Remote

TIMEOUT_S = 20.0
"""Longest silence of the other side."""
TRIES = 3
"""Attempts of the library itself within one of ours."""
ASKING = 16
"""Requests at once while listing."""
FEW = 16
"""So many sub-folders are looked into one after another; more are listed whole, several at once."""

Result = TypeVar("Result")

Found = tuple[str, int]
"""Key and size of an object."""


def sizes(ask: Callable[[str], int | None], keys: Sequence[str]) -> Iterator[tuple[str, int | None]]:
    """Each key with what `ask` says of it, `ASKING` requests at once."""
    with ThreadPoolExecutor(ASKING) as pool:
        yield from zip(keys, pool.map(ask, keys), strict=True)


def size_of(opened: Callable[[str], Remote], key: str) -> int | None:
    """Size of what `opened` opens, or None where there is nothing of this key."""
    try:
        return opened(key).size
    except Gone:
        return None


class Bucket:
    """The objects of one bucket, to be listed and read."""

    def __init__(self, name: str, anonymous: bool) -> None:
        """Prepare for requests and make none.

        Parameters
        ----------
        name
            The bucket's.
        anonymous
            Whether to ask without credentials. Otherwise the library looks for them in their usual places.
        """
        self.name, self.shown = name, f"s3://{name}"
        self._files = _amazon(anonymous)

    def sizes(self, keys: Sequence[str]) -> Iterator[tuple[str, int | None]]:
        """Each key with the size of its object, None where there is no such object; one request each."""
        return sizes(self.size, keys)

    def size(self, key: str) -> int | None:
        """Size of an object, or None if there is none of this key."""
        return size_of(self.open, key)

    def open(self, key: str) -> "Object":
        """The object as it is now.

        Raises
        ------
        Gone
            If there is no such object.
        FormatError
            If the place refuses or does not answer.
        """
        return Object(self, key)

    def listed(self, folder: str) -> Iterator[Found]:
        """All objects whose keys begin with `folder/` (all, if it is empty), without the placeholders of folders.

        A folder of folders is listed by folders, several at once: that is faster than page after page, and at no time
        is more in memory than what these hold.
        """
        infos = self._infos(folder, recursive=False)
        base = self._path(folder)
        folders = [info.path for info in infos if not info.is_file]
        if base in (path.rstrip("/") for path in folders):  # its placeholder, or keys with `//`, which only this finds
            yield from self._objects(self._infos(folder, recursive=True))
            return
        yield from self._objects(infos)
        inside = [path.removeprefix(self.name).strip("/") for path in folders]
        if len(inside) <= FEW:
            for one in inside:
                yield from self.listed(one)
            return
        with ThreadPoolExecutor(ASKING) as pool:
            for some in _ahead(pool, partial(self._infos, recursive=True), inside):
                yield from self._objects(some)

    def asked(self, action: Callable[[], Result]) -> Result:
        """What `action` returns, with the library's errors understood and passing ones tried again."""

        def once() -> Result:
            try:
                return action()
            except (Passing, Gone):
                raise
            except OSError as error:
                raise understood(error, self.shown) from None
            except pa.ArrowInvalid as error:
                raise Gone("its key cannot be asked for (empty parts, `.` or `..`); rename the object") from error

        return persistently(once, self.shown)

    def handle(self, key: str) -> Any:
        """The library's file; one request."""
        return self._files.open_input_file(self._path(key))

    def _infos(self, folder: str, recursive: bool) -> list[Any]:
        from pyarrow.fs import FileSelector

        wanted = FileSelector(self._path(folder), recursive=recursive)
        try:
            found: list[Any] = self.asked(lambda: self._files.get_file_info(wanted))
        except Gone:
            return []
        return found

    def _objects(self, infos: list[Any]) -> Iterator[Found]:
        """Keys and sizes of the objects; the list is used up, for it can be long."""
        infos.reverse()
        while infos:
            info = infos.pop()
            if info.is_file and not (info.size == 0 and info.path.endswith("_$folder$")):
                yield info.path[len(self.name) + 1 :], info.size

    def _path(self, key: str) -> str:
        return f"{self.name}/{key}" if key else self.name


class Object:
    """One state of an object, opened; a `Remote`."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket, self._key = bucket, key
        self._file = bucket.asked(lambda: bucket.handle(key))
        self.size = int(self._file.size())
        self.etag = etag_of(self._file)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes of this state; Gone, FormatError."""
        return self._bucket.asked(lambda: self._once(offset, size))

    def _once(self, offset: int, size: int) -> bytes:
        """The bytes of one request, or of two.

        The library takes an answer shorter than asked for as if it were whole, and leaves the rest of the buffer as it
        was. So the last byte is set before: if it is the same afterwards, another value must be overwritten too.
        """
        for mark in (0x5A, 0xA5):
            data = bytearray(size)
            data[-1] = mark
            try:
                self._file.seek(offset)
                came = self._file.readinto(data)
            except OSError:
                self._still()  # tells better what is wrong: the library loses the reasons of answers to short requests
                raise
            if came == size and data[-1] != mark:
                break
            self._still()
        else:
            raise Passing(f"fewer than {size:,} bytes came")
        if self.size > WHOLE_BYTES:
            self._still()
        return bytes(data)

    def _still(self) -> None:
        """Gone if the object is not there any more or has another ETag."""
        now = self._bucket.handle(self._key)
        if etag_of(now) != self.etag or now.size() != self.size:
            raise changed(self.etag, etag_of(now))
        self._file = now


def etag_of(file: Any) -> str | None:
    """The ETag in the metadata of an opened object, without its quotes."""
    metadata = {str(key).lower(): bytes(value) for key, value in (file.metadata() or {}).items()}
    found = metadata.get("etag")
    return found.decode("utf-8", "replace").strip('"') if found else None


def _amazon(anonymous: bool) -> Any:
    """S3 as the environment names it. The library knows AWS_REGION and the rest, but not the endpoint's variables."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    parts = urlsplit(endpoint)
    return S3FileSystem(
        anonymous=anonymous,
        scheme=parts.scheme or "https",
        endpoint_override=endpoint.partition("://")[2].rstrip("/") or None,
        request_timeout=TIMEOUT_S,
        connect_timeout=TIMEOUT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=TRIES),
    )


def _ahead(pool: ThreadPoolExecutor, action: Callable[[str], Result], items: Iterable[str]) -> Iterator[Result]:
    """What `action` makes of the items, in order, with no more than twice `ASKING` of them done or begun ahead."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(action, item))
        if len(waiting) >= 2 * ASKING:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
