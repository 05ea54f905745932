"""Compiled inner loops of the exact search. Importing this module loads Numba; import it where it is used.

Sums of products of stored vectors are exact in fp64 in any order (`operators/vectors.py`), so the compiler may reorder
them (`fastmath`) without changing a bit.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

CACHE = os.access(Path(__file__).parent, os.W_OK)
"""Compiled code is kept beside the source where that can be written; elsewhere every process compiles for itself."""


GROUP = 64
"""Scores that are compared with their bars at once, without a branch."""
TINY = np.finfo(np.float32).tiny


@njit(fastmath=True, nogil=True, cache=CACHE)
def _cosine(left_D: NDArray[np.float32], right_D: NDArray[np.float32]) -> float:
    total = 0.0
    for j in range(len(left_D)):
        total += np.float64(left_D[j]) * np.float64(right_D[j])
    return total


@njit(parallel=True, nogil=True, cache=CACHE)
def exact_pairs(
    left_QD: NDArray[np.float32], right_GD: NDArray[np.float32], q: NDArray[np.int32], g: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Exact cosine of row q[i] of `left_QD` with row g[i] of `right_GD`, shape (M,)."""
    cosines = np.empty(len(q), np.float64)
    for i in prange(len(q)):
        cosines[i] = _cosine(left_QD[q[i]], right_GD[g[i]])
    return cosines


@njit(nogil=True, cache=CACHE)
def _any_reaches(bits_C: NDArray[Any], row_bar: Any, bars_C: NDArray[Any]) -> bool:
    """Whether one of GROUP scores reaches the bar of its row or of its column; compiles to a few wide compares."""
    found = False
    for j in range(GROUP):
        found |= (bits_C[j] >= row_bar) | (bits_C[j] >= bars_C[j])
    return found


@njit(nogil=True, cache=CACHE)
def _reaching(bits_G: NDArray[Any], row_bar: Any, bars_G: NDArray[Any], places: NDArray[np.int64]) -> int:
    """Write to `places` which scores of one query reach the bar of the query or their own; how many these are."""
    n = np.uint64(0)  # an unsigned index is not checked for being negative
    whole = len(bits_G) // GROUP * GROUP
    for at in range(0, whole, GROUP):
        scores, bars = bits_G[at : at + GROUP], bars_G[at : at + GROUP]
        if _any_reaches(scores, row_bar, bars):
            for j in range(GROUP):  # a branch for every score would be mispredicted too often
                places[n] = at + j
                n += np.uint64((scores[j] >= row_bar) | (scores[j] >= bars[j]))
    for g in range(whole, len(bits_G)):
        if bits_G[g] >= row_bar or bits_G[g] >= bars_G[g]:
            places[n] = g
            n += np.uint64(1)
    return int(n)


@njit(nogil=True, cache=CACHE)
def _as_bits(bar: float, lowest: Any) -> int:
    """`MixedEngine.as_bits` of one bar; `lowest` is the lowest integer of its type."""
    low = np.float32(bar)
    if low <= TINY:
        return int(lowest)
    below = low.view(np.int32) - 1
    return int(below >> 16) if lowest == -32768 else int(below)


@njit(parallel=True, nogil=True, cache=CACHE)
def sweep(
    bits_QG: NDArray[Any],
    left_QD: NDArray[np.float32],
    right_GD: NDArray[np.float32],
    rows: tuple[NDArray[Any], NDArray[np.float64]],
    columns: tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]],
    wanted: int,
    done_B: NDArray[np.int64],
    out: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]],
    count_B: NDArray[np.int64],
) -> None:
    """Score exactly what reaches the bar of its row or column in one product, and keep what may be wanted.

    `rows` are the bars as bits and as exact cosines, shape (Q,). `columns` are the bars as bits (G,), the errors of
    scores (G,) and the `wanted` highest cosines so far in descending order (G, C); all but the errors follow what is
    found. Each of B threads has its part of the columns, begins at row `done_B` and stops before its part of `out`,
    shape (B, capacity), could overflow.
    """
    row_bits, row_bars = rows
    step = -(-bits_QG.shape[1] // (len(done_B) * GROUP)) * GROUP
    for b in prange(len(done_B)):
        begin = min(b * step, bits_QG.shape[1])
        end = min(begin + step, bits_QG.shape[1])
        places = np.empty(end - begin, np.int64)
        n, row = 0, done_B[b]
        while row < len(bits_QG) and n + end - begin <= out[0].shape[1]:
            reached = _reaching(bits_QG[row, begin:end], row_bits[row], columns[0][begin:end], places)
            for place in places[:reached]:
                g = begin + place
                cosine = _cosine(left_QD[row], right_GD[g])
                if _entered(columns, g, cosine, wanted) or cosine >= row_bars[row]:
                    out[0][b, n], out[1][b, n], out[2][b, n] = row, g, cosine
                    n += 1
            row += 1
        done_B[b], count_B[b] = row, n


@njit(nogil=True, cache=CACHE)
def _entered(
    columns: tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]], g: int, cosine: float, wanted: int
) -> bool:
    """Whether `cosine` is among the `wanted` best of column g so far, ties included; the list and the bar follow."""
    bits_G, error_G, highest_GC = columns
    last = wanted - 1
    if wanted == 0 or cosine < highest_GC[g, last]:
        return False
    at = last
    while at > 0 and highest_GC[g, at - 1] < cosine:
        highest_GC[g, at] = highest_GC[g, at - 1]
        at -= 1
    highest_GC[g, at] = cosine
    bits_G[g] = _as_bits(highest_GC[g, last] - error_G[g], np.iinfo(bits_G.dtype).min)
    return True


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


@njit(parallel=True, nogil=True, cache=CACHE)
def sort_lists(
    start: NDArray[np.int64], cosine: NDArray[np.float64], order: NDArray[np.int64], place: NDArray[np.int64]
) -> None:
    """Sort `place`, indices of entries, inside each list start[i] : start[i + 1] by highest cosine, lowest `order`."""
    for i in prange(len(start) - 1):
        own = place[start[i] : start[i + 1]]
        own[:] = own[np.argsort(-cosine[own], kind="mergesort")]
        tied = 0
        for end in range(1, len(own) + 1):
            if end == len(own) or cosine[own[end]] != cosine[own[tied]]:
                if end - tied > 1:
                    own[tied:end] = own[tied:end][np.argsort(order[own[tied:end]])]
                tied = end
