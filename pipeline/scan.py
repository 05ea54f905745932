"""scan: list every set into units named by their content.

Every file is read once and hashed, not decoded. That costs about as much as copying the set, and buys names that mean
the same on every machine and after every download: a new version of a release is embedded only where its bytes differ.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from operators.formats import FORMATS, SetConfig
from operators.formats.listing import Entry, Listing
from operators.tables import UNITS
from operators.units import Member, cut, unit_digest
from pipeline.progress import Progress
from pipeline.stage import Run, fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

READERS = 8
"""Threads that read and hash."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanConfig:
    """How sets are cut into units."""

    unit_images: int = 2048
    """Images of a unit on average: the grain of resume, and of memory (about 38 kB an image)."""

    def __post_init__(self) -> None:
        if not 1 <= self.unit_images <= 65536:
            raise ValueError(f"unit_images must be between 1 and 65536. Got {self.unit_images}.")


def scan(run: Run) -> None:
    """List all sets and commit a `units` table for each; a set that has not changed keeps its table."""
    with run.timed("scan") as facts:
        digests = {}
        for role, chosen in run.config.sets.given().items():
            listing = FORMATS[chosen.format].listing(chosen.uri, chosen.identity)
            units = list(cut(_members(role, chosen, listing), run.config.scan.unit_images))
            names = [unit_digest(unit) for unit in units]
            digests[role] = fingerprint(names)
            facts[role] = _facts(units, listing)
            _commit(run, role, chosen, units, names, facts[role])
        run.ledger.datasets(digests)


def _commit(
    run: Run, role: str, chosen: SetConfig, units: list[list[Member]], names: list[str], facts: dict[str, object]
) -> None:
    key = fingerprint(UNITS.contract, asdict(chosen), names, facts)
    earlier = run.store.child("scan").find(role)
    counts = f"{facts['images']:,} images in {len(units):,} units"
    if earlier is not None and earlier.key == key:
        log.info("scan: %s unchanged, %s", role, counts)
        return
    run.save("scan", role, UNITS, _table(role, chosen, units, names), key=key, **facts)
    log.info("scan: %s, %s", role, counts)


def _members(role: str, chosen: SetConfig, listing: Listing) -> "Iterator[Member]":
    """The set's images with their digests, in listing order."""
    progress = Progress(f"scan {role}", len(listing.entries), "images")
    with ThreadPoolExecutor(READERS) as readers:
        for member in readers.map(lambda entry: _member(chosen, entry), listing.entries):
            progress.add(1, member.error is not None)
            yield member
    progress.end()


def _member(chosen: SetConfig, entry: Entry) -> Member:
    digest, error = None, entry.error
    if error is None:
        try:
            with FORMATS[chosen.format].open_image(chosen.uri, entry.key) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as fault:
            error = f"cannot be read: {fault.strerror or fault}"
    return Member(key=entry.key, identity=entry.identity, bytes=entry.bytes, digest=digest, error=error)


def _facts(units: Sequence[Sequence[Member]], listing: Listing) -> dict[str, object]:
    members = [member for unit in units for member in unit]
    return {
        "images": len(members),
        "bytes": sum(member.bytes for member in members),
        "identities": len({member.identity for member in members} - {None}),
        "unlisted": dict(listing.unlisted),
    }


def _table(role: str, chosen: SetConfig, units: list[list[Member]], names: list[str]) -> pa.Table:
    rows, first = [], 0
    for name, unit in zip(names, units, strict=True):
        row = {
            "set": role,
            "uri": os.path.abspath(chosen.uri),
            "format": chosen.format,
            "unit": name,
            "first_row": first,
        }
        rows.append(row | {"members": [asdict(member) for member in unit]})
        first += len(unit)
    return UNITS.from_rows(rows)
