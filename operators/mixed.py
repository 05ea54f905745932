"""The mixed-precision engine: a low-precision matrix product filters, with a margin that loses nothing.

Tile by tile, the product is compared with a bar for every query and one for every gallery vector, and what passes is
scored exactly on the spot. Three things make that cheap: non-negative floating-point numbers order as the integers with
the same bits, and wide registers compare many integers at once; a query's bar is guessed from a sample of the gallery,
and whoever ends with fewer exact scores over its bar than it needs is searched again with a bar that cannot be too
high; a gallery vector's bar is its `columns`-th best exact score so far, and queries come in a random order, so that
these bars rise fast whatever the release's order.

Bound: with E the length of a vector's rounding residual, |s - <x,y>| <= E_x|y| + E_y|x| + E_xE_y (Cauchy-Schwarz)
+ (d + d/4) 2^-23 |x||y| (accumulation, counting every addend of multi-operand adders; Fasi et al., PeerJ CS 2021).
E is measured for every vector. Rounding the sum to bf16 moves it by 2^-8 |s| at most, but costs no margin: a sum that
reaches a bar still reaches the bar rounded down to bf16 once it is rounded itself, because rounding keeps the order.
"""

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.engines import Proposals, Wanted
from operators.tilepass import CHUNK, TILE, Found, FusedPass, LibraryPass, enough

if TYPE_CHECKING:
    import torch

SAMPLE = 2048
"""Gallery vectors at least from which first bars of queries are taken."""
LONGEST = 1.0011
"""Length of a stored vector at most."""


class Operand(NamedTuple):
    """Vectors as the filter sees them."""

    exact_ND: NDArray[np.float32]
    low_ND: "torch.Tensor"
    residual_N: NDArray[np.float64]
    """Length of what rounding to the low type took away, per vector."""

    def take(self, index: NDArray[np.integer[Any]]) -> "Operand":
        """The vectors at `index`."""
        import torch

        return Operand(self.exact_ND[index], self.low_ND[torch.from_numpy(index)], self.residual_N[index])


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


def exact_products() -> None:
    """Switch off every setting of torch that may sum or multiply in less than fp32: the bound does not cover it."""
    import torch

    torch.set_float32_matmul_precision("highest")
    products = torch.backends.cuda.matmul
    products.allow_fp16_reduced_precision_reduction = False
    products.allow_bf16_reduced_precision_reduction = False
    if hasattr(products, "allow_fp16_accumulation"):
        products.allow_fp16_accumulation = False
    if hasattr(torch.backends.mkldnn, "matmul"):
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"


class Form(NamedTuple):
    """A way to filter."""

    dtype: "torch.dtype"
    fused: bool
    """Whether one kernel multiplies and compares; otherwise a library multiplies."""

    def __str__(self) -> str:
        return f"{'fused ' if self.fused else ''}{_name(self.dtype)}"


def forms() -> list[Form]:
    """All ways that this processor has instructions for."""
    import torch

    from operators.microkernels import DTYPES

    low = torch.bfloat16, torch.float32
    return [Form(dtype, False) for dtype in low] + [Form(dtype, True) for dtype in low if _name(dtype) in DTYPES]


def seconds_by_form(width: int) -> dict[Form, float]:
    """Seconds that each form takes on this processor for a product in which nothing reaches a bar."""
    unit = np.zeros((TILE, width), np.float16)
    unit[:, 0] = 1
    seconds = {}
    for form in forms():
        engine, queries = MixedEngine(unit, form), operand(unit[:CHUNK], form.dtype)
        times = []
        for _ in range(3):  # the first may compile
            start = time.perf_counter()
            engine.swept(queries, Wanted(1, 0, None), np.full(CHUNK, 2.0), guess=False)
            times.append(time.perf_counter() - start)
        seconds[form] = min(times)
    return seconds


class MixedEngine:
    """Filters by a matrix product in bf16 (or fp32, where that is faster); see the module's text."""

    def __init__(self, gallery_GD: NDArray[np.float16], form: Form | None = None) -> None:
        import torch

        exact_products()
        reason = "given"
        if form is None:
            seconds = seconds_by_form(gallery_GD.shape[1])
            form = min(seconds, key=lambda one: seconds[one])
            reason = ", ".join(f"{one} {took:.2e} s" for one, took in seconds.items())
        self.form, self.dtype = form, form.dtype
        self.order = np.random.default_rng(0).permutation(len(gallery_GD)).astype(np.int32)
        """Vectors are held in a random order: this one."""
        self.place = np.argsort(self.order)
        self.gallery = operand(gallery_GD[self.order], self.dtype)
        self.bits = torch.int16 if self.dtype == torch.bfloat16 else torch.int32
        self.rounding = 2.0**-8 if self.dtype == torch.bfloat16 else 0.0
        if form.fused:
            from operators.fused import packed
            from operators.microkernels import COLUMNS

            self.panels = packed(self.gallery.low_ND, COLUMNS)
            self.gallery = self.gallery._replace(low_ND=self.gallery.low_ND.new_empty(0))
        width = gallery_GD.shape[1]
        self.accumulation = (width + -(-width // 4)) * 2.0**-23 * (LONGEST + 2.0**-8) ** 2
        residual = float(self.gallery.residual_N.max(initial=0.0))
        rounding = 0.0 if form.fused else self.rounding * LONGEST**2
        self.about: dict[str, Any] = {
            "engine": "mixed",
            "device": "cpu",
            "dtype": _name(self.dtype),
            "residual": residual,
            "accumulation": self.accumulation,
            "margin": 2 * residual * LONGEST + residual**2 + self.accumulation + rounding,
            "reason": reason,
        }

    def propose(self, queries_QD: NDArray[np.float16], wanted: Wanted) -> Proposals:
        """See `Engine`."""
        from operators.kernels import kth_of_each

        if not len(queries_QD) or not len(self.gallery.exact_ND):
            return Proposals(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))
        exact_products()
        queries = operand(queries_QD, self.dtype)
        found, bars = self.swept(queries, wanted, self._row_bars(queries, wanted, 2.0), guess=True)
        for deviations in (5.0, None):
            over = np.bincount(found.query[found.cosine >= bars[found.query]], minlength=len(bars))
            short = np.flatnonzero(over < min(wanted.k, len(self.order)))
            if not len(short):
                break
            repeated = np.isin(found.query, short, kind="table")
            own = found.take(repeated)
            reached = kth_of_each(own.query, len(bars), own.cosine, wanted.k)[short]
            part = queries.take(short)
            bars[short] = np.maximum(reached, self._row_bars(part, wanted, deviations))
            again, _ = self.swept(part, wanted._replace(columns=0), bars[short], guess=False)
            found = found.joined(again._replace(query=short[again.query].astype(np.int32)), repeated)
        return Proposals(*found)

    def swept(
        self, queries: Operand, wanted: Wanted, row_bars_Q: NDArray[np.float64], *, guess: bool
    ) -> tuple[Found, NDArray[np.float64]]:
        """Pairs, each exact, that reach a bar and are still wanted after one pass; see `TilePass.run`."""
        return (FusedPass if self.form.fused else LibraryPass)(self, queries, wanted, row_bars_Q).run(guess=guess)

    def errors(self, queries: Operand) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Largest error of a score before it is rounded to the low type, per query (Q,) and per gallery vector (G,).

        Rounding adds at most `rounding` times the score.
        """
        left, right = queries.residual_N, self.gallery.residual_N
        worst_left, worst_right = left.max(initial=0.0), right.max(initial=0.0)
        rows = left * LONGEST + worst_right * LONGEST + left * worst_right + self.accumulation
        return rows, right * LONGEST + worst_left * LONGEST + right * worst_left + self.accumulation

    def _row_bars(self, queries: Operand, wanted: Wanted, deviations: float | None) -> NDArray[np.float64]:
        """Exact cosines that at least k gallery vectors reach, at most the floor, shape (Q,).

        Guessed, see `enough`; for certain if `deviations` is None.
        """
        import torch

        count = len(self.gallery.exact_ND)
        size = min(count, max(SAMPLE, 16 * wanted.k, count // 128))
        sample = torch.from_numpy(self.gallery.exact_ND[:size]).to(self.dtype)
        rank = wanted.k if deviations is None else enough(wanted.k * size / count, deviations)
        bars = np.full(len(queries.exact_ND), -np.inf)
        if rank <= size:
            errors = self.errors(queries)[0]
            for at in range(0, len(bars), CHUNK):
                rows = slice(at, at + CHUNK)
                top = torch.mm(queries.low_ND[rows], sample.T).float().topk(rank, dim=1).values[:, -1].double().numpy()
                bars[rows] = top - (self.rounding * np.abs(top) + errors[rows] if deviations is None else 0)
        return bars if wanted.floor is None else np.minimum(bars, wanted.floor)

    def as_bits(self, bars_N: NDArray[np.float64]) -> NDArray[Any]:
        """Integers that the bits of a score reach if the score, before it is rounded to the low type, reaches the bar.

        The lowest for a bar of 0 or less, or so close to 0 that a processor may take it for 0.
        """
        kind = np.int16 if self.rounding else np.int32
        low = np.nextafter(bars_N.astype(np.float32), np.float32(-2))
        bits = low.view(np.int32)
        bits = np.where(low >= np.finfo(np.float32).tiny, bits >> 16 if self.rounding else bits, np.iinfo(kind).min)
        return bits.astype(kind)


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")
