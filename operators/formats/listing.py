"""What a format finds in a set before any image is read, and the rules for names and labels that all formats share."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".pgm", ".ppm"})
"""What an image file may be called."""


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One record of a set: its key, the person's label, its size, or why it must not be read."""

    key: str
    """`/` separated, unique in the set: the image's name everywhere."""
    identity: str | None
    bytes: int
    """Of the encoded image or vector, as far as the listing says."""
    error: str | None = None
    place: str | None = None
    """Where its bytes are, for the format's own reader; None: the key says it."""
    attributes: Mapping[str, str] | None = None
    """Those that the configuration asks for (`attributes`), as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """All records of a set, and what else was there."""

    entries: Sequence[Entry]
    unlisted: Mapping[str, int]
    """Things that are no records, counted by kind (`.txt`, `linked folder`): reported, never read."""
    notes: Sequence[str] = field(default_factory=list)
    """What the user should know of how the set was read, one sentence each."""


def identity_of(rule: str, key: str, label: str | None, attributes: Mapping[str, str]) -> str | None:
    """The person's label of one record by the rule `identity` of the set's configuration.

    Parameters
    ----------
    rule
        `auto`: the record's own label if the form has one, else as `parent`; `label`: only the form's own; `parent`:
        the folders of the key; `none`; `attribute:NAME`: that attribute.
    key
        The record's key.
    label
        The label that the form itself holds for this record, if it has one.
    attributes
        All attributes that the record has.
    """
    if rule == "none":
        return None
    if rule.startswith("attribute:"):
        return attributes.get(rule.removeprefix("attribute:")) or None
    if rule == "label" or (rule == "auto" and label is not None):
        return label
    return key.rpartition("/")[0] or None


def name_fault(name: str) -> str | None:
    """Why a member's name must not be used, or None: absolute names, `..`, backslashes and control characters."""
    if name.isascii() and name.isprintable() and name and name[0] != "/" and ".." not in name and "\\" not in name:
        return None  # nearly all are as plain as that
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name:
        return "its name leads out of the archive"
    if not name or _CONTROL.search(name):
        return "its name is empty or holds control characters"
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            return "its name is not valid UTF-8"
    return None
