"""The mixed engine's sweep with its own product: multiply, compare, and score exactly what may matter, in one pass.

Importing this module loads Numba; import it where it is used.
"""

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from operators.kernels import CACHE, cosine_of, entered
from operators.microkernels import ALIGNED, COLUMNS, ROWS, fetched, lowest, reaching

BUILT_FROM = "c437de65be1fefeb"
"""Digest of kernels.py and microkernels.py. Numba recompiles what it keeps on disk when the file of a function changes,
but not when code that this function uses does; so whoever changes those files changes this one (a test tells)."""
PENDING = 64
"""Pairs that wait for their vectors to arrive from memory before they are scored."""


@njit(parallel=True, nogil=True, cache=CACHE)
def _fill(words_NK: NDArray[Any], panels_PKW: NDArray[Any]) -> None:
    count, width = len(words_NK), panels_PKW.shape[2]
    for p in prange(len(panels_PKW)):
        for k in range(panels_PKW.shape[1]):
            for w in range(width):
                n = p * width + w
                panels_PKW[p, k, w] = words_NK[n, k] if n < count else 0


def packed(low_ND: Any, width: int, *, unsigned: bool = False) -> NDArray[Any]:
    """Vectors, a torch tensor of int8, bf16 or fp32 (N, D), as panels of `width`: (P, K, width), filled with 0.

    A word of the panels is four or two neighbouring coordinates, as uint32 and int32, or one, as fp32. With `unsigned`,
    int8 numbers have 128 added.
    """
    import torch

    kinds = {torch.int8: np.uint32, torch.bfloat16: np.int32, torch.float32: np.float32}
    kind, each = kinds[low_ND.dtype], 4 // low_ND.dtype.itemsize
    missing = -low_ND.shape[1] % each  # padding copies, even by nothing
    padded = torch.nn.functional.pad(low_ND, (0, missing)) if missing else low_ND.contiguous()
    if low_ND.dtype == torch.int8 and unsigned:
        padded = padded ^ -128
    words = padded.view(torch.uint8).numpy().view(kind)
    panels = aligned((-(-len(words) // width), words.shape[1], width), words.dtype)
    _fill(words, panels)
    return panels


def filled(values_N: NDArray[Any], places: int) -> NDArray[Any]:
    """The values, and 0 for places that have none."""
    made = np.zeros(places, values_N.dtype)
    made[: len(values_N)] = values_N
    return made


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array that is not filled and begins at a multiple of ALIGNED bytes."""
    size = int(np.prod(shape)) * dtype.itemsize
    room = np.empty(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)


@njit(parallel=True, nogil=True, cache=CACHE)
def sweep_fused(
    panels: tuple[NDArray[Any], NDArray[Any]],
    left_QD: NDArray[np.float32],
    right_GD: NDArray[np.float32],
    rows: tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.int32]],
    columns: tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], NDArray[np.int32]],
    scales: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]],
    wanted: int,
    start_B: NDArray[np.int64],
    done_B: NDArray[np.int64],
    out: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]],
    count_B: NDArray[np.int64],
) -> None:
    """`operators.kernels.sweep`, with the product: score exactly what reaches the bar of its row or column.

    `panels` are the packed queries and gallery; `scales` are the rows' scales and the columns' scales, firsts and
    offsets (`operators.microkernels.reaching`). These and the bars of rows and columns, fp32, are as many as the panels
    have places; the other arrays are as for `sweep`. Thread b of B has the gallery's panels from start_B[b] on, begins
    at block done_B[b] of theirs and stops before its part of `out`, shape (B, capacity), could overflow.
    """
    left, right = panels
    for b in prange(len(done_B)):
        end = (start_B[b + 1] - start_B[b]) * len(left)
        mine = (out[0][b], out[1][b], out[2][b])
        masks = np.zeros(ROWS, np.uint32)
        pending = np.empty((2, PENDING + ROWS * COLUMNS), np.int64)
        n, waiting, block = 0, 0, done_B[b]
        while block < end and n + pending.shape[1] <= out[0].shape[1]:
            i, j = block % len(left), start_B[b] + block // len(left)
            if reaching(left, i, right, j, rows[0], scales[0], columns[0], scales[1], scales[2], scales[3], masks):
                waiting = _noted(left_QD, right_GD, i, j, masks, pending, waiting)
            block += 1
            if waiting >= PENDING or i + 1 == len(left):
                n = _scored(left_QD, right_GD, pending[:, :waiting], rows, columns, wanted, mine, n)
                waiting = 0
        done_B[b], count_B[b] = block, _scored(left_QD, right_GD, pending[:, :waiting], rows, columns, wanted, mine, n)


@njit(nogil=True, cache=CACHE)
def _noted(
    left_QD: NDArray[np.float32],
    right_GD: NDArray[np.float32],
    i: int,
    j: int,
    masks_R: NDArray[np.uint32],
    pending: NDArray[np.int64],
    n: int,
) -> int:
    """Write the pairs that `masks_R` names to `pending` from entry `n` on, and fetch their vectors; the next entry."""
    for r in range(min(ROWS, len(left_QD) - i * ROWS)):
        row, mask = i * ROWS + r, masks_R[r]
        while mask:
            g = j * COLUMNS + lowest(mask)
            mask &= mask - np.uint32(1)
            if g >= len(right_GD):
                break
            for d in range(0, right_GD.shape[1], 16):
                fetched(right_GD, g, d)
            pending[0, n], pending[1, n] = row, g
            n += 1
    return n


@njit(nogil=True, cache=CACHE)
def _scored(
    left_QD: NDArray[np.float32],
    right_GD: NDArray[np.float32],
    pending: NDArray[np.int64],
    rows: tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.int32]],
    columns: tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], NDArray[np.int32]],
    wanted: int,
    out: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]],
    n: int,
) -> int:
    """Score the pairs, keep from entry `n` on what may be wanted; the next free entry."""
    bars, errors, highest, numbers = columns
    for p in range(pending.shape[1]):
        row, g = pending[0, p], pending[1, p]
        cosine = cosine_of(left_QD, row, right_GD, g)
        best = entered(highest, g, cosine, wanted)
        if best:
            bar = highest[g, wanted - 1] - errors[g]
            bars[g] = np.float32(bar - abs(bar) * 2.0**-23)
        if best or cosine >= rows[1][row]:
            out[0][n], out[1][n], out[2][n] = rows[2][row], numbers[g], cosine
            n += 1
    return n
