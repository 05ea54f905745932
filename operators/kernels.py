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
def cosine_of(left_QD: NDArray[np.float32], q: int, right_GD: NDArray[np.float32], g: int) -> float:
    """Exact cosine of row q of `left_QD` with row g of `right_GD`."""
    total = 0.0
    for j in range(left_QD.shape[1]):
        total += np.float64(left_QD[q, j]) * np.float64(right_GD[g, j])
    return total


@njit(parallel=True, nogil=True, cache=CACHE)
def exact_pairs(
    left_QD: NDArray[np.float32], right_GD: NDArray[np.float32], q: NDArray[np.int32], g: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Exact cosine of row q[i] of `left_QD` with row g[i] of `right_GD`, shape (M,)."""
    cosines = np.empty(len(q), np.float64)
    for i in prange(len(q)):
        cosines[i] = cosine_of(left_QD, q[i], right_GD, g[i])
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
    rows: tuple[NDArray[Any], NDArray[np.float64], NDArray[np.int32]],
    columns: tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64], NDArray[np.int32]],
    wanted: int,
    done_B: NDArray[np.int64],
    out: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]],
    count_B: NDArray[np.int64],
) -> None:
    """Score exactly what reaches the bar of its row or column in one product, and keep what may be wanted.

    `rows` are the bars as bits and as exact cosines and the numbers of the queries, shape (Q,). `columns` are the bars
    as bits (G,), the errors of scores (G,), the `wanted` highest cosines so far in descending order (G, C) and the
    numbers of the vectors (G,); bars and highest cosines follow what is found. Each of B threads has its part of the
    columns, begins at row `done_B` and stops before its part of `out`, shape (B, capacity), could overflow.
    """
    row_bits, row_bars, numbers = rows
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
                cosine = cosine_of(left_QD, row, right_GD, g)
                best = entered(columns[2], g, cosine, wanted)
                if best:
                    bar = columns[2][g, wanted - 1] - columns[1][g]
                    columns[0][g] = _as_bits(bar, np.iinfo(bits_QG.dtype).min)
                if best or cosine >= row_bars[row]:
                    out[0][b, n], out[1][b, n], out[2][b, n] = numbers[row], columns[3][g], cosine
                    n += 1
            row += 1
        done_B[b], count_B[b] = row, n


@njit(nogil=True, cache=CACHE)
def entered(highest_GC: NDArray[np.float64], g: int, cosine: float, wanted: int) -> bool:
    """Whether `cosine` is among the `wanted` best of column g so far, ties included; the column's list follows."""
    last = wanted - 1
    if wanted == 0 or cosine < highest_GC[g, last]:
        return False
    at = last
    while at > 0 and highest_GC[g, at - 1] < cosine:
        highest_GC[g, at] = highest_GC[g, at - 1]
        at -= 1
    highest_GC[g, at] = cosine
    return True


@njit(nogil=True, cache=CACHE)
def _by_owner(owner: NDArray[np.int32], owners: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Entries sorted by owner, shape (M,), and where each owner's begin, shape (owners + 1,)."""
    start = np.zeros(owners + 1, np.int64)
    in_order = True
    for i in range(len(owner)):
        start[owner[i] + 1] += 1
        in_order &= i == 0 or owner[i] >= owner[i - 1]
    for o in range(owners):
        start[o + 1] += start[o]
    if in_order:
        return np.arange(len(owner)), start
    fill = start.copy()
    slot = np.empty(len(owner), np.int64)
    for i in range(len(owner)):
        slot[fill[owner[i]]] = i
        fill[owner[i]] += 1
    return slot, start


@njit(nogil=True, cache=CACHE)
def _kth(values: NDArray[np.float64], limit: int) -> float:
    """The `limit`-th highest of `values`, which are moved (Hoare's quickselect, CACM 4, 1961; no allocation)."""
    low, high, wanted = 0, len(values) - 1, len(values) - limit
    while low < high:
        pivot = values[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if wanted <= j:
            high = j
        elif wanted >= i:
            low = i
        else:
            break
    return float(values[wanted])


@njit(parallel=True, nogil=True, cache=CACHE)
def kth_of_each(owner: NDArray[np.int32], owners: int, cosine: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    """The `limit`-th best cosine of each owner, shape (owners,); -inf where an owner has fewer."""
    slot, start = _by_owner(owner, owners)
    found = np.full(owners, -np.inf)
    for o in prange(owners):
        own = cosine[slot[start[o] : start[o + 1]]]
        if len(own) >= limit:
            found[o] = _kth(own, limit)
    return found


@njit(parallel=True, nogil=True, cache=CACHE)
def best_of_each(
    owner: NDArray[np.int32], owners: int, cosine: NDArray[np.float64], order: NDArray[np.int64], limit: int
) -> NDArray[np.int64]:
    """Entries that are among the `limit` best of their owner, by highest cosine, then lowest `order`; by owner."""
    if limit == 0:
        return np.zeros(0, np.int64)
    slot, start = _by_owner(owner, owners)
    kept = np.zeros(len(owner), np.bool_)
    for o in prange(owners):
        own = slot[start[o] : start[o + 1]]
        bar = -np.inf
        if len(own) > limit:
            bar = _kth(cosine[own], limit)
        ties = 0
        for i in own:
            kept[i] = cosine[i] > bar or len(own) <= limit
            ties += cosine[i] == bar
        if len(own) > limit:
            _first_ties(own, cosine, order, kept, bar, ties, limit)
    best: NDArray[np.int64] = slot[kept[slot]]
    return best


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
