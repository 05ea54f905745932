"""The records of TFRecord files, as columns: usual ones many at a time (`tfcolumns`), the others one by one."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedIOBase

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators.errors import FormatError
from operators.formats.blocks import as_arrow, begin, filled
from operators.formats.indexes import ShardIndex, label_of
from operators.formats.listing import Bound
from operators.formats.naming import written
from operators.formats.rasters import MAX_BYTES, SIGNATURES, axes, netpbm_size
from operators.formats.spans import NOWHERE, Ranges
from operators.formats.tfcolumns import TEXT, Block, Group, groups, said, texts
from operators.formats.tfexample import BYTES, Feature, Pieces, features
from operators.formats.tfframes import FRAME, TAIL, Damaged, frame_of, framed
from operators.sources import File, Source

IMAGES = ("image/encoded", "image_raw", "image", "jpg", "jpeg", "png", "img", "image_bytes", "encoded", "data")
LABELS = ("identity", "subject", "person", "person_id", "image/class/label", "label", "labels", "class", "target")
FILES = ("image/filename", "filename", "file_name", "path", "image/path", "image_path", "key", "image/key", "name")
CHUNK = 2**22
"""Bytes of a file looked at in one go."""

LONG = 2**18
"""Longer records are looked at one by one, without the image."""


@dataclass(frozen=True, slots=True)
class Some:
    """N records of one file: where they are, names and labels of their own (null where there are none), and what they
    are called if their names do not do.
    """

    ranges: Ranges
    names: pa.Array
    labels: pa.Array
    numbers: pa.Array
    attributes: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


@dataclass(slots=True)
class Odd:
    """Records of one file that were looked at one by one."""

    columns: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """Place, length, place of the image or `NOWHERE`, its size, number in the file."""
    tails: list[str] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    attributes: list[dict[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class Found:
    """The records of all files."""

    column: str | None
    several: bool
    """Whether attributes are asked for."""
    bound: Bound
    images: int = 0
    some: list[Some] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    """Names of features, to say which there are where none is an image."""


def scan(source: Source, file: File, found: Found, index: ShardIndex) -> None:
    """Append the records of one file; the rest of a file behind a damaged frame cannot be found."""
    stem = re.sub(r"\.tfrec(ord)?s?$", "", file.path)
    at = count = 0
    odd = Odd()
    try:
        if file.error is not None:
            raise Damaged(file.error)
        with source.open(file.path) as stream:
            if stream.read(2) == b"\x1f\x8b":
                raise FormatError(f"{source.uri}: {file.path} is compressed. Decompress it first (gunzip).")
            pieces, buffer = Pieces(stream), bytearray(min(CHUNK, file.size))
            while at < file.size:
                left: Sequence[tuple[int, int, int]] = ()
                after, met = at, 0
                if not found.several:
                    after, met, left = _usual(stream, buffer, file, found, index, (at, count, stem))
                if not met:
                    start, length = frame_of(pieces.take(at, FRAME.size), at, file.size)
                    after, met, left = start + length + TAIL.size, 1, [(at, length, count)]
                at, count = after, count + met
                found.bound(found.images, len(found.faults))
                for begin, length, number in left:
                    known = index.get((file.path, begin), (None, None))
                    try:
                        example = features(pieces, begin + FRAME.size, length)
                        _keep(found, odd, (begin, length, number), pieces, example, known)
                    except Damaged as fault:
                        found.faults.append((known[0] or f"{stem}-{number:08d}", str(fault)))
                        found.bound(found.images, len(found.faults), str(fault))
    except OSError as fault:
        rest = "" if file.error else f"; the {file.size - at:,} bytes from here on are lost: get the file again"
        found.faults.append((f"{stem}-{count:08d}", f"{fault}{rest}"))
    if odd.columns:
        found.some.append(_some(file, odd, stem))


def _some(file: File, odd: Odd, stem: str) -> Some:
    begins_N, lengths_N, starts_N, sizes_N, numbers_N = np.array(odd.columns, np.int64).T
    ends_N = begins_N + lengths_N + FRAME.size + TAIL.size
    ranges = Ranges(file=file.path, begins=begins_N, ends=ends_N, starts=starts_N, sizes=sizes_N, tails=odd.tails)
    names, labels = (pa.array(one, pa.large_string()) for one in (odd.names, odd.labels))
    return Some(ranges, names, labels, _numbered(stem, numbers_N), dict(enumerate(odd.attributes)))


def _numbered(stem: str, numbers_N: NDArray[np.int64]) -> pa.Array:
    digits = pc.utf8_lpad(as_arrow(numbers_N).cast(pa.large_string()), 8, "0")
    return written(f"{stem}-", digits)


def _usual(
    stream: BufferedIOBase, buffer: bytearray, file: File, found: Found, index: ShardIndex, first: tuple[int, int, str]
) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Append usual records from a place on; where the next begins, how many were met, and those not appended.

    `first` are the place, number and stem of the name of the first; the others are place, length and number.
    """
    at, count, stem = first
    data = memoryview(buffer)[: filled(stream, at, buffer)]
    starts_N, lengths_N, after = framed(data, 0, LONG)
    if not len(starts_N):
        return at, 0, []
    block = Block(data)
    left_N = np.ones(len(starts_N), np.bool_)
    for group in groups(block, starts_N + FRAME.size, lengths_N):
        if len(found.seen) < 100:
            found.seen.update(group.features)
        image = _image_of(block, group, found.column)
        if image is None:
            continue
        rows, places_N, sizes_N = image
        begins_N, numbers_N = at + starts_N[group.rows], count + group.rows
        known = [index.get((file.path, begin), (None, None)) for begin in begins_N.tolist()] if index else []
        names, labels = (_first_of(block, group, wanted) for wanted in (FILES, LABELS))
        if known:
            told = [pa.array([one[which] or None for one in known], pa.large_string()) for which in (0, 1)]
            names, labels = pc.coalesce(told[0], names), pc.coalesce(told[1], labels)
        ends_N = begins_N + lengths_N[group.rows] + FRAME.size + TAIL.size
        ranges = Ranges(
            file.path, begins_N[rows], ends_N[rows], at + places_N[rows], np.asarray(sizes_N[rows]), whole=False
        )
        mask = as_arrow(rows)
        found.some.append(
            Some(ranges, names.filter(mask), labels.filter(mask), _numbered(stem, numbers_N).filter(mask))
        )
        left_N[group.rows[rows]] = False
        found.images += len(begins_N[rows])
    others = np.flatnonzero(left_N)
    left = zip((at + starts_N[others]).tolist(), lengths_N[others].tolist(), (count + others).tolist(), strict=True)
    return at + after, len(starts_N), list(left)


def _image_of(
    block: Block, group: Group, column: str | None
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]] | None:
    """Which records (N,) of a group hold an encoded image where it is looked for first, and all places and sizes."""
    single = [name for name, one in group.features.items() if one.kind == BYTES]
    name = next((one for one in IMAGES if one in single), None) if column is None else column
    if name is None or name not in single:
        return None
    image = group.features[name]
    signed_N = begin(block.pieces(image.starts, 8), SIGNATURES) & (image.sizes >= max(map(len, SIGNATURES)))
    return signed_N, image.starts, image.sizes


def _first_of(block: Block, group: Group, names: Sequence[str]) -> pa.Array:
    """For each record of a group the first of the features called `names` that can be said as text."""
    there = [texts(block, group.features[name]) for name in names if name in group.features]
    return pc.coalesce(*there) if there else pa.nulls(len(group.rows), pa.large_string())


def _keep(
    found: Found,
    odd: Odd,
    where: tuple[int, int, int],
    pieces: Pieces,
    example: Mapping[str, Feature],
    known: tuple[str | None, str | None],
) -> None:
    """Append one record; Damaged if it has no image.

    `where` are its place, length and number; `known` are its name and label by the index.
    """
    if len(found.seen) < 100:
        found.seen.update(example)
    name, (start, size), shape = _image(pieces, example, found.column)
    begin, length, number = where
    odd.tails.append(f",{start},{size}]" if shape is None else f",{start},{size},{json.dumps(shape)}]")
    if shape is None:
        odd.columns.append((begin, length, start, size, number))
    else:
        odd.columns.append((begin, length, NOWHERE, netpbm_size(shape, axes(shape) or "HW"), number))
    found.images += 1
    odd.labels.append(known[1] or _first(pieces, example, LABELS))
    odd.names.append(known[0] or _first(pieces, example, FILES))
    if found.several:
        texts = {key: _text(pieces, one) for key, one in example.items() if key != name}
        odd.attributes.append({key: text for key, text in texts.items() if text is not None})


def _image(
    pieces: Pieces, example: Mapping[str, Feature], column: str | None
) -> tuple[str, tuple[int, int], list[int] | None]:
    """The feature that holds the image, where its bytes are, and its shape if they are pixels; Damaged if none does."""
    for name in IMAGES[:1] if column is None else ():  # what TensorFlow's tools write needs no look at the others
        if name in example and len(example[name].spans) == 1:
            start, size = example[name].spans[0]
            if pieces.take(start, 8).startswith(SIGNATURES):
                return name, (start, size), None
    single = {name: one.spans[0] for name, one in example.items() if len(one.spans) == 1}
    if column is not None and column not in single:
        raise Damaged(f"its feature {column!r} is missing or does not hold one image")
    names = [column] if column is not None else [name for name in IMAGES if name in single]
    encoded = [name for name in single if pieces.take(single[name][0], 8).startswith(SIGNATURES)]
    for name in names:
        shape = None if name in encoded else _shape(example, single[name][1])
        if name in encoded or shape is not None or name != "data":
            return name, single[name], shape
    for name in encoded:
        return name, single[name], None
    raise Damaged("no feature of this record is an image")


def _shape(example: Mapping[str, Feature], size: int) -> list[int] | None:
    """The shape of an image stored as `size` bytes of pixels, if the record tells one that fits."""
    sides = [_number(example, f"{before}{side}") for side in ("height", "width") for before in ("", "image/")]
    depth = next((one for key in ("depth", "channels", "image/channels") if (one := _number(example, key))), 1)
    told = example["shape"].numbers if "shape" in example else [one for one in sides if one] + [depth]
    shape = [int(one) for one in told if math.isfinite(one)]
    fits = axes(shape) is not None and math.prod(shape) == size <= MAX_BYTES
    return shape if fits else None


def _number(example: Mapping[str, Feature], name: str) -> int | None:
    numbers = example[name].numbers if name in example else []
    return int(numbers[0]) if len(numbers) == 1 and math.isfinite(numbers[0]) else None


def _first(pieces: Pieces, example: Mapping[str, Feature], names: Sequence[str]) -> str | None:
    """The first of the features called `names` that is there and can be said as text."""
    there = (_text(pieces, example[name]) for name in names if name in example)
    return next((text for text in there if text), None)


def _text(pieces: Pieces, feature: Feature) -> str | None:
    """A feature's single value as text."""
    if len(feature.numbers) == 1:
        return label_of(feature.numbers[0])
    if len(feature.spans) != 1 or feature.spans[0][1] > TEXT:
        return None
    return said(BYTES, pieces.take(*feature.spans[0]))
