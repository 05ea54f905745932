"""Pieces of a set: what a block of queries or a shard of the gallery is made of, and how a set is cut into such.

A piece is a list of units in row order, named by the stored vectors of its units, not by where they stand in the set.
A unit may take part with some of its images only: those that an earlier cut did not have yet.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from operators.results import Places
from pipeline.stage import fingerprint

Ranges = tuple[tuple[int, int], ...]


class Segment(NamedTuple):
    """Images of one stored unit in a piece of an earlier cut."""

    content: str
    """SHA-256 of the unit's embeddings as stored."""
    name: str = ""
    taken: Ranges = ()
    """First and end of each range of its images that are in the piece; none: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One embedded unit of a set, or some of its images in a piece."""

    name: str
    content: str
    """SHA-256 of its embeddings as stored."""
    first_row: int
    images: int
    audited: int
    """Images with a vector."""
    taken: Ranges = ()
    """First and end of each range of stored images that this is of; none: all."""
    runs: Ranges = ()
    """Where row numbers do not go on by one: number of the image, and its row. None: they all go on from the first."""

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """First row and end of each run of rows."""
        starts = self.runs or ((0, self.first_row),)
        ends = [at for at, _ in starts[1:]] + [self.images]
        for (at, row), end in zip(starts, ends, strict=True):
            yield row, row + end - at


class Carry(Protocol):
    """What `pieces` asks of the embeddings where units have changed (`pipeline.carried.Carrier`)."""

    def rows(self, segment: Segment) -> NDArray[np.int64] | None:
        """The rows that the images of a segment have in the set now, with the same vectors; None if one has none."""

    def audited(self, name: str, taken: Ranges) -> int:
        """How many of these images of a stored unit have a vector."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Units of one set in row order: a shard of the gallery or a block of queries."""

    role: str
    units: tuple[Unit, ...]

    @cached_property
    def name(self) -> str:
        """Digest of the stored vectors and of the place of each."""
        return fingerprint([(unit.content, unit.images, *([unit.taken] if unit.taken else [])) for unit in self.units])

    @property
    def content(self) -> tuple[str, ...]:
        """What the units hold."""
        return tuple(unit.content for unit in self.units)

    @property
    def audited(self) -> int:
        """Images that take part."""
        return sum(unit.audited for unit in self.units)

    @property
    def places(self) -> Places:
        """Where runs of rows begin in the piece, and in the set."""
        offsets, rows, at = [], [], 0
        for unit in self.units:
            for offset, row in unit.runs or ((0, unit.first_row),):
                offsets.append(at + offset)
                rows.append(row)
            at += unit.images
        return Places(np.array(offsets, np.int64), np.array(rows, np.int64))


def pieces(
    role: str,
    units: Sequence[Unit],
    images: int,
    earlier: Sequence[tuple[Segment, ...]] = (),
    carry: Carry | None = None,
) -> list[Piece]:
    """Cut a set into pieces of at most `images` images, unless one unit alone is larger; each image is in one piece.

    Pieces of an `earlier` cut are kept if their images are all there in the same order, as whole units or, with
    `carry`, in any; the rest is cut anew.
    """
    current = {unit.content: unit for unit in units}
    free = np.ones(sum(unit.images for unit in units), bool)
    base = units[0].first_row if units else 0
    kept = []
    for segments in earlier:
        found = [_rows(segment, current, carry) for segment in segments]
        rows = [own for own in found if own is not None]
        whole = np.concatenate([np.zeros(0, np.int64), *rows])
        if len(rows) < len(found) or not (np.diff(whole) > 0).all() or not free[whole - base].all():
            continue
        free[whole - base] = False
        own = (_unit(*one, current, carry) for one in zip(segments, rows, strict=True))
        kept.append(Piece(role=role, units=tuple(own)))
    held: list[Unit] = []
    for left in (_left(unit, free[unit.first_row - base :][: unit.images], carry) for unit in units):
        if left is not None and held and sum(one.images for one in held) + left.images > images:
            kept.append(Piece(role=role, units=tuple(held)))
            held = []
        held += [left] if left is not None else []
    if held:
        kept.append(Piece(role=role, units=tuple(held)))
    return sorted(kept, key=lambda piece: piece.units[0].first_row)


def _rows(segment: Segment, current: Mapping[str, Unit], carry: Carry | None) -> NDArray[np.int64] | None:
    """The rows of a segment's images, or None if they are not all there."""
    unit = current.get(segment.content)
    if unit is None:
        return None if carry is None else carry.rows(segment)
    return unit.first_row + stored_rows(segment.taken, unit.images)


def stored_rows(taken: Ranges, images: int) -> NDArray[np.int64]:
    """Numbers of the images of a stored unit of `images` that are `taken`."""
    return np.concatenate([np.arange(*one) for one in taken or ((0, images),)])


def _unit(segment: Segment, rows: NDArray[np.int64], current: Mapping[str, Unit], carry: Carry | None) -> Unit:
    """A segment of an earlier cut with the rows that its images have now."""
    unit = current.get(segment.content)
    if unit is not None and not segment.taken:
        return unit
    name = segment.name if unit is None else unit.name
    return _part(name, segment.content, segment.taken, rows, carry)


def _left(unit: Unit, free: NDArray[np.bool_], carry: Carry | None) -> Unit | None:
    """The images of a unit that are in no piece yet."""
    if free.all() or not free.any():
        return unit if free.any() else None
    edges = np.flatnonzero(np.diff(np.concatenate([[0], free.view(np.int8), [0]]))).reshape(-1, 2)
    taken = tuple((first, end) for first, end in edges.tolist())
    return _part(unit.name, unit.content, taken, unit.first_row + np.flatnonzero(free), carry)


def _part(name: str, content: str, taken: Ranges, rows: NDArray[np.int64], carry: Carry | None) -> Unit:
    starts = np.flatnonzero(np.concatenate([[True], np.diff(rows) != 1]))
    return Unit(
        name=name,
        content=content,
        first_row=int(rows[0]),
        images=len(rows),
        audited=len(rows) if carry is None else carry.audited(name, taken),
        taken=taken,
        runs=tuple(zip(starts.tolist(), rows[starts].tolist(), strict=True)) if len(starts) > 1 else (),
    )
