"""Image folders: `<identity>/<image>.jpg`, deeper nestings, or flat."""

from collections import Counter
from io import BufferedIOBase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from operators.errors import FormatError
from operators.formats.listing import EXTENSIONS, Entry, Listing, identity_of
from operators.formats.reading import Reader
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether any file is called as images are."""
    return any(PurePosixPath(file.path).suffix.lower() in EXTENSIONS for file in files)


def listing(source: Source, options: "SetConfig") -> Listing:
    """All image files of the source; the label is the folder that holds the image, or none at the top.

    Raises
    ------
    FormatError
        If the folder is missing or holds no image file.
    """
    unlisted: Counter[str] = Counter()
    entries = []
    for file in source.files():
        kind = PurePosixPath(file.path).suffix.lower()
        if kind in EXTENSIONS:
            identity = identity_of(options.identity, file.path, None, {})
            entries.append(Entry(key=file.path, identity=identity, bytes=file.size, error=file.error))
        else:
            unlisted[kind or "no extension"] += 1
    if not entries:
        raise FormatError(
            f"{source.uri}: no image file ({', '.join(sorted(EXTENSIONS))}) in this folder. Correct the set's `uri`."
        )
    unlisted["linked folder"] += source.linked_folders()
    return Listing(entries=entries, unlisted=dict(sorted((+unlisted).items())))


class FolderReader(Reader):
    """Opens image files."""

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """The image at the path `place`; OSError if it is gone, changed, or no regular file inside the folder."""
        return self.source.open(place, version)
