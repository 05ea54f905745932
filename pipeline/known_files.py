"""Digests of records whose files look as they did when they were hashed.

A file that has the path, size, times and inode that it had is taken to hold the same bytes for `scan.rehash_days`
days; an object in object storage, if its ETag is the same. The kernel sets the time of the last change of an inode
(ctime) itself, so a write shows even where a program restores the time of the last modification. What does not show:
bytes that went bad on the disk, writes past the file system (to its device, or by a machine whose clock is behind), and
file systems that keep no such times.
"""

import os
import threading
import time
from pathlib import Path

import pyarrow as pa

from cluster.storage import Store
from operators.formats import SetConfig
from operators.formats.reading import Reader
from operators.sources import LocalSource, Source, absolute, open_source
from operators.tables import Table
from pipeline.stage import fingerprint

KNOWN = Table(
    name="known",
    version=1,
    schema=pa.schema(
        [
            pa.field("place", pa.string()),
            pa.field("digest", pa.string()),
            pa.field("stamp", pa.string()),  # of the file: size, times and inode
            pa.field("hashed_s", pa.int64()),  # since 1970, UTC
        ]
    ),
)

YOUNG_NS = 2_000_000_000
"""A file changed so shortly before it was hashed could be changed again within the grain of its times."""
DAY_S = 86_400
MOST_REMOTE = 10_000
"""Objects of a set that are asked for their ETags one by one; of larger ones every record is looked at."""


class KnownFiles:
    """What is known of the records of one set. Threads may share it."""

    def __init__(self, store: Store, chosen: SetConfig, form: str, rehash_days: float) -> None:
        """Read what was known when the set was last listed, if it may be used at all."""
        self._store, self._name = store, fingerprint(absolute(chosen.uri), form)
        self._since = time.time() - rehash_days * DAY_S
        self._now = int(time.time())
        self._old: dict[str, tuple[str, str, int]] = {}
        self._new: list[tuple[str, str, str, int]] = []
        self._stamps: dict[str, str | None] = {}
        self._lock = threading.Lock()
        self.on = rehash_days > 0
        self.taken = 0
        """Records whose digest was known."""
        made = store.find(self._name) if self.on else None
        if made is not None and made.contract == KNOWN.contract:
            columns = [store.read(self._name)[name].to_pylist() for name in KNOWN.schema.names]
            self._old = {place: rest for place, *rest in zip(*columns, strict=True)}  # type: ignore[misc]

    def digest(self, reader: Reader, place: str) -> str | None:
        """The digest of a record if its file looks as it did."""
        if not self.on:
            return None
        stamp = self._stamp(reader, place)
        digest, was, hashed_s = self._old.get(place, ("", "", 0))
        if stamp is None or stamp != was or not self._since <= hashed_s <= self._now:  # later: by a clock put back
            return None
        with self._lock:
            self._new.append((place, digest, stamp, hashed_s))
            self.taken += 1
        return digest

    def learn(self, reader: Reader, place: str, digest: str) -> None:
        """Remember a digest that was made after `digest` was asked for it."""
        stamp = self._stamps.get(reader.path(place)) if self.on else None
        if stamp is not None:
            with self._lock:
                self._new.append((place, digest, stamp, self._now))

    def keep(self) -> None:
        """Write down what is known now."""
        if self.on and self._new:
            columns = [list(column) for column in zip(*sorted(self._new), strict=True)]
            table = pa.table(columns, schema=KNOWN.schema)
            self._store.commit(self._name, table, contract=KNOWN.contract, key=self._name)

    def _stamp(self, reader: Reader, place: str) -> str | None:
        path = reader.path(place)
        if path not in self._stamps:
            self._stamps[path] = stamp(reader.source, path)
        return self._stamps[path]


def stamp(source: Source, path: str) -> str | None:
    """What a file of a set shows of its state without being read; None if it changed just now, or shows nothing.

    Raises
    ------
    OSError
        If it is gone.
    """
    if not isinstance(source, LocalSource):
        version = source.version(path)
        return None if version is None else f"etag {version}"
    found = os.stat(source.root / path)
    if max(found.st_mtime_ns, found.st_ctime_ns) > time.time_ns() - YOUNG_NS:
        return None
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def set_stamp(chosen: SetConfig) -> str | None:
    """Digest of how all files of a set, and its list file, look; None if that says too little, or takes too long.

    Raises
    ------
    FormatError
        If the set is missing or cannot be listed.
    """
    source = open_source(chosen.uri, chosen.anonymous)
    stamps = []
    try:
        if chosen.list_file is not None:
            stamps.append(("", stamp(LocalSource(chosen.list_file), Path(chosen.list_file).resolve().name)))
        for file in source.files():
            if len(stamps) > MOST_REMOTE and not isinstance(source, LocalSource):
                return None
            stamps.append((file.path, "" if file.error else stamp(source, file.path)))
    except OSError:
        return None
    return None if any(one is None for _, one in stamps) else fingerprint(sorted(stamps))
