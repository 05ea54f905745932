"""TFRecord files of `tf.train.Example` messages with encoded images, or pixels and their shape.

Read without TensorFlow (`operators.formats.tfexample`). Every image is given out with the checksum of its whole record
verified. Understood by name are TensorFlow's own conversion tools (`image/encoded`), TFace's files with their `.index`
(`image`, and labels as four bytes), and NVIDIA's FFHQ files (`data` and `shape`).
"""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from operators.errors import FormatError
from operators.formats.indexes import Entries, ShardIndex, label_of, shard_index
from operators.formats.listing import Listing
from operators.formats.members import WHOLE, located_near
from operators.formats.rasters import MAX_BYTES, SIGNATURES, axes, netpbm, netpbm_size
from operators.formats.reading import Reader
from operators.formats.tfexample import Feature, Pieces, features
from operators.formats.tfframes import FRAME, TAIL, Checked, Damaged, frame, frame_of, image_in
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

NAMED = re.compile(r"\.tfrec(ord)?s?\b|tfrecord|-\d{5}-of-\d{5}$", re.IGNORECASE)
SHARD = re.compile(r"-(\d+)-of-(\d+)")
IMAGES = ("image/encoded", "image_raw", "image", "jpg", "jpeg", "png", "img", "image_bytes", "encoded", "data")
LABELS = ("identity", "subject", "person", "person_id", "image/class/label", "label", "labels", "class", "target")
FILES = ("image/filename", "filename", "file_name", "path", "image/path", "image_path", "key", "image/key", "name")
TEXT = 4096
"""Bytes of a name or label that are looked at."""


@dataclass(slots=True)
class _Found:
    """The records of all files, as parallel lists: a set has millions."""

    column: str | None
    several: bool
    """Whether attributes are asked for."""
    places: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    """What a record is called if its own name does not do."""
    attributes: list[dict[str, str]] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    shared: dict[str | None, str | None] = field(default_factory=dict)
    """Every label once."""
    seen: set[str] = field(default_factory=set)
    """Names of features, to say which there are where none is an image."""


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether a file called as TFRecord files are, or the only file, begins with a record."""
    some = [file for file in files if NAMED.search(file.path.rpartition("/")[2]) or source.single is not None]
    return any(_is_record(source, file) for file in some[:8])


def _is_record(source: Source, file: File) -> bool:
    try:
        with source.open(file.path) as stream:
            head = stream.read(8)
            if head[:2] == b"\x1f\x8b" and NAMED.search(file.path):
                return True  # compressed: `listing` says so
            return len(head) == 8 and int.from_bytes(head, "little") < file.size and frame(stream, 0, file.size)[1] > 0
    except OSError:
        return False


def listing(source: Source, options: "SetConfig") -> Listing:
    """All records of all TFRecord files; named by a feature or the `.index` file, else by file and number.

    Raises
    ------
    FormatError
        If there is no such file, one is compressed, no record holds an image, or a library is missing.
    """
    files = sorted(source.files(), key=lambda file: file.path)
    single = source.single is not None
    chosen = [file for file in files if single or (NAMED.search(file.path.rpartition("/")[2]) and file.size)]
    chosen = [file for file in chosen if not file.path.endswith((".index", ".txt", ".json", ".labels"))]
    if not chosen:
        raise FormatError(f"{source.uri}: no TFRecord file here. Correct the set's `uri`.")
    index, read = shard_index(source, files)
    entries = Entries(options)
    found = _Found(options.column, entries.wants)
    for file in chosen:
        _scan(source, file, found, index)
    if found.faults and not found.places and found.seen:
        raise FormatError(
            f"{source.uri}: no record has an image among its features ({', '.join(sorted(found.seen)[:20])}). "
            f"Name the one that holds it in the set's `column`."
        )
    _enter(entries, found)
    others = {file.path for file in files} - {file.path for file in chosen} - read
    unlisted = Counter(PurePosixPath(path).suffix or "no extension" for path in others)
    return Listing(entries=entries.made, unlisted=dict(sorted(unlisted.items())), notes=_missing(chosen))


def _scan(source: Source, file: File, found: _Found, index: ShardIndex) -> None:
    """Append the records of one file; the rest of a file behind a damaged frame cannot be found."""
    stem = re.sub(r"\.tfrec(ord)?s?$", "", file.path)
    at = count = 0
    try:
        if file.error is not None:
            raise Damaged(file.error)
        quoted = json.dumps(file.path)
        with source.open(file.path) as stream:
            if stream.read(2) == b"\x1f\x8b":
                raise FormatError(f"{source.uri}: {file.path} is compressed. Decompress it first (gunzip).")
            pieces = Pieces(stream)
            while at < file.size:
                start, length = frame_of(pieces.take(at, FRAME.size), at, file.size)
                known = index.get((file.path, at), (None, None))
                number = f"{stem}-{count:08d}"
                try:
                    where = quoted, at, FRAME.size + length + TAIL.size
                    _keep(found, where, pieces, features(pieces, start, length), (*known, number))
                except Damaged as fault:
                    found.faults.append((known[0] or number, str(fault)))
                at, count = start + length + TAIL.size, count + 1
    except OSError as fault:
        rest = "" if file.error else f"; the {file.size - at:,} bytes from here on are lost: get the file again"
        found.faults.append((f"{stem}-{count:08d}", f"{fault}{rest}"))


def _keep(
    found: _Found,
    where: tuple[str, int, int],
    pieces: Pieces,
    example: Mapping[str, Feature],
    known: tuple[str | None, str | None, str],
) -> None:
    """Append one record; Damaged if it has no image.

    `where` are its file as JSON, its place and its length; `known` are its name and label by the index, and its number.
    """
    if len(found.seen) < 100:
        found.seen.update(example)
    name, (start, size), shape = _image(pieces, example, found.column)
    place = f"[{where[0]},{where[1]},{where[2]},{start},{size}"
    place += "]" if shape is None else f",{json.dumps(shape)}]"
    if shape is not None:
        size = netpbm_size(shape, axes(shape) or "HW")
    found.places.append(place)
    found.sizes.append(size)
    label = known[1] or _first(pieces, example, LABELS)
    found.labels.append(found.shared.setdefault(label, label))
    found.names.append(known[0] or _first(pieces, example, FILES))
    found.numbers.append(known[2])
    if found.several:
        texts = {key: _text(pieces, one) for key, one in example.items() if key != name}
        found.attributes.append({key: text for key, text in texts.items() if text is not None})


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
    """A feature's single value as text; bytes that are no text but as long as an integer are one, as TFace has them."""
    if len(feature.numbers) == 1:
        return label_of(feature.numbers[0])
    if len(feature.spans) != 1 or feature.spans[0][1] > TEXT:
        return None
    data = pieces.take(*feature.spans[0])
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "\0"
    if text.isprintable():
        return text
    return str(int.from_bytes(data, "little", signed=True)) if len(data) in (4, 8) else None


def _enter(entries: Entries, found: _Found) -> None:
    """Make the entries: by the records' own names if these are all there and differ, else by their numbers."""
    names = []
    for name, label in zip(found.names, found.labels, strict=True):
        own = name.removeprefix("./") if name is not None else None
        folder = f"{label}/" if label is not None and "/" not in (own or "") else ""
        names.append(folder + own if own is not None else None)
    use_own = None not in names and len(set(names)) == len(names)
    for at, (place, size, label) in enumerate(zip(found.places, found.sizes, found.labels, strict=True)):
        name = names[at] if use_own else f"{f'{label}/' if label is not None else ''}{found.numbers[at]}"
        attributes = found.attributes[at] if found.several else None
        entries.add(str(name), size, place=place, label=label, attributes=attributes)
    for name, fault in found.faults:
        entries.add(name, 0, error=fault)


def _missing(files: Sequence[File]) -> list[str]:
    """What names like `train-00003-of-00010` say of files that are not there."""
    parts = [match.groups() for file in files if (match := SHARD.search(file.path))]
    totals = {int(total) for _, total in parts}
    if len(totals) != 1 or len(parts) == sum(totals):
        return []
    return [f"{len(parts):,} of {sum(totals):,} files are there, by their names; get the others or name them in `uri`"]


class TfRecordReader(Reader):
    """Opens images by `[file, record, its length, image, its size]`, and the shape if they are pixels."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._near: tuple[str, str] | None = None

    def path(self, place: str) -> str:
        """The TFRecord file."""
        return str(json.loads(place)[0])

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """The image of the record at `place`; OSError if it is not there or damaged."""
        path, at, _, start, size, *shape = json.loads(place)
        file = self.held(path, version)
        data = frame(file, at, file.seek(0, io.SEEK_END))
        if not data[0] <= start <= start + size <= data[0] + data[1]:
            raise OSError("the record is shorter than it was when it was listed; run the audit again")
        stream = io.BufferedReader(Checked(file, data, start, size))
        if not shape:
            return stream
        pixels = np.frombuffer(stream.read(), np.uint8).reshape(shape[0])
        return io.BytesIO(netpbm(pixels, axes(shape[0]) or "HW"))

    def read(self, place: str, version: str | None, limit: int) -> bytes:
        """The image of the record at `place`, at most `limit` + 1 bytes of it; OSError as `open` raises it."""
        if place.endswith("]]"):
            return super().read(place, version, limit)
        path, (at, length, start, size), self._near = located_near(place, 4, self._near)
        if length <= min(WHOLE, limit):
            image = image_in(self.ahead(self.held(path, version), at, length), at, start, size)
            if image is not None:
                return image
        return super().read(place, version, limit)
