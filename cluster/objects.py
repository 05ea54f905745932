"""A prefix in object storage as a folder of small files that are written whole: `s3://bucket/prefix`, `gs://...`.

An object appears when all of it is there, or not at all, and one of the same name is replaced at once: that is all that
committing needs (`cluster.storage`). Credentials, region and endpoint are found where the libraries look for them
(AWS_*, ~/.aws, GOOGLE_APPLICATION_CREDENTIALS, the machine's role). No access list is set: objects have the bucket's.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cluster.faults import StorageError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

SCHEMES = ("s3", "gs")
ATTEMPTS = 5
PAUSE_S = 0.5
"""Pause after the first failed attempt; it doubles from attempt to attempt, and a random part spreads workers."""
TIMEOUT_S = 20.0
"""Longest silence of the other side."""
TRIES = 3
"""Attempts of the library itself within one of ours."""

_CODE = re.compile(r"AWS Error (?!UNKNOWN)(\w+)|HTTP status (\d+)|ExceptionName: (\w+)|Status\((\w+)")
_PASSING = re.compile(
    "NETWORK_CONNECTION|SLOW_DOWN|SlowDown|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL|REQUEST_TIMEOUT|UNAVAILABLE|"
    "DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|408|425|429|5\\d\\d"
)


class _Short(OSError):
    """An answer was shorter than asked for."""


class ObjectFolder:
    """The objects directly below one prefix."""

    def __init__(self, address: str) -> None:
        """Look at the address, and make no request.

        Raises
        ------
        StorageError
            If it is not a prefix of object storage, or holds credentials.
        """
        parts = urlsplit(address)
        if parts.scheme not in SCHEMES or not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
            shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
            raise StorageError(
                f"{shown}: tables are kept in a folder, or under s3://bucket/prefix or gs://bucket/prefix without a "
                f"name, password or `?`. Correct the address."
            )
        self.address = address.rstrip("/")
        self._scheme = parts.scheme
        self._base = f"{parts.netloc}{parts.path}".rstrip("/")

    def put(self, name: str, data: bytes) -> None:
        """Write or replace an object; StorageError if it cannot be written."""

        def once() -> None:
            file = _files(self._scheme).open_output_stream(f"{self._base}/{name}")
            file.write(data)
            file.close()

        self._tried(once, f"{self.address}/{name}", "written")

    def get(self, name: str) -> bytes:
        """The object's bytes; FileNotFoundError if there is none, StorageError if it cannot be read."""
        return self._tried(lambda: self._read(name), f"{self.address}/{name}", "read")

    def delete(self, name: str) -> None:
        """Remove an object if it is there."""
        try:
            self._tried(
                lambda: _files(self._scheme).delete_file(f"{self._base}/{name}"), f"{self.address}/{name}", "deleted"
            )
        except FileNotFoundError:
            return

    def names(self) -> Iterator[tuple[str, float]]:
        """Names of all objects directly below the prefix, and when each was written, in seconds since 1970."""
        from pyarrow.fs import FileSelector

        wanted = FileSelector(self._base, recursive=False, allow_not_found=True)
        for info in self._tried(lambda: _files(self._scheme).get_file_info(wanted), self.address, "listed"):
            if info.is_file:
                yield info.base_name, (info.mtime_ns or 0) / 1e9

    def _read(self, name: str) -> bytes:
        """The bytes of one state of the object.

        The library takes an answer shorter than asked for (the object was replaced by a smaller one in between) as if
        it were whole, and leaves the rest of the buffer as it was: so the last byte is set before.
        """
        if self._scheme == "gs":  # which reads in order only without delay, and checks what came
            with _files("gs").open_input_stream(f"{self._base}/{name}") as file:
                return bytes(file.read())
        for mark in (0x5A, 0xA5):
            with _files(self._scheme).open_input_file(f"{self._base}/{name}") as file:
                data = bytearray(file.size())
                if not data:
                    return b""
                data[-1] = mark
                if file.readinto(data) == len(data) and data[-1] != mark:
                    return bytes(data)
        raise _Short("the answer was shorter than asked for")

    def _tried(self, action: Callable[[], Result], place: str, what: str) -> Result:
        """What `action` returns, tried again after faults that may pass."""
        shown = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                log.info("%s: %s; attempt %s of %s", place, shown, attempt + 1, ATTEMPTS)
                time.sleep(PAUSE_S * 2 ** (attempt - 1) * random.uniform(1, 1.25))
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:  # its text is not passed on: it can hold account names and signed requests
                codes = {code for groups in _CODE.findall(str(error)) for code in groups if code}
                shown = ", ".join(sorted(codes)) or type(error).__name__
                if not isinstance(error, _Short) and not any(_PASSING.fullmatch(code) for code in codes):
                    break
        raise StorageError(
            f"{place}: cannot be {what} ({shown}). Check the bucket's name and region (AWS_REGION), the network and "
            f"endpoint, and that the credentials may read, write, list and delete there; then run again: it goes on "
            f"where it stopped."
        ) from None


@cache
def _files(scheme: str) -> Any:
    """The library's file system, one in each process."""
    return connected(scheme)


def connected(scheme: str) -> Any:
    """A new file system of `pyarrow.fs`; it knows AWS_REGION and the rest, but not the variables of the endpoint."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, GcsFileSystem, S3FileSystem

    if scheme == "gs":
        return GcsFileSystem(retry_time_limit=timedelta(seconds=TIMEOUT_S))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return S3FileSystem(
        scheme=endpoint.partition("://")[0] or "https",
        endpoint_override=endpoint.partition("://")[2].rstrip("/") or None,
        request_timeout=TIMEOUT_S,
        connect_timeout=TIMEOUT_S,
        allow_delayed_open=True,  # one request for an object, not three
        background_writes=False,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=TRIES),
    )
