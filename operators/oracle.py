"""The search without an engine, for checking engines: all comparisons in plain fp64 arithmetic."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators import vectors
from operators.tables import NEIGHBOURS, PAIRS


class Oracle:
    """All comparisons of some release images with one arm, unit by unit, in plain fp64 arithmetic."""

    def __init__(self, rows_Q: NDArray[np.int64], queries_QD: NDArray[np.float16], k: int, floor: float) -> None:
        self.rows_Q, self.queries_QD, self.k, self.floor = rows_Q, queries_QD, k, floor
        self.best_QK = np.zeros((len(rows_Q), 0), np.float64)
        self.best_rows_QK = np.zeros((len(rows_Q), 0), np.int64)
        self.over: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []

    def add(self, rows_G: NDArray[np.int64], vectors_GD: NDArray[np.float16]) -> int:
        """Compare with the next audited gallery images, whose row numbers exceed all before; return how many."""
        cosine_QG = vectors.exact_matrix(self.queries_QD, vectors_GD)
        query, hit = np.nonzero(cosine_QG >= self.floor)
        self.over.append((self.rows_Q[query], rows_G[hit], cosine_QG[query, hit]))
        cosine = np.concatenate([self.best_QK, cosine_QG], axis=1)
        rows = np.concatenate([self.best_rows_QK, np.broadcast_to(rows_G, cosine_QG.shape)], axis=1)
        # Of equal cosines the lower row stands further left, and the sort is stable: the total order.
        order = np.argsort(-cosine, axis=1, kind="stable")[:, : self.k]
        self.best_QK = np.take_along_axis(cosine, order, axis=1)
        self.best_rows_QK = np.take_along_axis(rows, order, axis=1)
        return len(rows_G)

    def neighbours(self, arm: str) -> pa.Table:
        """The best neighbours of each release image, by release row, under the NEIGHBOURS contract."""
        count, kept = self.best_QK.shape
        ranks = np.tile(np.arange(1, kept + 1, dtype=np.int32), count)
        release, arms = np.repeat(self.rows_Q, kept), pa.repeat(arm, count * kept)
        columns = [release, arms, self.best_rows_QK.ravel(), ranks, self.best_QK.ravel()]
        return pa.table(columns, schema=NEIGHBOURS.schema)

    def pairs(self, arm: str) -> pa.Table:
        """All pairs from the floor up, by release row, then in the total order, under the PAIRS contract."""
        release, gallery, cosine = (np.concatenate(parts) for parts in zip(*self.over, strict=True))
        order = np.lexsort((gallery, -cosine, release))
        columns = [release[order], pa.repeat(arm, len(order)), gallery[order], cosine[order]]
        return pa.table(columns, schema=PAIRS.schema)
