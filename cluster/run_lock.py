"""One driver at a time in a folder: a lock that the kernel lets go of when its holder ends, however it ends.

Commits are idempotent, so two drivers would not damage a table. But one could withdraw a marker that the other is about
to read, and either would stop in the middle. On a shared file system the lock holds between machines too: NFS turns it
into a lock of the server, and Lustre needs the mount option `flock`. Where a file system knows no locks, a warning says
so.
"""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cluster.faults import FolderInUse, StorageError

log = logging.getLogger(__name__)

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system without locks answers."""

_held: dict[Path, tuple[int, int]] = {}
"""Descriptor of the lock of each folder that this process holds, and how often it does."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which exists; the same process may hold it several times.

    Raises
    ------
    FolderInUse
        If another process holds it; names its pid, host, and since when.
    StorageError
        If the lock file cannot be made.
    """
    place = folder.resolve()
    file, times = _held.get(place) or (_taken(place), 0)
    _held[place] = file, times + 1
    try:
        yield
    finally:
        file, times = _held.pop(place)
        if times > 1:
            _held[place] = file, times - 1
        else:
            os.close(file)  # the file stays: removing it would let a third process lock a new one beside the second


def _taken(folder: Path) -> int:
    """A descriptor that holds the lock; it is closed in programs that this process starts."""
    path = folder / LOCK
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)  # it is emptied: no link to another file
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}). Choose another `out` or change its permissions."
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_about()).encode() + b"\n", 0)
    except BlockingIOError:
        holder = _holder(file)
        os.close(file)
        raise FolderInUse(
            f"{folder}: in use by {holder}. Wait until it ends, or stop it, and run the same command again; "
            f"to audit in another folder at the same time, give another `out`."
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:  # the lock is held; who holds it stays untold
            return file
        if error.errno not in NO_LOCKS:
            os.close(file)
            raise StorageError(f"{path}: cannot be locked ({error.strerror}). Choose another `out`.") from error
        log.warning("%s: this file system knows no locks. Take care that no second run writes there.", folder)
    return file


def _about() -> dict[str, str | int]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _holder(file: int) -> str:
    """Who holds the lock, in words; it may be too young to have said so."""
    try:
        about = json.loads(os.pread(file, 4096, 0))
        return f"process {int(about['pid'])} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
