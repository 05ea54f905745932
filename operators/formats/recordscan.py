"""All records of an MXNet RecordIO file: those in one part many at a time, the others one by one."""

from dataclasses import dataclass, field
from io import BufferedIOBase

import numpy as np
from numpy.typing import NDArray

from operators.formats.dmlc import HEADER, WORDS, Damaged, Record, followed, heads_at, next_record, plain, record_at
from operators.formats.indexes import Offsets
from operators.formats.listing import Bound
from operators.formats.spans import NOWHERE

FEWEST, MOST = 64, 65_536
"""Records looked at in one go: few behind a damaged one, more as long as all goes well."""

LOST = "the index names records where none begin"


@dataclass(slots=True)
class Found:
    """What one `.rec` file holds."""

    columns: list[NDArray[np.int64]] = field(default_factory=list)
    """Pieces (5, N) of number, offset, bytes of the first part with its words, and size of each image, and where it
    begins or `NOWHERE`."""
    values: list[NDArray[np.float64]] = field(default_factory=list)
    """Their labels, in pieces of the same lengths."""
    more: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """All labels of records that have several, by their number, where attributes are asked for."""
    faults: list[tuple[int | None, int, str]] = field(default_factory=list)
    """Number, offset and reason of what cannot be read."""
    images: int = 0
    ranges: int = 0
    """Records without an image: InsightFace's header and identities."""
    first_identity: int | None = None
    """The number of the first identity record, by the header record."""

    def joined(self) -> NDArray[np.int64]:
        """All columns (5, N)."""
        return np.concatenate(self.columns, axis=1) if self.columns else np.zeros((5, 0), np.int64)

    def labels(self) -> NDArray[np.float64]:
        """All labels (N,)."""
        return np.concatenate(self.values) if self.values else np.zeros(0)


def scan(file: BufferedIOBase, end: int, index: Offsets, several: bool, bound: Bound) -> Found:
    """All records from the beginning of a file to its end; what is damaged is stepped over to the next record.

    Raises
    ------
    FormatError
        If `bound` does not allow so many.
    """
    found, at, known, count, step = Found(), 0, 0, 0, FEWEST
    unmet: list[int] = []
    while at < end:
        while known < len(index.starts) and index.starts[known] < at:
            unmet.append(known)
            known += 1
        here = known < len(index.starts) and index.starts[known] == at
        bound(found.images, len(found.faults), found.faults[-1][2] if found.faults else "")
        if not several and (here or not len(index.starts)):
            stretch = _stretch(found, file, end, (at, known, count), index, step)
            step = min(step * 8, MOST) if stretch[1] == step else FEWEST
            at, met = stretch
            known, count = known + met * here, count + met
            if met:
                continue
        number = int(index.indices[known]) if here else (count if not len(index.starts) else None)
        known, count = known + here, count + 1
        try:
            record = record_at(file, at, end)
        except Damaged as fault:
            found.faults.append((number, at, str(fault)))
            at = next_record(file, at + 4, end)
            continue
        _keep(found, at, -1 - count if number is None else number, record, several)
        at = record.after
    for one in (*unmet, *range(known, len(index.starts))):
        number = int(index.indices[one])
        if found.first_identity is None or number < found.first_identity:
            where = int(index.starts[one])
            found.faults.append((number, where, f"the index names this record at byte {where:,}, where none begins"))
            bound(found.images, len(found.faults), LOST)
    return found


def _stretch(
    found: Found, file: BufferedIOBase, end: int, at: tuple[int, int, int], index: Offsets, most: int
) -> tuple[int, int]:
    """Keep records in one part that follow one another; where the next begins, and their number, which may be 0.

    `at` are the place of the first in the file, in the index if there is one, and among all records.
    """
    place, known, count = at
    if len(index.starts):
        starts_N = index.starts[known : known + most]
        heads_N = heads_at(file, starts_N)
    else:
        starts_N, heads_N = followed(file, place, end, most)
    met, words_N = plain(starts_N, heads_N, end)
    if not met:
        return place, 0
    starts_N, heads_N, words_N = starts_N[:met], heads_N[:met], words_N[:met]
    numbers_N = index.indices[known : known + met] if len(index.starts) else np.arange(count, count + met)
    flags_N = heads_N["flag"].astype(np.int64)
    labels_N = np.where(flags_N == 0, heads_N["label"], heads_N["more"]).astype(np.float64)
    sizes_N = words_N - HEADER.size - 4 * flags_N
    images_N = (sizes_N > 0) | (flags_N < 2)
    if place == 0 and not images_N[0]:
        _announced(found, float(labels_N[0]))
    found.ranges += int((~images_N).sum())
    columns = np.stack([numbers_N, starts_N, WORDS.size + words_N, sizes_N, starts_N + WORDS.size + words_N - sizes_N])
    found.columns.append(columns[:, images_N])
    found.images += int(images_N.sum())
    found.values.append(labels_N[images_N])
    last = int(starts_N[-1] + WORDS.size + words_N[-1])
    return last + int(-words_N[-1] % 4), met


def _announced(found: Found, first: float) -> None:
    """What InsightFace's header record says: the number of the first identity record."""
    if first < 2**24:  # beyond, a float32 cannot hold every number
        found.first_identity = int(first) if first > 0 else None


def _keep(found: Found, at: int, number: int, record: Record, several: bool) -> None:
    if record.size == 0 and record.flag >= 2:
        found.ranges += 1
        if at == 0:
            _announced(found, record.labels[0])
        return
    span = WORDS.size + record.parts[0][1]
    start = at + span - record.size if len(record.parts) == 1 else NOWHERE
    found.columns.append(np.array([[number], [at], [span], [record.size], [start]], np.int64))
    found.values.append(np.array([record.labels[0]]))
    found.images += 1
    if several:
        found.more[number] = record.labels
