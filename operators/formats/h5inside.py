"""HDF5 files read by libhdf5 in this process: what `operators.formats.hdf5` runs in a child of its own."""

import io
import json
import re
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from operators.errors import FormatError
from operators.formats.h5groups import FAULTS, GENERIC, Group, Images, groups, opened, plain, refusal, unsafe
from operators.formats.indexes import Entries, label_of
from operators.formats.listing import Listing
from operators.formats.rasters import axes, netpbm
from operators.formats.reading import Reader
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

MAGIC = b"\x89HDF\r\n\x1a\n"
FILES = re.compile(r"\.(h5|hdf5?|he5)$", re.IGNORECASE)
LABELS = ("identity", "identities", "label", "labels", "subject", "subjects", "person", "class", "target", "y")
NAMES = ("key", "keys", "path", "paths", "filename", "filenames", "file", "files", "name", "names", "image_path")
LOOK = 1000
"""Objects that are looked at to recognise a file."""


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether an HDF5 file has an image among the first objects in it."""
    some = [file for file in files if FILES.search(file.path) or source.single is not None]
    return any(_holds_images(source, file) for file in some[:4])


def _holds_images(source: Source, file: File) -> bool:
    with suppress(*FAULTS, FormatError), source.open(file.path) as stream:
        if stream.read(8) != MAGIC:
            return False
        with opened(stream) as held:
            return any(group.images for group in groups(held, None, LOOK))
    return False


def listing(source: Source, options: "SetConfig") -> Listing:
    """All images of all HDF5 files, named by datasets beside them, else by group, dataset and row.

    Raises
    ------
    FormatError
        If there is no HDF5 file, the only one is damaged, none holds an image, or h5py is missing.
    """
    files = sorted(source.files(), key=lambda file: file.path)
    chosen = [file for file in files if FILES.search(file.path) or source.single is not None]
    if not chosen:
        raise FormatError(f"{source.uri}: no HDF5 file (`.h5`, `.hdf5`) here. Correct the set's `uri`.")
    entries, unlisted = Entries(options), Counter[str]()
    for file in chosen:
        stem = FILES.sub("", file.path)
        try:
            if file.error is not None:
                raise OSError(file.error)
            with source.open(file.path) as stream, opened(stream) as held:
                names = _Names(file, stem if len(chosen) > 1 else "", stem)
                for group in groups(held, options.column, options.limits.max_records):
                    _enter(entries, group, names, options)
                    unlisted.update(group.others)
        except FAULTS as fault:
            if len(chosen) == 1:
                raise FormatError(
                    f"{source.uri}: {file.path} cannot be read ({plain(fault)}). Get it again."
                ) from fault
            entries.add(file.path, 0, error=f"cannot be read: {plain(fault)}; get the file again")
    if not entries.made:
        kinds = ", ".join(f"{count:,} x {kind}" for kind, count in unlisted.items()) or "nothing"
        raise FormatError(
            f"{source.uri}: no image dataset in this file ({kinds}). Name it in the set's `column`, or, where it holds "
            f"embeddings, set `format: vectors`."
        )
    unlisted.update(PurePosixPath(one.path).suffix or "no extension" for one in files if one not in chosen)
    return Listing(entries=entries.made, unlisted=dict(sorted(unlisted.items())))


@dataclass(frozen=True, slots=True)
class _Names:
    """How the images of one file are called."""

    file: File
    prefix: str
    """Before every name, where there are several files."""
    stem: str
    """The name of an image that is all that its file holds."""

    def base(self, images: Images, alone: bool) -> str:
        """The name of a dataset: of its group, if its own says nothing and it is the only one there."""
        group, _, own = images.name.rpartition("/")
        return "/".join(one for one in (self.prefix, group if alone and own in GENERIC else images.name) if one)


def _enter(entries: Entries, group: Group, names: _Names, options: "SetConfig") -> None:
    """Make the entries of one group."""
    for path, fault in group.faults.items():
        entries.add("/".join(one for one in (names.prefix, path) if one), 0, error=fault)
    for images in group.images:
        base = names.base(images, len(group.images) == 1)
        place = f"{json.dumps([names.file.path, images.name])[:-1]}, "
        reason = refusal(images, names.file.size, options.limits.max_ratio)
        if images.rows is None or reason is not None:
            attributes = _attributes(images, group) if entries.wants else None
            entries.add(base or names.stem, images.size, place=place + "null]", attributes=attributes, error=reason)
            continue
        if images.rows > options.limits.max_records:
            raise FormatError(f"{names.file.path}: {images.rows:,} images; the limit is limits.max_records of the set.")
        _rows(entries, group, images, base, place)


def _rows(entries: Entries, group: Group, images: Images, base: str, place: str) -> None:
    """Make the entries of a stack."""
    rows = images.rows or 0
    beside = {name: one for name, one in group.columns.items() if one.shape == (rows,)}
    label = next((name for name in LABELS if name in beside), None)
    named = next((name for name in NAMES if name in beside and beside[name].dtype.kind not in "iuf"), None)
    wanted = beside if entries.wants else {name: beside[name] for name in (label, named) if name is not None}
    columns = {name: _texts(one) for name, one in wanted.items()}
    own = [name for name in columns[named] if name is not None] if named is not None else []
    if len(set(own)) < rows:
        own = [f"{row:08d}" for row in range(rows)]
    folder = f"{base}/" if base else ""
    for row, name in enumerate(own):
        entries.add(
            f"{folder}{name}",
            images.size,
            place=f"{place}{row}]",
            label=columns[label][row] if label is not None else None,
            attributes={key: text for key, one in columns.items() if (text := one[row])} if entries.wants else None,
        )


def _texts(dataset: Any) -> list[str | None]:
    """The values of a one-dimensional dataset as text; each different text is held once."""
    shared: dict[Any, str | None] = {}
    return [shared.setdefault(one, _text(one)) if one not in shared else shared[one] for one in dataset[:].tolist()]


def _text(value: Any) -> str | None:
    """A number or string as text; None if it is neither, or no text."""
    if isinstance(value, bytes):
        try:
            return value.decode() or None
        except UnicodeDecodeError:
            return None
    if isinstance(value, int | float | np.integer | np.floating):
        return label_of(float(value)) if isinstance(value, float | np.floating) else str(int(value))
    return value if isinstance(value, str) and value else None


def _attributes(images: Images, group: Group) -> dict[str, str]:
    """The attributes of an image's group and of its dataset that are single numbers or text."""
    found = {}
    for held in (group.attributes, images.dataset.attrs):
        for name in held:
            with suppress(*FAULTS):
                value = held[name]
                if np.shape(value) == () and (text := _text(value)) is not None:
                    found[name] = text
    return found


def _encoded(value: Any) -> bytes:
    """An encoded image as it is, pixels as PPM or PGM; OSError if it is neither."""
    if isinstance(value, np.void):
        return value.tobytes()
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim not in (1, 2, 3):
        raise OSError("the dataset is not what it was when it was listed; run the audit again")
    if value.ndim == 1:
        return value.tobytes()
    if (order := axes(value.shape)) is None:
        raise OSError("the dataset is not what it was when it was listed; run the audit again")
    return netpbm(value, order)


class InsideReader(Reader):
    """Opens images of HDF5 files."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._open: tuple[str, ExitStack, Any, str, Any] | None = None

    def path(self, place: str) -> str:
        """The HDF5 file."""
        return str(json.loads(place)[0])

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """The image of the dataset and row `place`, as PPM or PGM if it is pixels; OSError if it cannot be read."""
        path, name, row = json.loads(place)
        try:
            value = self._dataset(path, name, version)[() if row is None else row]
        except FAULTS as fault:
            raise OSError(f"{plain(fault)}") from fault
        return io.BytesIO(_encoded(value))

    def several(self, place: str, version: str | None, count: int) -> list[bytes]:
        """Images of up to `count` rows from that of `place`; OSError if any of them cannot be read."""
        path, name, row = json.loads(place)
        try:
            made = self._dataset(path, name, version)[row : row + count]
        except FAULTS as fault:
            raise OSError(f"{plain(fault)}") from fault
        return [_encoded(value) for value in made]

    def _dataset(self, path: str, name: str, version: str | None) -> Any:
        """A dataset, kept open for the next record."""
        if self._open is None or self._open[0] != path:
            self.close()
            with ExitStack() as stack:
                file = stack.enter_context(opened(stack.enter_context(self.source.open(path, version))))
                self._open = (path, stack.pop_all(), file, "", None)
        _, stack, file, known, dataset = self._open
        if known != name:
            dataset = file[name]
            if (reason := unsafe(dataset)) is not None:
                raise OSError(reason)
            self._open = (path, stack, file, name, dataset)
        return dataset

    def close(self) -> None:
        """Close all files."""
        held, self._open = self._open, None
        if held is not None:
            with suppress(*FAULTS):
                held[1].close()
        super().close()
