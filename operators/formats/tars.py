"""Tar archives, plain or compressed with gzip, bzip2 or xz: one, or several in a folder.

Nothing is extracted. A plain archive is read in place. A gzip one is unpacked once by each process, which from then on
can begin again at places that it remembers; bzip2 and xz only begin at the beginning (`compressed`). Units hold images
in the order of their keys: in an archive that is packed in another order, a reader goes back and forth.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from itertools import islice
from typing import TYPE_CHECKING

from operators.errors import FormatError
from operators.formats.compressed import compression, unpacked
from operators.formats.listing import EXTENSIONS, Listing
from operators.formats.members import Gathered, kinds_beside, located, located_near, named, stored, tidy
from operators.formats.reading import Reader
from operators.formats.tarheaders import Members
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst")
PEEK = 512
"""Members of the first archive that are looked at to tell WebDataset shards from other archives."""

UNUSABLE = {
    "link": "a link; pack the archive anew with `tar --dereference --hard-dereference`",
    "device": "a device or pipe, no regular file",
    "sparse file": "a sparse file; pack the archive anew without `tar --sparse`",
    "part of another volume": "continued from another volume; join the volumes first",
}
"""Why members of such kinds cannot be read."""


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether the files hold a tar archive that is no WebDataset shard."""
    return form_of(source, files) == "tar"


def form_of(source: Source, files: "list[File]") -> str | None:
    """`webdataset` if images in the first archive have `.cls` or `.json` members of their name, else `tar`, or None."""
    for file in named(files, ENDINGS, source.single)[:8]:
        try:
            with source.open(file.path) as raw:
                if compression(raw) == "zstd" and file.path.lower().endswith(".tar.zst"):
                    return "tar"  # listing says what to do
                if found := _form(unpacked(raw, f"{source.uri}/{file.path}")):
                    return found
        except OSError:
            continue
    return None


def _form(file: BufferedIOBase) -> str | None:
    images, sidecars, seen = set(), set(), False
    try:
        for member in islice(Members(file), PEEK):
            seen = True
            name, ending = sample_of(tidy(member.name))
            if ending in ("cls", "json"):
                sidecars.add(name)
            elif f".{ending}".endswith(tuple(EXTENSIONS)):
                images.add(name)
    except OSError:
        pass  # listing says what is wrong with it
    if not seen:
        return None
    return "webdataset" if images & sidecars else "tar"


def sample_of(name: str) -> tuple[str, str]:
    """A member's sample and ending as WebDataset splits names: at the first dot after the folders."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def listing(source: Source, options: "SetConfig") -> Listing:
    """All images of the archives; keys begin with the archive's name if there are several.

    The person's label is the folder that holds the image in its archive. If archives repeat each other's names, as
    those that number persons anew do, the archive's name goes before it.

    Raises
    ------
    FormatError
        If an archive is missing, cut short, damaged or no tar archive, or there is no image.
    """
    chosen, gathered = begun(source, options)
    for file in chosen:
        with content(source, file, gathered, options) as opened:
            quoted = json.dumps(file.path)
            members = Members(opened)
            for member in members:
                name = tidy(member.name)
                if member.kind == "folder" or not gathered.passes(name, member.kind if member.kind != "file" else None):
                    continue
                place = f"[{quoted},{member.start},{member.size}]"
                gathered.add(file.path, name, member.size, place, UNUSABLE.get(member.kind))
            if members.note is not None:
                gathered.notes.append(f"{file.path} {members.note}.")
    return gathered.listing()


def begun(source: Source, options: "SetConfig", prefixed: bool = True) -> tuple[list[File], Gathered]:
    """The archives of the source by path, and what collects their members; FormatError if there is none."""
    files = list(source.files())
    chosen = named(files, ENDINGS, source.single)
    if not chosen:
        raise FormatError(f"{source.uri}: no file called {', '.join(ENDINGS)}. Correct the set's `uri`.")
    gathered = Gathered(source.uri, options, [file.path for file in chosen], prefixed)
    gathered.unlisted.update(kinds_beside(files, chosen))
    return chosen, gathered


@contextmanager
def content(source: Source, file: File, gathered: Gathered, options: "SetConfig") -> Iterator[BufferedIOBase]:
    """One archive, unpacked as it is read; FormatError for any OSError meanwhile."""
    try:
        if file.error is not None:
            raise OSError(file.error)
        with source.open(file.path) as raw:
            kind = compression(raw)
            if (note := _slow(kind)) and note not in gathered.notes:
                gathered.notes.append(note)
            yield unpacked(raw, f"{source.uri}/{file.path}", options.limits.max_ratio)
    except OSError as fault:
        raise FormatError(
            f"{source.uri}: {file.path}: cannot be read as a tar archive: {fault.strerror or fault}. "
            f"Download it again, or move it away."
        ) from fault


def _slow(kind: str | None) -> str | None:
    """What reading such an archive costs."""
    if kind is None:
        return None
    if kind == "gzip":
        return "Compressed with gzip: every worker unpacks an archive once from its beginning; plain tar is faster."
    return (
        f"Compressed with {kind}: every unit unpacks an archive anew from its beginning, and again for each image "
        f"that is not in the order of names; unpack large archives to plain tar first."
    )


class TarReader(Reader):
    """Opens members by `[archive, place, size]`."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._contents: dict[str, tuple[BufferedIOBase, BufferedIOBase]] = {}
        self._near: tuple[str, str] | None = None

    def path(self, place: str) -> str:
        """The archive."""
        return located(place, 2)[0]

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """The member's bytes; OSError, now or when reading, if the archive ends before or cannot be unpacked."""
        path, (at, size) = located(place, 2)
        return stored(self._content(path, version), at, size)

    def read(self, place: str, version: str | None, limit: int) -> bytes:
        """The member's bytes, at most `limit` + 1; OSError as `open` and its stream raise it."""
        path, (at, size), self._near = located_near(place, 2, self._near)
        return self.ahead(self._content(path, version), at, min(size, limit + 1))

    def _content(self, path: str, version: str | None) -> BufferedIOBase:
        raw = self.held(path, version)
        if path not in self._contents or self._contents[path][0] is not raw:
            self._contents = {name: both for name, both in self._contents.items() if not both[0].closed}
            self._contents[path] = raw, unpacked(raw, f"{self.source.uri}/{path}")
        return self._contents[path][1]
