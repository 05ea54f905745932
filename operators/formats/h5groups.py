"""What the groups of an HDF5 file hold: which datasets are images, and which lie beside them and describe them."""

import importlib
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedIOBase
from typing import Any

import numpy as np

from operators.errors import FormatError
from operators.formats.rasters import MAX_BYTES, SIGNATURES, axes, netpbm_size

GENERIC = frozenset(
    ["image", "images", "img", "imgs", "data", "array", "face", "faces", "pixels", "crop", "crops", "x"]
)
"""Names of datasets that stand for their group: they say nothing about the image."""
FILTERS = frozenset({1, 2, 3, 4, 5, 6, 32000})
"""Deflate, shuffle, Fletcher-32, SZIP, n-bit, scale-offset, and LZF, which h5py brings along."""
MAX_DEPTH = 32
CACHE_BYTES = 2**26
COLUMN_BYTES = 2**28
"""Of a dataset of names, labels or attributes."""
REFERENCE_BYTES = 16
"""What a value of variable length takes in its dataset."""
FAULTS = (OSError, RuntimeError, KeyError, ValueError, OverflowError, TypeError, IndexError, MemoryError)
"""What h5py raises on damaged files."""


@dataclass(frozen=True, slots=True)
class Images:
    """A dataset that holds one image or a stack of them."""

    dataset: Any
    name: str
    rows: int | None
    """None: one image."""
    order: str | None
    """Axes of one image's pixels; None: encoded."""
    size: int
    """Of each image as it is given out; 0 where only reading it tells."""


@dataclass(slots=True)
class Group:
    """What one group holds."""

    path: str
    images: list[Images] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    """One-dimensional datasets of numbers or text."""
    faults: dict[str, str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    attributes: Any = None


@contextmanager
def opened(stream: BufferedIOBase) -> Iterator[Any]:
    """An open h5py file; FormatError if h5py is missing."""
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise FormatError("Reading HDF5 files needs the package h5py: pip install 'unveil[formats]'.") from error
    with h5py.File(stream, "r", rdcc_nbytes=CACHE_BYTES) as file:
        yield file


def groups(file: Any, column: str | None, most: int) -> Iterator[Group]:
    """All groups, each once, with what they hold; after `most` objects no more."""
    h5py = importlib.import_module("h5py")
    todo, seen, left = [("", file, 0)], set(), most
    while todo and left > 0:
        path, group, depth = todo.pop()
        found = Group(path, attributes=group.attrs)
        try:
            names = list(group)
        except FAULTS as fault:
            names, found.faults[path or "/"] = [], f"cannot be listed: {plain(fault)}; get the file again"
        for name in names:
            left -= 1
            inner = f"{path}/{name}" if path else name
            try:
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    found.others["link"] += 1
                    continue
                one = group[name]
                address = h5py.h5o.get_info(one.id).addr
                if address in seen:
                    found.others["link"] += 1
                elif isinstance(one, h5py.Group) and depth < MAX_DEPTH:
                    todo.append((inner, one, depth + 1))
                elif isinstance(one, h5py.Dataset):
                    _sort(found, one, inner, column)
                else:
                    found.others["object of another kind"] += 1
                seen.add(address)
            except FAULTS as fault:
                found.faults[inner] = f"cannot be read: {plain(fault)}; get the file again"
            if left <= 0:
                break
        yield found


def _sort(found: Group, dataset: Any, path: str, column: str | None) -> None:
    """Put a dataset where it belongs in its group."""
    name = path.rpartition("/")[2]
    chosen = column in (name, path)
    if (reason := unsafe(dataset)) is not None:
        if dataset.dtype == np.uint8 or dataset.dtype.kind in "OV":
            found.faults[path] = reason
        else:
            found.others["dataset that must not be read"] += 1
        return
    images = _images(dataset, path, chosen) if column is None or chosen else None
    shape = dataset.shape or ()
    if images is not None:
        found.images.append(images)
    elif len(shape) == 4 and axes(shape[1:]) is not None and column is None:
        found.faults[path] = f"its pixels are of the type {dataset.dtype}; only uint8 is read"
    elif len(shape) == 1 and (dataset.dtype.kind in "iufS" or _is_text(dataset)) and dataset.nbytes <= COLUMN_BYTES:
        found.columns[name] = dataset
    else:
        found.others["dataset that is no image"] += 1


def _is_text(dataset: Any) -> bool:
    return importlib.import_module("h5py").check_string_dtype(dataset.dtype) is not None


def _images(dataset: Any, path: str, chosen: bool) -> Images | None:
    """What images a dataset holds, by its type and shape; None if it holds none."""
    shape, kind = dataset.shape, dataset.dtype
    if shape is None:
        return None
    if importlib.import_module("h5py").check_vlen_dtype(kind) == np.uint8 and len(shape) <= 1:
        first = dataset[()] if not shape else dataset[0] if shape[0] else np.zeros(0, np.uint8)
        encoded = chosen or first[:8].tobytes().startswith(SIGNATURES)
        return Images(dataset, path, shape[0] if shape else None, None, 0) if encoded else None
    if kind.kind == "V" and kind.names is None and kind.subdtype is None and not shape:
        encoded = chosen or dataset[()].tobytes().startswith(SIGNATURES)
        return Images(dataset, path, None, None, kind.itemsize) if encoded else None
    if kind != np.uint8 or not shape:
        return None
    if len(shape) == 1:
        encoded = chosen or dataset[:8].tobytes().startswith(SIGNATURES)
        return Images(dataset, path, None, None, shape[0]) if encoded else None
    if len(shape) == 2 and not (chosen or path.rpartition("/")[2] in GENERIC):
        return None
    if len(shape) <= 3 and (order := axes(shape)) is not None:
        return Images(dataset, path, None, order, netpbm_size(shape, order))
    order = axes(shape[1:]) if len(shape) in (3, 4) else None
    return Images(dataset, path, shape[0], order, netpbm_size(shape[1:], order)) if order is not None else None


def unsafe(dataset: Any) -> str | None:
    """Why nothing of a dataset must be read, or None."""
    if dataset.external or dataset.is_virtual:
        return "its data lie outside this file: they are not read; copy them into the file"
    made = dataset.id.get_create_plist()
    foreign = {made.get_filter(at)[0] for at in range(made.get_nfilters())} - FILTERS
    if foreign:
        return f"it is packed by filter {min(foreign)}, which HDF5 itself does not have; repack it (h5repack -f GZIP=4)"
    chunk = math.prod(dataset.chunks or (1,)) * dataset.dtype.itemsize
    if chunk > MAX_BYTES:
        return f"a chunk of {chunk:,} bytes; the limit is {MAX_BYTES:,}. Repack it with smaller chunks"
    return None


def refusal(images: Images, file_bytes: int, max_ratio: float) -> str | None:
    """Why the images of a dataset in a file of `file_bytes` must not be read, or None."""
    if images.size > MAX_BYTES:
        return f"an image of {images.size:,} bytes; the limit is {MAX_BYTES:,}"
    stored = images.dataset.id.get_storage_size()
    total = (images.size or REFERENCE_BYTES) * (1 if images.rows is None else images.rows)
    if total and not 0 < stored <= file_bytes:
        return f"{stored:,} bytes of it are stored in a file of {file_bytes:,}: the file is damaged; get it again"
    if total > stored * max_ratio:
        return f"{total:,} bytes are packed into {stored:,}; the limit is {max_ratio:g} to 1 (limits.max_ratio)"
    return None


def plain(fault: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(fault).splitlines() or [type(fault).__name__])[0][:200]
