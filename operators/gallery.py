"""A shard of the gallery: stored vectors with their row numbers, exact duplicates collapsed."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.errors import SchemaMismatch
from operators.vectors import NORM_TOLERANCE


class Shard(NamedTuple):
    """Distinct vectors in the order of their first rows, and which rows have each.

    Rows of equal bytes have equal scores against everything. Collapsing them keeps a search for k neighbours from being
    flooded by a group of copies larger than k: an ordinary top-k cuts through ties before any tie-break sees them.
    """

    distinct_UD: NDArray[np.float16]
    rows: NDArray[np.int64]
    """Row numbers, grouped by distinct vector, ascending inside a group; shape (G,)."""
    starts: NDArray[np.int64]
    """Where group u begins in `rows`; shape (U + 1,), the last entry is G."""


def shard(rows_G: NDArray[np.int64], vectors_GD: NDArray[np.float16]) -> Shard:
    """Collapse a shard.

    Raises
    ------
    SchemaMismatch
        If a vector is not finite or not of unit length; the message names its row.
    """
    refuse_unusable(rows_G, vectors_GD)
    by_row = np.argsort(rows_G, kind="stable")
    ordered = np.ascontiguousarray(vectors_GD[by_row])
    ordered[ordered == 0] = 0  # -0 and 0 score alike
    keys = ordered.view(np.dtype((np.void, ordered.dtype.itemsize * ordered.shape[1]))).ravel()
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    group = np.argsort(order)[group]
    members = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=len(first)))])
    return Shard(ordered[first[order]], rows_G[by_row][members], starts.astype(np.int64))


def refuse_unusable(rows_N: NDArray[np.int64], vectors_ND: NDArray[np.float16]) -> None:
    """Raise SchemaMismatch, naming the row, if a vector could not take part in an exact search."""
    with np.errstate(invalid="ignore", over="ignore"):
        lengths = np.linalg.norm(vectors_ND.astype(np.float64), axis=1)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) <= NORM_TOLERANCE))
    if len(wrong):
        row = rows_N[wrong[0]]
        raise SchemaMismatch(
            f"embeddings row {row}: the vector's length is {lengths[wrong[0]]:.4g}, not 1 within {NORM_TOLERANCE}. "
            f"Delete the embeddings of its unit and run embed again."
        )
