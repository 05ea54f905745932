"""Exact nearest neighbours of release images in a shard, and their merge over shards.

faiss' flat index proposes and fp64 decides. Stored fp16 vectors are exact in fp32, and so are the products of two of
their components, so an fp32 inner product differs from the exact score by at most the accumulation error
gamma * |x| |y|, gamma = (d-1)u / (1-(d-1)u), u = 2^-24, in any order of summation (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., section 3.1). Everything within that margin is scored again exactly; a list is widened
until its last fetched score lies below the margin, so ties at the k-th place are complete.

All results are in one total order: cosine descending, release row, gallery row. Merging is therefore associative,
commutative and idempotent, and no partition into shards or blocks can change a result.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators.errors import CapacityError
from operators.gallery import Shard, refuse_unusable
from operators.tables import NEIGHBOURS, PAIRS
from operators.vectors import exact_cosines


class Scored(NamedTuple):
    """Scored pairs as parallel arrays of one length."""

    release: NDArray[np.int64]
    gallery: NDArray[np.int64]
    cosine: NDArray[np.float64]

    def take(self, index: NDArray[np.integer]) -> "Scored":
        """The pairs at `index`."""
        return Scored(self.release[index], self.gallery[index], self.cosine[index])


def margin(width: int, longest: float = 1.002) -> float:
    """Largest difference between an fp32 inner product of two stored vectors and their exact cosine.

    `longest` bounds the product of the two lengths; stored lengths are 1 within 1e-3.
    """
    steps = (width - 1) * 2.0**-24
    return steps / (1 - steps) * longest


class ShardSearch:
    """Searches one shard; the faiss index is built once and the object is then read-only."""

    def __init__(self, part: Shard) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        self.part = part
        width = part.distinct_UD.shape[1]
        self.margin = margin(width)
        self.index = faiss.IndexFlatIP(width)
        self.index.add(np.ascontiguousarray(part.distinct_UD, np.float32))

    def nearest(self, rows_Q: NDArray[np.int64], queries_QD: NDArray[np.float16], k: int) -> Scored:
        """The `k` best gallery rows of each query (fewer if the shard is smaller), ties broken by row number."""
        refuse_unusable(rows_Q, queries_QD)
        if not len(rows_Q) or not self.index.ntotal:
            return EMPTY
        query, group = self._proposals(np.ascontiguousarray(queries_QD, np.float32), k)
        return best(self._expand(rows_Q, queries_QD, query, group, limit=k), k)

    def _proposals(self, queries_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs (query, distinct vector) that hold the k best of every query for certain."""
        distinct = self.index.ntotal
        queries: list[NDArray[np.int64]] = []
        groups: list[NDArray[np.int64]] = []
        pending = np.arange(len(queries_QD))
        fetch = min(k + 16, distinct)
        while len(pending):
            scores, found = self.index.search(queries_QD[pending], fetch)
            bar = scores[:, min(k, distinct) - 1] - 2 * self.margin
            complete = (scores[:, -1] < bar) | (fetch == distinct)
            keep = (scores >= bar[:, None]) & complete[:, None]
            queries.append(pending[np.nonzero(keep)[0]])
            groups.append(found[keep])
            pending = pending[~complete]
            fetch = min(4 * fetch, distinct)
        return np.concatenate(queries), np.concatenate(groups)

    def above(self, rows_Q: NDArray[np.int64], queries_QD: NDArray[np.float16], floor: float, max_pairs: int) -> Scored:
        """Every pair whose exact cosine is at least `floor`.

        Raises
        ------
        CapacityError
            If there are more than `max_pairs` of them in this tile.
        """
        refuse_unusable(rows_Q, queries_QD)
        if not len(rows_Q) or not self.index.ntotal:
            return EMPTY
        radius = np.nextafter(np.float32(floor - self.margin), np.float32(-2))
        limits, _, group = self.index.range_search(np.ascontiguousarray(queries_QD, np.float32), float(radius))
        found = limits.astype(np.int64)
        query = np.repeat(np.arange(len(rows_Q)), found[1:] - found[:-1])
        sizes = np.diff(self.part.starts)[group]
        if sizes.sum() > max_pairs:
            raise CapacityError(
                f"{sizes.sum():,} pairs of one tile reach search.floor={floor}; search.max_pairs is {max_pairs:,}. "
                f"Raise the floor, or raise the limit."
            )
        scored = self._expand(rows_Q, queries_QD, query, group.astype(np.int64), limit=None)
        return ordered(scored.take(np.flatnonzero(scored.cosine >= floor)))

    def _expand(
        self,
        rows_Q: NDArray[np.int64],
        queries_QD: NDArray[np.float16],
        query: NDArray[np.int64],
        group: NDArray[np.int64],
        limit: int | None,
    ) -> Scored:
        """Exact scores of (query, distinct vector) pairs, one row per gallery row that has the vector.

        `limit` keeps the first rows of a group only: no more can enter a list of that length.
        """
        cosine = np.concatenate(
            [
                exact_cosines(queries_QD[query[at : at + RESCORED]], self.part.distinct_UD[group[at : at + RESCORED]])
                for at in range(0, max(1, len(query)), RESCORED)
            ]
        )
        sizes = np.diff(self.part.starts)[group]
        sizes = sizes if limit is None else np.minimum(sizes, limit)
        pair = np.repeat(np.arange(len(query)), sizes)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        gallery = self.part.rows[self.part.starts[group[pair]] + within]
        return Scored(rows_Q[query[pair]], gallery, cosine[pair])


RESCORED = 1 << 16
"""Pairs that are scored again in one step, which bounds memory."""

EMPTY = Scored(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float64))


def ordered(scored: Scored) -> Scored:
    """The pairs in the total order (cosine descending, release row, gallery row), each once."""
    order = np.lexsort((scored.gallery, scored.release, -scored.cosine))
    result = scored.take(order)
    if not len(order):
        return result
    same = (result.release[1:] == result.release[:-1]) & (result.gallery[1:] == result.gallery[:-1])
    return result.take(np.flatnonzero(np.concatenate([[True], ~same])))


def best(scored: Scored, k: int) -> Scored:
    """The `k` best pairs of every release row, sorted by release row, then cosine descending, then gallery row."""
    unique = ordered(scored)
    by_release = unique.take(np.argsort(unique.release, kind="stable"))
    return by_release.take(np.flatnonzero(ranks(by_release.release) <= k))


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


def pairs_table(arms: Sequence[tuple[str, Scored]]) -> pa.Table:
    """`ordered` results of each arm under the PAIRS contract."""
    tables = [
        pa.table([s.release, pa.array([arm] * len(s.release), pa.string()), s.gallery, s.cosine], schema=PAIRS.schema)
        for arm, s in arms
    ]
    return pa.concat_tables([PAIRS.schema.empty_table(), *tables]).combine_chunks()
