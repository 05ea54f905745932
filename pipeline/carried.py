"""Where the images of an earlier cut stand now, when the units that they were listed in are there no more.

An image that is added to a set makes another unit of the one that it falls into. The others of that unit still have
their vectors, one row further on, and every tile that they were in still says what it said. So the stored vectors of
the earlier unit are compared, bit for bit, with those that the same images have in the units of today.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from operators import vectors
from pipeline.embed import unit_store
from pipeline.pieces import Ranges, Segment, Unit, stored_rows

if TYPE_CHECKING:
    from pipeline.stage import Run

HELD = 4
"""Units whose vectors are kept in memory: earlier and present units are met in the same order."""

Vectors = tuple[NDArray[np.bool_], NDArray[np.uint16]]
"""Which images of a unit have a vector (N,), and the bits of all vectors, zero where there is none (N, D)."""


class Carrier:
    """Finds the images of stored units in a set as it is listed and embedded now."""

    def __init__(self, run: "Run", units: Sequence[Unit], earlier: Sequence[tuple[Segment, ...]]) -> None:
        self._store, self._units = unit_store(run), units
        whole = {segment.content for piece in earlier for segment in piece if not segment.taken}
        self._changed = [unit for unit in units if unit.content not in whole]
        self._firsts = np.array([unit.first_row for unit in units], np.int64)
        self._held: dict[str, Vectors] = {}

    def rows(self, segment: Segment) -> NDArray[np.int64] | None:
        """The rows that a segment's images have now, shape (N,); None if one is gone, or has another vector."""
        made = self._store.find(segment.name) if segment.name else None
        if made is None or made.sha256 != segment.content:
            return None
        taken = stored_rows(segment.taken, made.rows)
        keys = self._keys(segment.name)
        found = [self._row_of.get(keys[at], -1) for at in taken.tolist()]
        if min(found, default=-1) < 0:
            return None
        rows = np.array(found, np.int64)
        valid, bits = (column[taken] for column in self._vectors(segment.name))
        unit_N = np.searchsorted(self._firsts, rows, side="right") - 1
        for at in np.unique(unit_N).tolist():
            own = np.flatnonzero(unit_N == at)
            now_valid, now_bits = self._vectors(self._units[at].name)
            places = rows[own] - self._firsts[at]
            if not np.array_equal(valid[own], now_valid[places]) or not np.array_equal(bits[own], now_bits[places]):
                return None
        return rows

    def audited(self, name: str, taken: Ranges) -> int:
        """How many of these images of a stored unit have a vector."""
        valid, _ = self._vectors(name)
        return int(valid[stored_rows(taken, len(valid))].sum())

    @cached_property
    def _row_of(self) -> dict[str, int]:
        """The row of each image that is not in a unit of the earlier cut."""
        return {
            key: row for unit in self._changed for row, key in enumerate(self._keys(unit.name), start=unit.first_row)
        }

    def _keys(self, name: str) -> list[str]:
        found: list[str] = self._store.read(name, ["key"])["key"].to_pylist()
        return found

    def _vectors(self, name: str) -> Vectors:
        if name not in self._held:
            while len(self._held) >= HELD:
                del self._held[next(iter(self._held))]
            column = self._store.read(name, ["vector"])["vector"].combine_chunks()
            valid = np.asarray(column.is_valid())
            bits = np.zeros((len(column), column.type.list_size), np.uint16)
            bits[valid] = vectors.from_arrow(column.drop_null()).view(np.uint16)
            self._held[name] = valid, bits
        return self._held[name]
