"""Forms in which sets are published. Each is a module with two functions:

`listing(uri, identity) -> Listing`   names, labels and sizes of all images, cheaply and without decoding
`read(uri, key) -> bytes`             one encoded image

`FORMATS` is the closed list; the name of a format is written into every unit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from operators.errors import FormatError
from operators.formats import folder
from operators.formats.listing import Listing


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """The two functions of one form of publication."""

    listing: Callable[[str, str], Listing]
    read: Callable[[str, str], bytes]


FORMATS: Mapping[str, Format] = {"folder": Format(listing=folder.listing, read=folder.read)}


@dataclass(frozen=True, kw_only=True, slots=True)
class SetConfig:
    """One set of the audit."""

    uri: str
    """Where the set is: a folder of images."""
    format: str = "folder"
    """Form of publication; only `folder` so far."""
    identity: str = "parent"
    """Where a person's label comes from: `parent` (the folder that holds the image) or `none`."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}. Got {self.format!r}.")
        if self.identity not in ("parent", "none"):
            raise ValueError(f"identity must be 'parent' or 'none'. Got {self.identity!r}.")


def form(name: str) -> Format:
    """The format called `name`; FormatError if there is none."""
    if name not in FORMATS:
        raise FormatError(f"format {name!r} is not known. Use one of: {', '.join(FORMATS)}.")
    return FORMATS[name]
