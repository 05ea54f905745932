"""Exact neighbours of a block of the release in a shard of the gallery, both ways, and their merge.

An engine proposes pairs by a filter with a proven margin (`operators/engines.py`); here they are scored exactly and
the best are kept. All results are in one total order: cosine descending, release row, gallery row. Merging is therefore
associative, commutative and idempotent, and no partition into shards or blocks can change a result.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators.engines import Wanted, open_engine
from operators.errors import CapacityError
from operators.gallery import Shard, shard
from operators.tables import CLOSEST, NEIGHBOURS, PAIRS


class Scored(NamedTuple):
    """Scored pairs as parallel arrays of one length."""

    release: NDArray[np.int64]
    gallery: NDArray[np.int64]
    cosine: NDArray[np.float64]

    def turned(self) -> "Scored":
        """The same pairs with the sides exchanged."""
        return Scored(self.gallery, self.release, self.cosine)

    def take(self, index: NDArray[np.integer]) -> "Scored":
        """The pairs at `index`."""
        return Scored(self.release[index], self.gallery[index], self.cosine[index])


class Tile(NamedTuple):
    """What one block of the release gives against one shard."""

    nearest: Scored
    """The best gallery rows of each release row."""
    closest: Scored
    """The best release rows of each gallery row."""
    pairs: Scored
    """All pairs from the floor up."""


class ShardSearch:
    """Searches one shard, which is read-only after it was loaded."""

    def __init__(self, part: Shard, engine: str, wanted: Wanted) -> None:
        """Open the engine called `engine`; `auto` takes the faster one on this worker."""
        self.part, self.wanted = part, wanted
        self.engine = open_engine(engine, part.distinct_UD, wanted) if len(part.distinct_UD) else None

    def tile(self, rows_Q: NDArray[np.int64], queries_QD: NDArray[np.float16], max_pairs: int) -> Tile:
        """What is wanted of the release rows against this shard, every cosine exact.

        Raises
        ------
        SchemaMismatch
            If a query is not finite or not of unit length.
        CapacityError
            If more than `max_pairs` pairs reach the floor.
        """
        from operators.kernels import best_of_each

        block = shard(rows_Q, queries_QD)
        if self.engine is None or not len(block.rows):
            return Tile(EMPTY, EMPTY, EMPTY)
        query, group, cosine = self.engine.propose(block.distinct_UD, self.wanted)
        k, columns, floor = self.wanted
        row = best_of_each(query, len(block.distinct_UD), cosine, group, k)
        nearest = best(self._expanded(block, query[row], group[row], cosine[row], None, k), k)
        count = len(self.part.distinct_UD)
        column = best_of_each(group, count, cosine, query, columns)
        found = self._expanded(block, query[column], group[column], cosine[column], columns, None)
        closest = best(found.turned(), columns)
        over = cosine >= (np.inf if floor is None else floor)
        self._refuse_too_many(block, query[over], group[over], max_pairs)
        pairs = ordered(self._expanded(block, query[over], group[over], cosine[over], None, None))
        return Tile(nearest, closest.turned(), pairs)

    def _refuse_too_many(
        self, block: Shard, query: NDArray[np.int32], group: NDArray[np.int32], max_pairs: int
    ) -> None:
        count = int((np.diff(block.starts)[query] * np.diff(self.part.starts)[group]).sum())
        if count > max_pairs:
            raise CapacityError(
                f"{count:,} pairs of one tile reach search.floor={self.wanted.floor}; "
                f"search.max_pairs is {max_pairs:,}. Raise the floor, or raise the limit."
            )

    def _expanded(
        self,
        block: Shard,
        query: NDArray[np.int32],
        group: NDArray[np.int32],
        cosine: NDArray[np.float64],
        left_limit: int | None,
        right_limit: int | None,
    ) -> Scored:
        """Pairs of distinct vectors as pairs of rows.

        A limit keeps the first rows of equal vectors only: no more can enter a list of that length.
        """
        pair, left = _rows_of(block, query, left_limit)
        again, right = _rows_of(self.part, group[pair], right_limit)
        return Scored(left[again], right, cosine[pair[again]])


def _rows_of(part: Shard, groups: NDArray[np.int32], limit: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each of `groups` its rows: which entry of `groups` a row belongs to, and the row."""
    if len(part.rows) == len(part.distinct_UD):
        return np.arange(len(groups)), part.rows[groups]
    sizes = np.diff(part.starts)[groups]
    sizes = sizes if limit is None else np.minimum(sizes, limit)
    entry = np.repeat(np.arange(len(groups)), sizes)
    within = np.arange(len(entry)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return entry, part.rows[part.starts[groups[entry]] + within]


EMPTY = Scored(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float64))


def ordered(scored: Scored) -> Scored:
    """The pairs in the total order (cosine descending, release row, gallery row), each once."""
    return _once(scored.take(np.lexsort((scored.gallery, scored.release, -scored.cosine))))


def best(scored: Scored, k: int) -> Scored:
    """The `k` best pairs of every release row, sorted by release row, then cosine descending, then gallery row."""
    if not len(scored.release):
        return scored
    from operators.kernels import sort_lists

    place = np.argsort(scored.release, kind="stable")
    sorted_release = scored.release[place]
    starts = np.flatnonzero(np.concatenate([[True], sorted_release[1:] != sorted_release[:-1], [True]]))
    sort_lists(starts, scored.cosine, scored.gallery, place)
    unique = _once(scored.take(place))
    return unique if np.diff(starts).max() <= k else unique.take(np.flatnonzero(ranks(unique.release) <= k))


def _once(scored: Scored) -> Scored:
    """The pairs without repetitions, which must be adjacent."""
    if not len(scored.release):
        return scored
    same = (scored.release[1:] == scored.release[:-1]) & (scored.gallery[1:] == scored.gallery[:-1])
    if not same.any():
        return scored
    return scored.take(np.flatnonzero(np.concatenate([[True], ~same])))


def ranks(release: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each pair in its release row's list, from 1; equal release rows must be adjacent."""
    if not len(release):
        return np.zeros(0, np.int64)
    first = np.concatenate([[True], release[1:] != release[:-1]])
    start = np.maximum.accumulate(np.where(first, np.arange(len(release)), 0))
    return np.arange(len(release)) - start + 1


def merged(parts: Sequence[Scored]) -> Scored:
    """The union of results, not yet ordered."""
    return Scored(*(np.concatenate(arrays) for arrays in zip(EMPTY, *parts, strict=True)))


def neighbours_table(arms: Sequence[tuple[str, Scored]]) -> pa.Table:
    """`best` results of each arm under the NEIGHBOURS contract."""
    tables = [
        pa.table(
            [
                s.release,
                pa.array([arm] * len(s.release), pa.string()),
                s.gallery,
                pa.array(ranks(s.release), pa.int32()),
                s.cosine,
            ],
            schema=NEIGHBOURS.schema,
        )
        for arm, s in arms
    ]
    return pa.concat_tables([NEIGHBOURS.schema.empty_table(), *tables]).combine_chunks()


def closest_table(arms: Sequence[tuple[str, Scored]]) -> pa.Table:
    """`closest` results of each arm under the CLOSEST contract; sorted by gallery row and rank."""
    tables = []
    for arm, scored in arms:
        names = pa.array([arm] * len(scored.gallery), pa.string())
        places = pa.array(ranks(scored.gallery), pa.int32())
        tables.append(pa.table([names, scored.gallery, scored.release, places, scored.cosine], schema=CLOSEST.schema))
    return pa.concat_tables([CLOSEST.schema.empty_table(), *tables]).combine_chunks()


def pairs_table(arms: Sequence[tuple[str, Scored]]) -> pa.Table:
    """`ordered` results of each arm under the PAIRS contract."""
    tables = [
        pa.table([s.release, pa.array([arm] * len(s.release), pa.string()), s.gallery, s.cosine], schema=PAIRS.schema)
        for arm, s in arms
    ]
    return pa.concat_tables([PAIRS.schema.empty_table(), *tables]).combine_chunks()
