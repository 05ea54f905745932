"""What a format finds in a set before any image is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One image of a set: its key, the person's label, its size, or why it must not be read."""

    key: str
    identity: str | None
    bytes: int
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """All images of a set, and what else was there."""

    entries: Sequence[Entry]
    unlisted: Mapping[str, int]
    """Things that are not images by their name, counted by kind (`.txt`, `linked folder`): reported, never read."""
