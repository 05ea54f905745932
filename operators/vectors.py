"""Embeddings as they are stored and compared.

The stored vector is the truth: unit length, rounded to fp16. The score of a pair is *defined* as the inner product of
the stored vectors in fp64, which is exact: fp16 numbers are multiples of 2^-24, their products are multiples of 2^-48,
and every partial sum of a unit-length pair stays below 2^5, so 53 bits hold it without rounding in any order. A score
therefore has the same bits on every machine, for every shard and thread count (docs/method.md, "Exact scores").
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

NORM_TOLERANCE = 1e-3
"""A stored vector's length may differ from 1 by this much; rounding to fp16 moves it by about 6e-5."""


def normalise(raw_ND: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.bool_]]:
    """Stored vectors (N, D), lengths before normalisation (N,), and which rows are usable (N,).

    A row that is not finite, or whose length is zero or beyond fp32, is not usable; its vector and length are zero.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(raw_ND.astype(np.float64), axis=1)
        usable = np.isfinite(norms.astype(np.float32)) & (norms > 0)
    safe = np.where(usable, norms, 1.0)
    unit = np.where(usable[:, None], raw_ND, 0.0).astype(np.float64) / safe[:, None]
    return unit.astype(np.float16), np.where(usable, norms, 0).astype(np.float32), usable


def exact_cosines(left_MD: NDArray[np.float16], right_MD: NDArray[np.float16]) -> NDArray[np.float64]:
    """Exact cosine of row i of `left_MD` with row i of `right_MD`, shape (M,)."""
    return np.asarray(np.einsum("md,md->m", left_MD.astype(np.float64), right_MD.astype(np.float64)))


def exact_matrix(left_QD: NDArray[np.float16], right_GD: NDArray[np.float16]) -> NDArray[np.float64]:
    """Exact cosines of all rows of `left_QD` with all rows of `right_GD`, shape (Q, G)."""
    return np.asarray(left_QD.astype(np.float64) @ right_GD.astype(np.float64).T)


def to_arrow(vectors_ND: NDArray[np.float16], usable_N: NDArray[np.bool_]) -> pa.FixedSizeListArray:
    """Vectors as an Arrow column, null where not usable."""
    flat = pa.array(np.ascontiguousarray(vectors_ND).ravel(), pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1], mask=pa.array(~usable_N))


def from_arrow(column: pa.ChunkedArray | pa.Array) -> NDArray[np.float16]:
    """The vectors of an Arrow column without nulls, shape (N, D)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(array.flatten(), np.float16).reshape(len(array), array.type.list_size)
