"""TFRecord files of `tf.train.Example` messages with encoded images, or pixels and their shape.

Read without TensorFlow (`operators.formats.tfexample`). Every image is given out with the checksum of its whole record
verified. Understood by name are TensorFlow's own conversion tools (`image/encoded`), TFace's files with their `.index`
(`image`, and labels as four bytes), and NVIDIA's FFHQ files (`data` and `shape`).
"""

import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from io import BufferedIOBase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.errors import FormatError
from operators.formats.blocks import pieces_of
from operators.formats.indexes import shard_index
from operators.formats.listing import Bound, Listing
from operators.formats.members import WHOLE, located_near
from operators.formats.naming import unique, written
from operators.formats.rasters import axes, netpbm
from operators.formats.spans import Check, Ranges, SpanReader, Spans
from operators.formats.tfframes import FRAME, TAIL, Checked, crc32c, frame, heads_of, image_in, masked_all
from operators.formats.tfscan import Found, Some, scan
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

NAMED = re.compile(r"\.tfrec(ord)?s?\b|tfrecord|-\d{5}-of-\d{5}$", re.IGNORECASE)
SHARD = re.compile(r"-(\d+)-of-(\d+)")


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
    entries = Spans(source.uri, options)
    found = Found(options.column, entries.wants, Bound(source.uri, options.limits.max_records))
    for file in chosen:
        scan(source, file, found, index)
    if found.faults and not found.some and found.seen:
        raise FormatError(
            f"{source.uri}: no record has an image among its features ({', '.join(sorted(found.seen)[:20])}). "
            f"Name the one that holds it in the set's `column`."
        )
    _enter(entries, found)
    others = {file.path for file in files} - {file.path for file in chosen} - read
    unlisted = Counter(PurePosixPath(path).suffix or "no extension" for path in others)
    return Listing(entries=entries.settle(), unlisted=dict(sorted(unlisted.items())), notes=_missing(chosen))


def _enter(entries: Spans, found: Found) -> None:
    """Make the entries: by the records' own names if these are all there and differ, else by their numbers."""
    nothing = pa.chunked_array([], pa.large_string())
    names = pa.chunked_array([_own(one) for one in found.some]) if found.some else nothing
    use_own = unique(names)
    for one in found.some:
        name = _own(one) if use_own else pc.coalesce(written(one.labels, "/", one.numbers), one.numbers)
        entries.add(one.ranges, name, one.labels, one.attributes)
    entries.refuse([name for name, _ in found.faults], [fault for _, fault in found.faults])


def _own(one: Some) -> pa.Array:
    """Records' own names, in the folder of their label if they have no folder."""
    names = pc.replace_substring_regex(one.names, r"^\./", "")
    return pc.if_else(pc.match_substring(names, "/"), names, pc.coalesce(written(one.labels, "/", names), names))


def _missing(files: Sequence[File]) -> list[str]:
    """What names like `train-00003-of-00010` say of files that are not there."""
    parts = [match.groups() for file in files if (match := SHARD.search(file.path))]
    totals = {int(total) for _, total in parts}
    if len(totals) != 1 or len(parts) == sum(totals):
        return []
    return [f"{len(parts):,} of {sum(totals):,} files are there, by their names; get the others or name them in `uri`"]


class TfRecordReader(SpanReader):
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

    def check(self, ranges: Ranges, rows: slice) -> Check:
        """Checksums must fit: that of the record's length, and that of its data."""
        begins_N, ends_N = ranges.begins[rows], ranges.ends[rows]
        heads_NB = heads_of(ends_N - begins_N - FRAME.size - TAIL.size)

        def spoiled(block: memoryview, base: int, low: int, high: int) -> list[int]:
            places_N, stops_N = begins_N[low:high] - base, ends_N[low:high] - base - TAIL.size
            data: bytes = block.obj  # type: ignore[assignment]
            inside = zip((places_N + FRAME.size).tolist(), stops_N.tolist(), strict=True)
            sums_N = masked_all(np.array([crc32c(data[at:end]) for at, end in inside], np.uint32))
            bad_N = sums_N != pieces_of(data, stops_N, TAIL.size).view("<u4")[:, 0]
            bad_N |= (pieces_of(data, places_N, FRAME.size) != heads_NB[low:high]).any(axis=1)
            found: list[int] = np.flatnonzero(bad_N).tolist()
            return found

        return spoiled
