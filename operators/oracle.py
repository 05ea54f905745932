"""The search without an engine, for checking engines: all comparisons in plain fp64 arithmetic."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators import histogram, vectors
from operators.neighbors import Scored
from operators.tables import NEIGHBOURS, PAIRS


class Oracle:
    """All comparisons of some release images with one arm, unit by unit, in plain fp64 arithmetic."""

    def __init__(self, rows_Q: NDArray[np.int64], queries_QD: NDArray[np.float16], k: int, floor: float) -> None:
        self.rows_Q, self.queries_QD, self.k, self.floor = rows_Q, queries_QD, k, floor
        self.best_QK = np.zeros((len(rows_Q), 0), np.float64)
        self.best_rows_QK = np.zeros((len(rows_Q), 0), np.int64)
        self.over: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
        self.comparisons = 0
        self.counts = np.zeros(len(histogram.EDGES) - 1, np.int64)
        """Comparisons by bins of `operators.histogram.EDGES`."""

    def add(self, rows_G: NDArray[np.int64], vectors_GD: NDArray[np.float16]) -> int:
        """Compare with the next audited gallery images, whose row numbers exceed all before; return how many."""
        cosine_QG = vectors.exact_matrix(self.queries_QD, vectors_GD)
        self.comparisons += cosine_QG.size
        self.counts += histogram.counts_of(cosine_QG.ravel())
        query, hit = np.nonzero(cosine_QG >= self.floor)
        self.over.append((self.rows_Q[query], rows_G[hit], cosine_QG[query, hit]))
        cosine = np.concatenate([self.best_QK, cosine_QG], axis=1)
        rows = np.concatenate([self.best_rows_QK, np.broadcast_to(rows_G, cosine_QG.shape)], axis=1)
        # Of equal cosines the lower row stands further left, and the sort is stable: the total order.
        order = np.argsort(-cosine, axis=1, kind="stable")[:, : self.k]
        self.best_QK = np.take_along_axis(cosine, order, axis=1)
        self.best_rows_QK = np.take_along_axis(rows, order, axis=1)
        return len(rows_G)

    def best(self) -> Scored:
        """The best of each release image, by release row."""
        kept = self.best_QK.shape[1]
        return Scored(np.repeat(self.rows_Q, kept), self.best_rows_QK.ravel(), self.best_QK.ravel())

    def above(self) -> Scored:
        """All pairs from the floor up, by release row, then in the total order."""
        none = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        release, gallery, cosine = (np.concatenate(parts) for parts in zip(none, *self.over, strict=True))
        order = np.lexsort((gallery, -cosine, release))
        return Scored(release[order], gallery[order], cosine[order])

    def neighbours(self, arm: str) -> pa.Table:
        """`best` under the NEIGHBOURS contract."""
        found = self.best()
        ranks = np.tile(np.arange(1, self.best_QK.shape[1] + 1, dtype=np.int32), len(self.rows_Q))
        arms = pa.repeat(arm, len(ranks))
        return pa.table([found.release, arms, found.gallery, ranks, found.cosine], schema=NEIGHBOURS.schema)

    def pairs(self, arm: str) -> pa.Table:
        """`above` under the PAIRS contract."""
        found = self.above()
        arms = pa.repeat(arm, len(found.cosine))
        return pa.table([found.release, arms, found.gallery, found.cosine], schema=PAIRS.schema)
