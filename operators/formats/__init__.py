"""Forms in which sets are published. Each is a module with two functions:

`listing(uri, identity) -> Listing`   names, labels and sizes of all images, cheaply and without decoding
`open_image(uri, key) -> BufferedReader`    one encoded image as a stream, so that readers can bound what they take

`FORMATS` is the closed list; the name of a format is written into every unit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader

from operators.errors import FormatError
from operators.formats import folder
from operators.formats.listing import Listing


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """The two functions of one form of publication."""

    listing: Callable[[str, str], Listing]
    open_image: Callable[[str, str], BufferedReader]


FORMATS: Mapping[str, Format] = {"folder": Format(listing=folder.listing, open_image=folder.open_image)}


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
