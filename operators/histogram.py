"""The distribution of all cosines of a block of queries with a shard of the gallery, exactly.

An fp32 product scores every pair. A score further from every edge than `margin` lies in the same bin as the exact
cosine, so its bin is known; a pair nearer to an edge is scored again in fp64, which is exact, and binned by that.
Counts therefore depend neither on the order of summation nor on shards, threads or blocks.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from operators.engines import margin, tell

EDGES: NDArray[np.float64] = np.arange(-101, 102) / 100
"""Bin i holds the cosines c with EDGES[i] <= c < EDGES[i + 1]. Stored lengths are 1 within 1e-3, so that cosines can
slightly exceed 1. The quotients are correctly rounded: each edge is the double nearest to its decimal."""
EDGES.flags.writeable = False

ROWS = 1024
COLUMNS = 8192
"""Queries and gallery vectors of one product; its scores take 32 MiB."""
SLACK = 1e-9
"""Added to the margin for the roundings made in finding a bin, which are below 1e-13."""


def exact_counts(
    queries_QD: NDArray[np.float16],
    gallery_GD: NDArray[np.float16],
    multiplicity_Q: NDArray[np.int64],
    multiplicity_G: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Pairs in each bin of `EDGES`, shape (B,); a pair of vectors counts as often as its multiplicities' product.

    Raises
    ------
    ValueError
        If an exact cosine lies outside `EDGES`, which vectors that `operators/gallery.py` lets pass cannot give, or if
        vectors and multiplicities differ in number.
    """
    import torch

    from operators.mixed import exact_products

    if len(queries_QD) != len(multiplicity_Q) or len(gallery_GD) != len(multiplicity_G):
        raise ValueError("every vector needs one multiplicity")
    tell("torch", "numba")
    exact_products()
    counts_B = np.zeros(len(EDGES) - 1, np.int64)
    queries = torch.from_numpy(np.ascontiguousarray(queries_QD, np.float32))
    room = torch.empty(min(ROWS, len(queries_QD)) * min(COLUMNS, len(gallery_GD)))
    band = margin(queries_QD.shape[1]) + SLACK
    for at in range(0, len(gallery_GD), COLUMNS):
        gallery = torch.from_numpy(np.ascontiguousarray(gallery_GD[at : at + COLUMNS], np.float32))
        weight_G = np.ascontiguousarray(multiplicity_G[at : at + COLUMNS], np.int64)
        for row in range(0, len(queries_QD), ROWS):
            block = queries[row : row + ROWS]
            scores = room[: len(block) * len(gallery)].view(len(block), len(gallery))
            torch.mm(block, gallery.T, out=scores)
            counts_QB = np.zeros((len(block), len(EDGES)), np.int64)
            _binning()(scores.numpy(), block.numpy(), gallery.numpy(), weight_G, EDGES, band, counts_QB)
            if counts_QB[:, -1].any():
                raise ValueError(f"a cosine lies outside {EDGES[0]} to {EDGES[-1]}: a vector is not of unit length")
            counts_B += multiplicity_Q[row : row + ROWS].astype(np.int64) @ counts_QB[:, :-1]
    return counts_B


def counts_of(cosine_M: NDArray[np.float64], weight_M: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Exact cosines in each bin of `EDGES`, each counted once or as often as `weight_M` says; shape (B,).

    Raises
    ------
    ValueError
        If a cosine is not a number or lies outside `EDGES`.
    """
    bin_M = np.searchsorted(EDGES, cosine_M, side="right") - 1
    wrong = np.flatnonzero((bin_M < 0) | (bin_M >= len(EDGES) - 1))
    if len(wrong):
        raise ValueError(f"cosine {cosine_M[wrong[0]]} lies outside {EDGES[0]} to {EDGES[-1]}")
    if weight_M is None:
        return np.bincount(bin_M, minlength=len(EDGES) - 1).astype(np.int64)
    counts_B = np.zeros(len(EDGES) - 1, np.int64)
    np.add.at(counts_B, bin_M, weight_M)  # bincount would sum weights in fp64
    return counts_B


def above(counts_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many cosines reach each edge of `EDGES`, shape (B + 1,); the first entry is the total, the last is 0."""
    reaching = np.zeros(len(counts_B) + 1, np.int64)
    reaching[:-1] = np.cumsum(counts_B[::-1])[::-1]
    return reaching


@cache
def _binning() -> Callable[..., None]:
    """The compiled inner loop of `exact_counts`; made on first use, because importing Numba takes long."""
    from numba import njit, prange

    from operators.kernels import CACHE

    def add(
        scores_QG: NDArray[np.float32],
        left_QD: NDArray[np.float32],
        right_GD: NDArray[np.float32],
        weight_G: NDArray[np.int64],
        edges: NDArray[np.float64],
        band: float,
        counts_QB: NDArray[np.int64],
    ) -> None:
        """Add every pair's weight to its bin in its query's row; the last column takes what lies outside."""
        last = len(edges) - 1
        for q in prange(len(scores_QG)):
            for g in range(len(weight_G)):
                place = np.float64(scores_QG[q, g]) * 100 + 101
                found, part = last, 0.0
                if place > 0 and place < last:  # not for not-a-number
                    found = int(place)
                    part = place - found
                if not (part > 100 * band and part < 1 - 100 * band):
                    total = 0.0
                    for j in range(left_QD.shape[1]):
                        total += np.float64(left_QD[q, j]) * np.float64(right_GD[g, j])
                    found = int(np.searchsorted(edges, total, side="right")) - 1
                    if found < 0:
                        found = last
                counts_QB[q, found] += weight_G[g]

    # sums of exact products may be reordered freely; not-a-number must stay what it is, hence not all of fastmath
    options: dict[str, Any] = {"parallel": True, "fastmath": {"reassoc", "contract"}, "nogil": True, "cache": CACHE}
    compiled: Callable[..., None] = njit(**options)(add)
    return compiled
