"""scan: list every set into units named by their content.

Every record is read once and hashed, not decoded. That costs about as much as copying the set, and buys names that
mean the same on every machine, after every download and in every form of publication: a new version of a release is
embedded only where its bytes differ. With `scan.rehash_days`, files that look untouched are not read again.
"""

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from operators.errors import FormatError
from operators.formats import SetConfig, listed, reader
from operators.formats.listing import Entry, Listing
from operators.formats.reading import Content, Reader
from operators.sources import LocalSource, absolute
from operators.tables import UNITS
from operators.units import Member, cut, unit_digest
from pipeline.catalogue import differences, entry
from pipeline.known_files import KnownFiles
from pipeline.progress import Progress
from pipeline.stage import Run, fingerprint
from pipeline.translated import BRIDGES, check_bridge, check_form, unit_names

log = logging.getLogger(__name__)

READERS = 8
"""Threads that read and hash."""

RUN = 256
"""Records that one thread reads one after another, so that neighbours in an archive are read in order."""


WHOLE = 2**24
"""Records of up to so many bytes are read in one piece; larger ones as a stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanConfig:
    """How sets are cut into units."""

    unit_images: int = 2048
    """Images of a unit on average: the grain of resume, and of memory (about 38 kB an image)."""
    rehash_days: float = 0.0
    """For so many days a file on this machine with the same path, size, times and inode is taken to hold the same
    bytes, and not read again (`unveil watch` sets it). 0: every file is read every time."""

    def __post_init__(self) -> None:
        if not 1 <= self.unit_images <= 65536:
            raise ValueError(f"unit_images must be between 1 and 65536. Got {self.unit_images}.")
        if not self.rehash_days >= 0:
            raise ValueError(f"rehash_days must not be negative. Got {self.rehash_days}.")


def scan(run: Run) -> None:
    """List all sets and commit a `units` table for each; a set that has not changed keeps its table."""
    scan_sets(run, list(run.config.sets.listed()))
    if run.config.sets.foreign():
        check_bridge(run)


def scan_sets(run: Run, roles: Sequence[str]) -> None:
    """List some of the sets."""
    with run.timed("scan") as facts:
        digests: dict[str, str] = {}
        seen: dict[str, set[str]] = {}
        for role in roles:
            chosen = run.config.sets.listed()[role]
            form, listing = listed(chosen)
            check_form(run, role, form)
            log.info("scan: %s is of the form %s%s", role, form, "" if chosen.format != "auto" else ", by its content")
            known = KnownFiles(run.embeddings.child("listings"), chosen, form, run.config.scan.rehash_days)
            units = list(cut(_members(role, chosen, form, listing, known), run.config.scan.unit_images))
            names = unit_names(run, role, [unit_digest(unit) for unit in units])
            digests[role] = fingerprint(names)
            facts[role] = _facts(form, units, listing)
            if chosen.catalogue is not None:
                found = {name: facts[role][name] for name in ("images", "identities")}
                facts[role]["notes"] += differences(entry(chosen.catalogue), **found, format=form)
            for note in facts[role]["notes"]:
                log.warning("scan: %s: %s", role, note)
            seen[role] = {member.key for unit in units for member in unit}
            _refuse_shared(run, role, seen)
            _commit(run, role, chosen, units, names, facts[role])
        run.ledger.datasets(digests)


def _refuse_shared(run: Run, role: str, seen: dict[str, set[str]]) -> None:
    """FormatError if a record of this set is a record of another set too, as list files of one place can name it."""
    sets = run.config.sets.listed()
    for other, keys in seen.items():
        if {other, role} in ({role}, set(BRIDGES)):  # itself, or the same faces
            continue
        if absolute(sets[other].uri) == absolute(sets[role].uri) and keys & seen[role]:
            raise FormatError(
                f"sets.{other} and sets.{role} share {len(keys & seen[role]):,} images of "
                f"{absolute(sets[role].uri)}: a set compared with itself finds itself. Correct their list files."
            )


def _commit(
    run: Run, role: str, chosen: SetConfig, units: list[list[Member]], names: list[str], facts: dict[str, object]
) -> None:
    table = _table(role, chosen, str(facts["form"]), units, names)
    key = fingerprint(UNITS.contract, _digest(table), facts)
    earlier = run.store.child("scan").find(role)
    counts = f"{facts['images']:,} images in {len(units):,} units"
    if earlier is not None and earlier.key == key:
        log.info("scan: %s unchanged, %s", role, counts)
        return
    run.save("scan", role, UNITS, table, key=key, **facts)
    log.info("scan: %s, %s", role, counts)


def _digest(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def _members(role: str, chosen: SetConfig, form: str, listing: Listing, known: KnownFiles) -> "Iterator[Member]":
    """The set's records with their digests, in listing order."""
    progress = Progress(f"scan {role}", len(listing.entries), "images")
    hashing = _Hashing(chosen, form, known)
    runs = [listing.entries[at : at + RUN] for at in range(0, len(listing.entries), RUN)]
    with ThreadPoolExecutor(READERS) as readers:
        for members in readers.map(hashing, runs):
            progress.add(len(members), sum(member.error is not None for member in members))
            yield from members
    hashing.close()
    known.keep()
    progress.end()
    if known.taken:
        log.info("scan: %s: %s files look as they did and were not read again", role, f"{known.taken:,}")


class _Hashing:
    """Reads and hashes records, with a reader of its own in each thread."""

    def __init__(self, chosen: SetConfig, form: str, known: KnownFiles) -> None:
        self._chosen, self._form, self._known = chosen, form, known
        self._own = threading.local()
        self._all: list[Reader] = []

    def __call__(self, entries: Sequence[Entry]) -> list[Member]:
        """The records with their digests, or why they could not be read."""
        if not hasattr(self._own, "reader"):
            self._own.reader = reader(self._form, self._chosen.uri, self._chosen.anonymous)
            self._all.append(self._own.reader)
        opened: Reader = self._own.reader
        if self._known.on or not isinstance(opened.source, LocalSource):  # each record's file is asked for its state
            return [_member(opened, entry, self._known) for entry in entries]
        found = zip(entries, opened.each(entries, WHOLE), strict=True)
        return [_at_once(opened, entry, data, self._known) for entry, data in found]

    def close(self) -> None:
        """Close the files of all threads."""
        for one in self._all:
            one.close()


def _at_once(opened: Reader, entry: Entry, data: Content, known: KnownFiles) -> Member:
    """A record of which `data` were read among others."""
    if entry.error is not None:
        return _made(entry, None, None, entry.error)
    if isinstance(data, OSError):
        return _made(entry, None, None, f"cannot be read: {data.strerror or data}")
    if max(len(data), entry.bytes) > WHOLE:
        return _member(opened, entry, known)
    return _made(entry, hashlib.sha256(data).hexdigest(), None, None)


def _member(opened: Reader, entry: Entry, known: KnownFiles) -> Member:
    digest, version, error = None, None, entry.error
    if error is None:
        place = entry.place or entry.key
        try:
            version = opened.version(place)
            digest = known.digest(opened, place)
            if digest is None:
                digest = _digest_of(opened, place, version, entry.bytes)
                known.learn(opened, place, digest)
        except OSError as fault:
            error = f"cannot be read: {fault.strerror or fault}"
    return _made(entry, digest, version, error)


def _made(entry: Entry, digest: str | None, version: str | None, error: str | None) -> Member:
    return Member(
        key=entry.key,
        identity=entry.identity,
        bytes=entry.bytes,
        digest=digest,
        error=error,
        place=entry.place,
        version=version,
        attributes=entry.attributes,
    )


def _digest_of(opened: Reader, place: str, version: str | None, size: int) -> str:
    """SHA-256 of a record listed as `size` bytes, which may not be true; a large one is not held in memory."""
    if size <= WHOLE:
        data = opened.read(place, version, WHOLE)
        if len(data) <= WHOLE:
            return hashlib.sha256(data).hexdigest()
    with opened.open(place, version) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _facts(form: str, units: Sequence[Sequence[Member]], listing: Listing) -> dict[str, Any]:
    members = [member for unit in units for member in unit]
    digests = Counter(member.digest for member in members if member.digest is not None)
    return {
        "form": form,
        "images": len(members),
        "bytes": sum(member.bytes for member in members),
        "identities": len({member.identity for member in members} - {None}),
        "equal_to_another": sum(count for count in digests.values() if count > 1),
        "unlisted": dict(listing.unlisted),
        "notes": list(listing.notes),
    }


def _table(role: str, chosen: SetConfig, form: str, units: list[list[Member]], names: list[str]) -> pa.Table:
    rows, first = [], 0
    for name, unit in zip(names, units, strict=True):
        row = {
            "set": role,
            "uri": absolute(chosen.uri),
            "format": form,
            "anonymous": chosen.anonymous,
            "unit": name,
            "first_row": first,
        }
        rows.append(row | {"members": [_row(member) for member in unit]})
        first += len(unit)
    return UNITS.from_rows(rows)


def _row(member: Member) -> dict[str, object]:
    kept = {name: getattr(member, name) for name in ("key", "identity", "bytes", "digest", "error", "place", "version")}
    return kept | {"attributes": list((member.attributes or {}).items())}
