"""Compiled inner loops of the exact search. Importing this module loads Numba; import it where it is used.

Sums of products of stored vectors are exact in fp64 in any order (`operators/vectors.py`), so the compiler may reorder
them (`fastmath`) without changing a bit.
"""

import os
from pathlib import Path

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

CACHE = os.access(Path(__file__).parent, os.W_OK)
"""Compiled code is kept beside the source where that can be written; elsewhere every process compiles for itself."""


@njit(parallel=True, fastmath=True, nogil=True, cache=CACHE)
def exact_pairs(
    left_QD: NDArray[np.float32], right_GD: NDArray[np.float32], q: NDArray[np.int32], g: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Exact cosine of row q[i] of `left_QD` with row g[i] of `right_GD`, shape (M,)."""
    cosines = np.empty(len(q), np.float64)
    for i in prange(len(q)):
        left, right = left_QD[q[i]], right_GD[g[i]]
        total = 0.0
        for j in range(left_QD.shape[1]):
            total += np.float64(left[j]) * np.float64(right[j])
        cosines[i] = total
    return cosines


@njit(parallel=True, nogil=True, cache=CACHE)
def best_of_each(
    owner: NDArray[np.int32], owners: int, cosine: NDArray[np.float64], order: NDArray[np.int64], limit: int
) -> NDArray[np.bool_]:
    """Which entries are among the `limit` best of their owner, by highest cosine, then lowest `order`; shape (M,)."""
    start = np.zeros(owners + 1, np.int64)
    for i in range(len(owner)):
        start[owner[i] + 1] += 1
    for o in range(owners):
        start[o + 1] += start[o]
    fill = start.copy()
    slot = np.empty(len(owner), np.int64)
    for i in range(len(owner)):
        slot[fill[owner[i]]] = i
        fill[owner[i]] += 1
    kept = np.zeros(len(owner), np.bool_)
    for o in prange(owners):
        own = slot[start[o] : start[o + 1]]
        bar = -np.inf
        if len(own) > limit:
            bar = np.partition(cosine[own], len(own) - limit)[len(own) - limit]
        ties = 0
        for i in own:
            kept[i] = cosine[i] > bar or len(own) <= limit
            ties += cosine[i] == bar
        if len(own) > limit:
            _first_ties(own, cosine, order, kept, bar, ties, limit)
    return kept


@njit(nogil=True, cache=CACHE)
def _first_ties(
    own: NDArray[np.int64],
    cosine: NDArray[np.float64],
    order: NDArray[np.int64],
    kept: NDArray[np.bool_],
    bar: float,
    ties: int,
    limit: int,
) -> None:
    """Fill the places that better entries left with the entries at the bar that come first in `order`."""
    room = limit
    tied = np.empty(ties, np.int64)
    n = 0
    for i in own:
        if kept[i]:
            room -= 1
        elif cosine[i] == bar:
            tied[n] = i
            n += 1
    for i in tied[np.argsort(order[tied])[:room]]:
        kept[i] = True


@njit(nogil=True, cache=CACHE)
def raise_bars(bars_GC: NDArray[np.float32], g: NDArray[np.int32], score: NDArray[np.float32]) -> None:
    """Enter scores into the lists of the C highest of each row of `bars_GC`, kept in descending order."""
    last = bars_GC.shape[1] - 1
    for i in range(len(g)):
        row = bars_GC[g[i]]
        if score[i] > row[last]:
            at = last
            while at > 0 and row[at - 1] < score[i]:
                row[at] = row[at - 1]
                at -= 1
            row[at] = score[i]
