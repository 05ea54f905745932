"""The mixed-precision engine: a low-precision matrix product filters, with a margin that loses nothing.

Tile by tile, the product is compared with a bar for every query and one for every gallery vector, and only what passes
is looked at. Three things make that cheap: maxima over groups of 64 decide whether a group is looked at; non-negative
floating-point numbers order as the integers with the same bits, and integer maxima are several times faster; and the
bars are good from the first tile on. A query's bar is guessed from a sample of the gallery; whoever ends with fewer
exact scores over its bar than it needs is searched again with a bar that cannot be too high. A gallery vector's bar is
the running `columns`-th best, which cannot be too high either.

Bound: with E the length of a vector's rounding residual, |s - <x,y>| <= E_x|y| + E_y|x| + E_xE_y (Cauchy-Schwarz)
+ (d + d/4) 2^-23 |x||y| (accumulation, counting every addend of multi-operand adders; Fasi et al., PeerJ CS 2021)
+ 2^-9 |s| for rounding the result to bf16. E is measured for every vector.
"""

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.engines import Proposals, Wanted
from operators.tilepass import CHUNK, TILE, TilePass

if TYPE_CHECKING:
    import torch

SAMPLE = 4096
"""Gallery vectors at least from which first bars of queries are taken."""
LONGEST = 1.0011
"""Length of a stored vector at most."""


class Operand(NamedTuple):
    """Vectors as the filter sees them."""

    exact_ND: NDArray[np.float32]
    low_ND: "torch.Tensor"
    residual_N: NDArray[np.float64]
    """Length of what rounding to the low type took away, per vector."""


def operand(vectors_ND: NDArray[np.float16], dtype: "torch.dtype") -> Operand:
    """Round vectors to `dtype` and measure what is lost."""
    import torch

    exact = np.ascontiguousarray(vectors_ND, np.float32)
    low = torch.from_numpy(exact).to(dtype)
    residual = np.empty(len(exact))
    for at in range(0, len(exact), TILE):
        rows = slice(at, at + TILE)
        lost = low[rows].double().numpy() - exact[rows].astype(np.float64)
        residual[rows] = np.sqrt((lost * lost).sum(1)) * (1 + 1e-9)
    return Operand(exact, low, residual)


def fastest_dtype(width: int) -> "torch.dtype":
    """bf16 where this processor multiplies it faster than fp32, else fp32."""
    import torch

    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.ones(CHUNK, width, dtype=dtype), torch.ones(TILE // 4, width, dtype=dtype)
        torch.mm(left, right.T)
        start = time.perf_counter()
        torch.mm(left, right.T)
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])


class MixedEngine:
    """Filters by a matrix product in bf16 (or fp32, where that is faster); see the module's text."""

    def __init__(self, gallery_GD: NDArray[np.float16], dtype: "torch.dtype | None" = None) -> None:
        import torch

        self.dtype = dtype if dtype is not None else fastest_dtype(gallery_GD.shape[1])
        self.gallery = operand(gallery_GD, self.dtype)
        self.bits = torch.int16 if self.dtype == torch.bfloat16 else torch.int32
        self.rounding = 2.0**-9 * LONGEST**2 if self.dtype == torch.bfloat16 else 0.0

    def propose(self, queries_QD: NDArray[np.float16], wanted: Wanted) -> Proposals:
        """See `Engine`."""
        if not len(queries_QD) or not len(self.gallery.exact_ND):
            return Proposals(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))
        queries = operand(queries_QD, self.dtype)
        guessed = self._row_bars(queries, wanted, guess=True)
        found = TilePass(self, queries, wanted, guessed).run()
        need = min(wanted.k, len(self.gallery.exact_ND))
        over = np.bincount(found.query[found.cosine >= guessed[found.query]], minlength=len(queries_QD))
        short = np.flatnonzero(over < need)
        if len(short):
            part = Operand(queries.exact_ND[short], queries.low_ND[short], queries.residual_N[short])
            certain = self._row_bars(part, wanted, guess=False)
            again = TilePass(self, part, wanted._replace(columns=0), certain).run()
            found = found.joined(again, short)
        return Proposals(*found)

    def errors(self, queries: Operand) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Largest error of a score, per query (Q,) and per gallery vector (G,)."""
        width = self.gallery.exact_ND.shape[1]
        fixed = (width + -(-width // 4)) * 2.0**-23 * (LONGEST + 2.0**-8) ** 2 + self.rounding
        left, right = queries.residual_N, self.gallery.residual_N
        worst_left, worst_right = left.max(initial=0.0), right.max(initial=0.0)
        rows = left * LONGEST + worst_right * LONGEST + left * worst_right + fixed
        return rows, right * LONGEST + worst_left * LONGEST + right * worst_left + fixed

    def _row_bars(self, queries: Operand, wanted: Wanted, *, guess: bool) -> NDArray[np.float64]:
        """Exact cosines that at least k gallery vectors reach: by a guess, or for certain; at most the floor."""
        import torch

        count = len(self.gallery.exact_ND)
        size = min(count, max(SAMPLE, 32 * wanted.k, count // 32))
        chosen = np.random.default_rng(0).permutation(count)[:size]
        sample = self.gallery.low_ND[torch.from_numpy(chosen)]
        expected = wanted.k * size / count
        rank = int(np.ceil(expected + 2 * np.sqrt(expected) + 1)) if guess else wanted.k
        bars = np.full(len(queries.exact_ND), -np.inf)
        if rank <= size:
            errors = self.errors(queries)[0]
            for at in range(0, len(bars), CHUNK):
                rows = slice(at, at + CHUNK)
                top = torch.mm(queries.low_ND[rows], sample.T).float().topk(rank, dim=1).values[:, -1]
                bars[rows] = top.double().numpy() - (0 if guess else errors[rows])
        return bars if wanted.floor is None else np.minimum(bars, wanted.floor)

    def as_bits(self, bars_N: NDArray[np.float64]) -> "torch.Tensor":
        """Integers that the bits of a score reach if the score reaches the bar; the lowest for a bar of 0 or less."""
        import torch

        low = np.nextafter(bars_N.astype(np.float32), np.float32(-2))
        bits = low.view(np.int32)
        bits = np.where(low > 0, bits >> 16 if self.bits == torch.int16 else bits, np.iinfo(np.int32).min)
        return torch.from_numpy(bits.clip(torch.iinfo(self.bits).min)).to(self.bits)
