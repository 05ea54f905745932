"""What images are called and labelled in a rewritten release: names that every form can hold, and numbers for labels.

A key of the release comes from outside and may be hostile, have no ending, or mean something to an archive. It is kept
where it is harmless; else the image gets a name of its own. The list file of the rewritten release says which is which.
"""

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from operators.formats.listing import EXTENSIONS, name_fault

MAGIC = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"BM": ".bmp",
    b"P5": ".pgm",
    b"P6": ".ppm",
}
"""How images begin; WebP is told apart by hand."""
PART_BYTES = 200
"""A longer part of a path does not fit every file system with its ending."""
EXACT = 2**24
"""Whole numbers below are the same as float32, in which RecordIO keeps labels."""


class Names:
    """Gives every image a name of its own that is a plain relative path."""

    def __init__(self, *, dotless: bool = False) -> None:
        """Begin with none; `dotless` allows no dot but that of the ending, as WebDataset cuts names at the first."""
        self._dotless = dotless
        self._files: set[str] = set()
        self._samples: set[str] = set()
        self._folders: set[str] = set()

    def __call__(self, key: str, digest: str, data: bytes) -> str:
        """The image's name: its key if that will do, with an ending if it has none; else one made of its digest."""
        ending = PurePosixPath(key).suffix
        known = ending.lower() in EXTENSIONS
        stem, ending = (key[: -len(ending)], ending) if known else (key, ending_of(data))
        if self._dotless:
            folder, slash, last = stem.rpartition("/")
            stem = folder + slash + last.replace(".", "_")
        name, copy = stem + ending, 1
        while _unfit(name) or not self._free(name):
            copy += 1
            name = f"renamed/{digest[:32]}{f'-{copy}' if copy > 2 else ''}{ending}"
        self._files.add(name)
        if self._dotless:
            self._samples.add(name.rpartition(".")[0])
        self._folders.update(map(str, list(PurePosixPath(name).parents)[:-1]))
        return name

    def _free(self, name: str) -> bool:
        """Whether nothing has this name, nor is a folder what would be a file or the other way round.

        In WebDataset, images of one name and several endings would be one sample, so their names must differ.
        """
        parents = list(map(str, PurePosixPath(name).parents))[:-1]
        new = name not in self._files and name not in self._folders and self._files.isdisjoint(parents)
        return new and name.rpartition(".")[0] not in self._samples


def _unfit(name: str) -> bool:
    """Whether a form could refuse, skip or mistake a record of this name."""
    parts = name.split("/")
    return (
        name_fault(name) is not None
        or any(part in ("", ".") or len(part.encode()) > PART_BYTES for part in parts)
        or parts[-1].startswith(".")
        or name.startswith("~")
        or name[1:2] == ":"
    )


def ending_of(data: bytes) -> str:
    """The ending of an encoded image by its first bytes; `.bin` for what is none."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((ending for magic, ending in MAGIC.items() if data.startswith(magic)), ".bin")


def class_numbers(identities: Iterable[str | None]) -> Mapping[str, int]:
    """A number for each identity: its own where all are plain numbers that a float32 holds, else its place in order."""
    found = sorted({one for one in identities if one is not None})
    if all(one.isascii() and one.isdecimal() and len(one) < 9 and str(int(one)) == one for one in found):
        numbers = {one: int(one) for one in found}
        if max(numbers.values(), default=0) < EXACT:
            return numbers
    return {one: at for at, one in enumerate(found)}
