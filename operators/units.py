"""Units: pieces of a set of a few thousand images, named by their content, the grain of resume.

Cuts depend on the keys around them only, not on position (content-defined chunking as in LBFS, Muthitacharoen et al.,
SOSP 2001): an image added to a set changes the unit that it falls into and leaves the others, so that a new version of
a release is embedded only where it differs.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from operators.errors import FormatError


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One image of a set as listed: its name, label and digest, or why it could not be read."""

    key: str
    identity: str | None
    bytes: int
    digest: str | None
    error: str | None = None
    place: str | None = None
    version: str | None = None
    attributes: Mapping[str, str] | None = None


def cut(members: Iterable[Member], unit_images: int) -> Iterator[list[Member]]:
    """Split a set into units of about `unit_images` in key order; none is longer than twice that.

    Raises
    ------
    FormatError
        If two members have the same key.
    """
    ordered = sorted(members, key=lambda m: m.key)
    for key, count in Counter(member.key for member in ordered).items():
        if count > 1:
            raise FormatError(f"key {key!r} stands for {count} images; keys must be unique. Rename the others.")
    unit: list[Member] = []
    for member in ordered:
        unit.append(member)
        long_enough = len(unit) >= max(1, unit_images // 4)
        if len(unit) >= 2 * unit_images or (long_enough and _is_boundary(member.key, unit_images)):
            yield unit
            unit = []
    if unit:
        yield unit


def _is_boundary(key: str, unit_images: int) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % unit_images == 0


def unit_digest(unit: Iterable[Member]) -> str:
    """Name of a unit: SHA-256 over its members' keys, identities and content digests, 32 hex digits."""
    whole = hashlib.sha256()
    for member in unit:
        for field in (member.key, member.identity, member.digest, member.error):
            data = b"" if field is None else b"=" + field.encode()
            whole.update(len(data).to_bytes(8, "big") + data)
    return whole.hexdigest()[:32]
