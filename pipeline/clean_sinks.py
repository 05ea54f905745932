"""The forms in which a release is written anew: a folder, WebDataset shards, or RecordIO. Images go in as they are.

Every file is new (never opened over another), private (0600, folders 0700), and written in one pass; nothing is visible
under the final name before all is there, because the caller writes to a folder aside and moves it.
"""

import io
import json
import os
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from operators.formats.dmlc import HEADER, MAGIC_BYTES

PART_LIMIT = 2**29
"""RecordIO has 29 bits for the length of a part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One image to be written."""

    name: str
    """Its path in the new release."""
    key: str
    """Its key in the release that was audited."""
    identity: str | None
    label: int | None
    """Number of its identity."""
    data: bytes


class Sink(Protocol):
    """Takes images one after another."""

    def add(self, picture: Picture) -> None:
        """Write one image; ValueError if the form cannot hold it."""

    def close(self) -> None:
        """End all files, on the disk."""


def new_file(path: Path) -> BinaryIO:
    """A file that was not there, for its owner only."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb")


def _end(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class FolderSink:
    """Files under their names."""

    def __init__(self, folder: Path, options: Mapping[str, int]) -> None:
        self._folder = folder
        self._made: set[str] = {"."}

    def add(self, picture: Picture) -> None:
        """Write one file, and the folders that it needs."""
        path = self._folder / picture.name
        parent = os.path.dirname(picture.name) or "."
        if parent not in self._made:
            for at in reversed(Path(picture.name).parents[:-1]):
                (self._folder / at).mkdir(mode=0o700, exist_ok=True)
            self._made.add(parent)
        with new_file(path) as file:
            file.write(picture.data)

    def close(self) -> None:
        """Put all on the disk: one call, not one for each of millions of files."""
        os.sync()


class TarSink:
    """Shards `release-000000.tar`: image, `.cls` with the number of its identity, and `.json` with identity and key."""

    def __init__(self, folder: Path, options: Mapping[str, int]) -> None:
        self._folder, self._each = folder, options["shard_images"]
        self._count = 0
        self._file: BinaryIO | None = None
        self._tar: tarfile.TarFile | None = None

    def add(self, picture: Picture) -> None:
        """Write one sample."""
        if self._tar is None or self._count % self._each == 0:
            self.close()
            self._file = new_file(self._folder / f"release-{self._count // self._each:06d}.tar")
            self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        stem, _, ending = picture.name.rpartition(".")
        about = {"identity": picture.identity, "key": picture.key}
        parts = {ending: picture.data, "json": json.dumps(about, ensure_ascii=True).encode()}
        if picture.label is not None:
            parts["cls"] = str(picture.label).encode()
        for kind, data in parts.items():
            member = tarfile.TarInfo(f"{stem}.{kind}")
            member.size, member.mode = len(data), 0o600
            self._tar.addfile(member, io.BytesIO(data))
        self._count += 1

    def close(self) -> None:
        """End the current shard."""
        if self._tar is not None and self._file is not None:
            self._tar.close()
            _end(self._file)
        self._tar = self._file = None


class RecordSink:
    """`release.rec`, `.idx` and `.lst` as MXNet's `im2rec` writes them, in the layout of `operators.formats.dmlc`."""

    def __init__(self, folder: Path, options: Mapping[str, int]) -> None:
        self._rec, self._idx, self._lst = (new_file(folder / f"release.{kind}") for kind in ("rec", "idx", "lst"))
        self._count = self._at = 0
        self._labels = bool(options["labels"])

    def add(self, picture: Picture) -> None:
        """Write one record; its label is -1 if other images have an identity and it has none."""
        label = picture.label if picture.label is not None else -1 if self._labels else 0
        whole = HEADER.pack(0, float(label), self._count, 0) + picture.data
        parts = list(record_parts(whole))
        if any(len(data) >= PART_LIMIT for _, data in parts):
            raise ValueError(f"{len(whole):,} bytes are more than a record can hold")
        for flag, data in parts:
            self._rec.write(MAGIC_BYTES + struct.pack("<I", flag << 29 | len(data)) + data + bytes(-len(data) % 4))
        self._idx.write(f"{self._count}\t{self._at}\n".encode())
        self._lst.write(f"{self._count}\t{label}\t{picture.name}\n".encode())
        self._at = self._rec.tell()
        self._count += 1

    def close(self) -> None:
        """End all three files."""
        for file in (self._rec, self._idx, self._lst):
            if not file.closed:
                _end(file)


def record_parts(whole: bytes) -> Iterator[tuple[int, bytes]]:
    """The parts of a record with their flags: cut where the magic stands at a multiple of 4, which is left out."""
    cuts, at = [], whole.find(MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            cuts.append(at)
        at = whole.find(MAGIC_BYTES, at + 1 if at % 4 else at + 4)
    starts = [0, *(cut + 4 for cut in cuts)]
    for place, (start, end) in enumerate(zip(starts, [*cuts, len(whole)], strict=True)):
        flag = 0 if not cuts else 1 if place == 0 else 3 if place == len(cuts) else 2
        yield flag, whole[start:end]


SINKS: Mapping[str, Callable[[Path, Mapping[str, int]], Sink]] = {
    "folder": FolderSink,
    "webdataset": TarSink,
    "recordio": RecordSink,
}
