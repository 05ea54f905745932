"""Image folders: `<identity>/<image>.jpg`, deeper nestings, or flat."""

from collections import Counter
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from typing import TYPE_CHECKING

from operators.errors import FormatError
from operators.formats.listing import EXTENSIONS, Entry, Lazy, Listing, ending, identity_of, named_as_image, part_of
from operators.formats.reading import Content, Reader
from operators.sources import File, LocalSource, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether any file is called as images are."""
    return any(named_as_image(file.path) for file in files)


def listing(source: Source, options: "SetConfig") -> Listing:
    """All image files of the source; the label is the folder that holds the image, or none at the top.

    Raises
    ------
    FormatError
        If the folder is missing or holds no image file.
    """
    unlisted: Counter[str] = Counter()
    images = []
    for file in source.files():
        if named_as_image(file.path):
            images.append(file)
        else:
            unlisted[ending(file.path) or "no extension"] += 1
    if not images:
        raise FormatError(
            f"{source.uri}: no image file ({', '.join(sorted(EXTENSIONS))}) in this folder. Correct the set's `uri`."
        )
    unlisted["linked folder"] += source.linked_folders()
    return Listing(entries=Images(images, options.identity), unlisted=dict(sorted((+unlisted).items())))


class Images(Lazy):
    """The entries of image files."""

    def __init__(self, files: Sequence[File], rule: str) -> None:
        self.files, self._rule = files, rule

    def __len__(self) -> int:
        return len(self.files)

    def made(self, start: int, stop: int) -> list[Entry]:
        """The entries of files `start` to `stop`."""
        return [
            Entry(
                key=file.path,
                identity=identity_of(self._rule, file.path, None, {}),
                bytes=file.size,
                error=file.error,
            )
            for file in self.files[start:stop]
        ]


class FolderReader(Reader):
    """Opens image files."""

    def some(self, entries: Sequence[Entry], limit: int) -> Iterator[Sequence[Content]]:
        """Files of this machine by their paths, of which no entries are made."""
        part = part_of(entries)
        if part is None or not isinstance(part.whole, Images) or not isinstance(self.source, LocalSource):
            yield from super().some(entries, limit)
            return
        for file in part.whole.files[part.start : part.stop]:
            try:
                yield (self.source.read(file.path, limit) if file.error is None else OSError(file.error),)
            except OSError as fault:
                yield (fault,)

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """The image at the path `place`; OSError if it is gone, changed, or no regular file inside the folder."""
        return self.source.open(place, version)

    def read(self, place: str, version: str | None, limit: int) -> bytes:
        """The image at the path `place`, at most `limit` + 1 bytes of it; OSError as `open` raises it."""
        if isinstance(self.source, LocalSource):
            return self.source.read(place, limit)
        return super().read(place, version, limit)
