"""The mixed-precision engine: a low-precision matrix product filters, with a margin that loses nothing.

Every score of the product is compared with a bar of its query and one of its gallery vector, and what reaches one is
scored exactly on the spot. A query's bar is guessed from a sample of the gallery, and whoever ends with fewer exact
scores over its bar than it needs is searched again with a bar that cannot be too high; a gallery vector's bar is its
`columns`-th best exact score so far, and queries come in a random order, so that these bars rise fast whatever the
release's order. `operators/operands.py` has the forms of the product: int8, bf16 or fp32, by a kernel that compares in
registers, or by a library. A trial with the gallery's vectors chooses: fewer bits multiply faster and let more pass.

Bound: with x^ the rounded vector and E the length of x - x^, |<x,y> - <x^,y^>| <= E_x|y| + |x^|E_y, |x^| <= |x| + E_x
(Cauchy-Schwarz); E is measured for every vector. Sums add (d + d/4) 2^-23 |x||y| in fp32 (counting every addend of
multi-operand adders; Fasi et al., PeerJ CS 2021) and nothing in int32, whose scaling takes three roundings. Where a
library rounds sums to bf16, that moves them by 2^-8 |s| at most, but costs no margin: a sum that reaches a bar still
reaches the bar rounded down to bf16 once it is rounded itself, because rounding keeps the order.
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from operators.engines import Proposals, Wanted
from operators.operands import Form, Operand, forms, named, operand
from operators.tilepass import CHUNK, TILE, Found, FusedPass, LibraryPass, enough

if TYPE_CHECKING:
    import torch

SAMPLE = 2048
"""Gallery vectors at least from which first bars of queries are taken."""
LONGEST = 1.0011
"""Length of a stored vector at most."""

_tried: dict[tuple[int, ...], dict[Form, float]] = {}
"""Trials that this process has made, by their conditions: it opens many shards, and a trial takes half a second."""


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


def _crowding(gallery_GD: NDArray[np.float16]) -> tuple[int, int]:
    """How far apart scores lie, coarsely: mean and spread of those of a few vectors, in steps of 0.1 and 0.02."""
    some = gallery_GD[np.random.default_rng(0).permutation(len(gallery_GD))[:256]].astype(np.float32)
    scores = (some @ some.T)[np.triu_indices(len(some), 1)]
    return (round(float(scores.mean()) / 0.1), round(float(scores.std()) / 0.02)) if len(scores) else (0, 0)


def seconds_by_form(gallery_GD: NDArray[np.float16], wanted: Wanted) -> dict[Form, float]:
    """Seconds of each form for a part of the gallery with itself: how many scores pass a bar depends on the data."""
    chosen = np.random.default_rng(0).permutation(len(gallery_GD))
    sample, queries = gallery_GD[chosen[:TILE]], gallery_GD[chosen[-CHUNK:]]
    few = Wanted(max(1, wanted.k * len(sample) // len(gallery_GD)), 0, None)
    seconds = {}
    for form in forms():
        engine, times = MixedEngine(sample, form), []
        for _ in range(3):  # the first may compile
            start = time.perf_counter()
            engine.propose(queries, few)
            times.append(time.perf_counter() - start)
        seconds[form] = min(times)
    return seconds


def accumulation(dtype: "torch.dtype", width: int) -> float:
    """Bound on the error of a score's sum and, for int8, of bringing it to a cosine.

    That takes three roundings, of 2^-24 each, of numbers that stay below 2.7 even where rounding to int8 lengthens a
    vector most (by sqrt(d)/254, d up to 8,192).
    """
    import torch

    if dtype == torch.int8:
        return 2.0**-21
    return (width + -(-width // 4)) * 2.0**-23 * (LONGEST + 2.0**-8) ** 2


def sampled(dtype: "torch.dtype") -> "torch.dtype":
    """The type in which a library multiplies a sample for first bars: bf16 only where the processor has it."""
    import torch

    from operators.microkernels import DTYPES

    if dtype != torch.int8:
        return dtype
    return torch.bfloat16 if "bfloat16" in DTYPES else torch.float32


class MixedEngine:
    """Filters by a matrix product in a type of few bits; see the module's text."""

    def __init__(self, gallery_GD: NDArray[np.float16], form: Form | Wanted) -> None:
        """Filter in this form, or in the one that a trial with vectors of the gallery shows to be fastest."""
        import numba
        import torch

        exact_products()
        reason = "given"
        if isinstance(form, Wanted):
            threads = numba.get_num_threads(), torch.get_num_threads()
            conditions = gallery_GD.shape[1], form.k, *threads, *_crowding(gallery_GD)
            seconds = _tried.get(conditions) or seconds_by_form(gallery_GD, form)
            _tried[conditions] = seconds
            form = min(seconds, key=lambda one: seconds[one])
            trial = ", ".join(f"{one} {took:.2e} s" for one, took in seconds.items())
            reason = f"{form} is the fastest of {trial}"
        self.form, self.dtype = form, form.dtype
        self.sampled = sampled(self.dtype)
        self.order = np.random.default_rng(0).permutation(len(gallery_GD)).astype(np.int32)
        """Vectors are held in a random order: this one."""
        self.place = np.argsort(self.order)
        self.gallery = operand(gallery_GD[self.order], self.dtype)
        self.bits = torch.int16 if self.dtype == torch.bfloat16 else torch.int32
        self.rounding = 2.0**-8 if self.dtype == torch.bfloat16 and not form.fused else 0.0
        if form.fused:
            self._pack()
        self.accumulation = accumulation(self.dtype, gallery_GD.shape[1])
        residual = float(self.gallery.residual_N.max(initial=0.0))
        rounding = self.rounding * LONGEST**2
        self.about: dict[str, Any] = {
            "engine": "mixed",
            "device": "cpu",
            "dtype": named(self.dtype),
            "residual": residual,
            "accumulation": self.accumulation,
            "margin": 2 * residual * LONGEST + residual**2 + self.accumulation + rounding,
            "reason": reason,
        }

    def _pack(self) -> None:
        """Lay the gallery out as the kernel reads it, in place of the rounded vectors."""
        import torch

        from operators.fused import filled, packed
        from operators.microkernels import COLUMNS

        low = self.gallery.low_ND
        self.panels = packed(low, COLUMNS)
        places = self.panels.shape[0] * COLUMNS
        firsts = -128 * low.sum(1, dtype=torch.int32) if self.dtype == torch.int8 else torch.zeros(0, dtype=torch.int32)
        self.scales = filled(self.gallery.scale_N, places), filled(firsts.numpy(), places)
        self.gallery = self.gallery._replace(low_ND=low.new_empty(0))

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

    def errors(self, queries: Operand) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Largest error of a score before it is rounded: per query (Q,), per gallery vector (G,), and offsets (G,).

        For int8 the offsets, which the kernel adds to scores, are the part of the error that a gallery vector has, so
        that one vector with a large residual does not lower all bars; otherwise they are 0. Rounding adds at most
        `rounding` times the score.
        """
        import torch

        left, right = queries.residual_N, self.gallery.residual_N
        worst_left, worst_right = left.max(initial=0.0), right.max(initial=0.0)
        if self.dtype == torch.int8:
            columns = np.full(len(right), worst_left * LONGEST + self.accumulation)
            return left * LONGEST + self.accumulation, columns, right * (LONGEST + worst_left)
        rows = left * LONGEST + worst_right * LONGEST + left * worst_right + self.accumulation
        columns = right * LONGEST + worst_left * LONGEST + right * worst_left + self.accumulation
        return rows, columns, np.zeros(len(right))

    def _row_bars(self, queries: Operand, wanted: Wanted, deviations: float | None) -> NDArray[np.float64]:
        """Exact cosines that at least k gallery vectors reach, at most the floor, shape (Q,).

        Guessed, see `enough`; for certain if `deviations` is None.
        """
        import torch

        count, width = self.gallery.exact_ND.shape
        size = min(count, max(SAMPLE, 16 * wanted.k, count // 128))
        rank = wanted.k if deviations is None else enough(wanted.k * size / count, deviations)
        bars = np.full(len(queries.exact_ND), -np.inf)
        if rank <= size:
            dtype = self.sampled
            unit = 2.0**-9 if dtype == torch.bfloat16 else 0.0  # roundings of two vectors, and of scores to bf16
            error = (4 * unit + 8 * unit**2) * LONGEST**2 + accumulation(dtype, width) if deviations is None else 0.0
            sample = torch.from_numpy(self.gallery.exact_ND[:size]).to(dtype)
            for at in range(0, len(bars), CHUNK):
                part = torch.from_numpy(queries.exact_ND[at : at + CHUNK]).to(dtype)
                top = torch.mm(part, sample.T).float().topk(rank, dim=1).values[:, -1]
                bars[at : at + CHUNK] = top.double().numpy() - error
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
