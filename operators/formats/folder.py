"""Image folders: `<identity>/<image>.jpg`, deeper nestings, or flat."""

from collections import Counter
from io import BufferedIOBase
from typing import TYPE_CHECKING

from operators.errors import FormatError
from operators.formats.listing import EXTENSIONS, Entry, Listing, identity_of
from operators.formats.reading import Reader
from operators.sources import File, LocalSource, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether any file is called as images are."""
    return any(ending(file.path) in EXTENSIONS for file in files)


def ending(path: str) -> str:
    """The ending of a file's name, in small letters, as `PurePath.suffix` has it."""
    name = path[path.rfind("/") + 1 :]
    at = name.rfind(".")
    return name[at:].lower() if 0 < at < len(name) - 1 else ""


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
        kind = ending(file.path)
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

    def read(self, place: str, version: str | None, limit: int) -> bytes:
        """The image at the path `place`, at most `limit` + 1 bytes of it; OSError as `open` raises it."""
        if isinstance(self.source, LocalSource):
            return self.source.read(place, limit)
        return super().read(place, version, limit)
