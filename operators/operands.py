"""Vectors as the filter of the mixed engine sees them, in a type of few bits, with what that took away."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

ROUND = 1024
"""Vectors that are rounded at a time."""
LEVELS = 127
"""Largest int8 number that a coordinate is rounded to."""


class Form(NamedTuple):
    """A way to filter."""

    dtype: "torch.dtype"
    fused: bool
    """Whether one kernel multiplies and compares; otherwise a library multiplies."""

    def __str__(self) -> str:
        return f"{'fused ' if self.fused else ''}{named(self.dtype)}"


def forms() -> list[Form]:
    """All ways that this processor has instructions for."""
    import torch

    from operators.microkernels import DTYPES

    library = [Form(torch.bfloat16, False), Form(torch.float32, False)]
    return library + [Form(getattr(torch, name), True) for name in DTYPES]


def named(dtype: "torch.dtype") -> str:
    """The type's name without its package."""
    return str(dtype).removeprefix("torch.")


class Operand(NamedTuple):
    """Vectors in two precisions."""

    exact_ND: NDArray[np.float32]
    low_ND: "torch.Tensor"
    """Rounded to the low type; int8 numbers are multiples of the vector's scale."""
    scale_N: NDArray[np.float32]
    """The largest coordinate divided by LEVELS for int8, otherwise 1."""
    residual_N: NDArray[np.float64]
    """Length of what rounding took away, per vector."""

    def take(self, index: NDArray[np.integer[Any]]) -> "Operand":
        """The vectors at `index`."""
        import torch

        low = self.low_ND[torch.from_numpy(index)]
        return Operand(self.exact_ND[index], low, self.scale_N[index], self.residual_N[index])


def operand(vectors_ND: NDArray[np.float16], dtype: "torch.dtype") -> Operand:
    """Round vectors to `dtype` and measure what is lost."""
    import torch

    exact = np.ascontiguousarray(vectors_ND, np.float32)
    low = torch.empty(exact.shape, dtype=dtype)
    scale, residual = np.ones(len(exact), np.float32), np.empty(len(exact))
    for at in range(0, len(exact), ROUND):
        rows = slice(at, at + ROUND)
        part = torch.from_numpy(exact[rows])
        if dtype == torch.int8:
            largest = np.abs(exact[rows]).max(axis=1, initial=0)
            scale[rows] = np.where(largest > 0, largest, 1) / np.float32(LEVELS)
            part = torch.round(part / torch.from_numpy(scale[rows, None]))
        low[rows] = part.to(dtype)
        lost = low[rows].double().numpy() * scale[rows, None].astype(np.float64) - exact[rows]
        residual[rows] = np.sqrt((lost * lost).sum(1)) * (1 + 1e-9)
    return Operand(exact, low, scale, residual)
