"""One pass of the mixed-precision engine over all products of a block with a shard."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.engines import Wanted

if TYPE_CHECKING:
    from operators.mixed import MixedEngine
    from operators.operands import Operand

CHUNK = 1024
"""Queries of one product."""
TILE = 8192
"""Gallery vectors of one product; its scores (16 MB in bf16) stay in the processor's cache."""
BUDGET = 3_000_000
"""Pairs held before they are thinned out, which bounds memory however many tie."""
ROOM = 1 << 16
"""Pairs that one thread finds before it hands them over."""
SHARE = 1 / 8
"""Of the gallery, after which the bars of queries rise."""
WHOLE = 64
"""This share is a multiple of so many vectors."""


class Found(NamedTuple):
    """Pairs with their exact cosines, as parallel arrays."""

    query: NDArray[np.int32]
    group: NDArray[np.int32]
    cosine: NDArray[np.float64]

    def take(self, index: NDArray[np.integer[Any]] | NDArray[np.bool_]) -> "Found":
        """The pairs at `index`."""
        return Found(self.query[index], self.group[index], self.cosine[index])

    def joined(self, again: "Found", repeated: NDArray[np.bool_]) -> "Found":
        """These pairs and those of a second pass over the queries of some of them, `repeated`, each once."""
        both = together([self.take(repeated), again])
        _, first = np.unique(both.query.astype(np.int64) << 32 | both.group, return_index=True)
        return together([self.take(~repeated), both.take(first)])


NOTHING = Found(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))


def together(parts: Sequence[Found]) -> Found:
    """All pairs of the parts."""
    return Found(*(np.concatenate(sides) for sides in zip(NOTHING, *parts, strict=True)))


def enough(expected: float, deviations: float = 2.0) -> int:
    """Such a place in a sample of a query's scores is rarely too high for a bar that `expected` of them should reach.

    About 2 queries in 100 need more with 2 standard deviations; counts are taken to be Poisson distributed, for which
    adding a quarter of the deviations' square bounds the tail of small counts too (a square root stabilises variance).
    """
    return math.ceil(expected + deviations * math.sqrt(expected) + deviations**2 / 4)


class TilePass(ABC):
    """Compares every product with the bars and keeps what may matter.

    Subclasses multiply. The engine holds its vectors in a random order, so what was compared so far is a random sample
    of a query's scores.
    """

    def __init__(
        self, engine: "MixedEngine", queries: "Operand", wanted: Wanted, row_bars_Q: NDArray[np.float64]
    ) -> None:
        import numba

        self.engine, self.wanted, self.gallery = engine, wanted, engine.gallery
        self.order = np.random.default_rng(0).permutation(len(queries.exact_ND)).astype(np.int32)
        self.place = np.argsort(self.order).astype(np.int32)
        self.queries = queries.take(self.order)
        self.row_errors, self.column_errors, self.offsets = engine.errors(self.queries)
        self.row_bars = row_bars_Q[self.order]
        self.highest = np.full((len(self.gallery.exact_ND), wanted.columns), -np.inf)
        self.blocks = numba.get_num_threads()
        room = (self.blocks, max(ROOM, self._least()))
        self.out = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.float64)
        self.held: list[Found] = []
        """What is wanted of the queries that are done."""
        self.others: list[Found] = []
        """What else of theirs may be wanted for the gallery's vectors."""
        self.fresh: list[Found] = []
        """What the queries at hand found."""
        self.limits = {"others": BUDGET, "fresh": BUDGET}

    def run(self, *, guess: bool) -> tuple[Found, NDArray[np.float64]]:
        """All pairs that are wanted as far as this block and shard know, and the bars of queries at the end (Q,).

        With `guess`, bars rise on the way to what leaves enough pairs over them if the rest of the gallery is like the
        part that was compared.
        """
        count = len(self.gallery.exact_ND)
        share = int(count * SHARE) // WHOLE * WHOLE if guess else 0
        for at in range(0, len(self.order), CHUNK):
            rows = slice(at, at + CHUNK)
            self._open(rows)
            if share:
                self._multiply(rows, 0, share)
                self._raise(rows, share / count)
            self._multiply(rows, share, count)
            self._close()
        others = together(self.others)
        return together([*self.held, others.take(self._enters(others))]), self.row_bars[self.place]

    @abstractmethod
    def _least(self) -> int:
        """Pairs that a thread must have room for."""

    @abstractmethod
    def _open(self, rows: slice) -> None:
        """Prepare these queries for products."""

    @abstractmethod
    def _multiply(self, rows: slice, start: int, end: int) -> None:
        """Multiply these queries with the gallery's vectors `start` to `end`, and hold what passes a bar."""

    def _raise(self, rows: slice, share: float) -> None:
        """Raise the bars of these queries by what they found in a `share` of the gallery."""
        from operators.kernels import kth_of_each

        found, bars = together(self.fresh), self.row_bars[rows]
        own = self.place[found.query] - np.int32(rows.start)
        reached = kth_of_each(own, len(bars), found.cosine, enough(self.wanted.k * share))
        floor = np.inf if self.wanted.floor is None else self.wanted.floor
        np.maximum(bars, np.minimum(reached, floor), out=bars)

    def _hold(self, count_B: NDArray[np.int64]) -> None:
        """Take over what each thread found."""
        for block, used in enumerate(count_B):
            self.fresh.append(Found(*(part[block, :used].copy() for part in self.out)))
        self._bound("fresh")

    def _close(self) -> None:
        """Sort out what the queries at hand found."""
        found, self.fresh = together(self.fresh), []
        wanted = self._of_queries(found)
        self.held.append(found.take(wanted))
        if self.wanted.columns:
            rest = self._enters(found)
            rest[wanted] = False
            self.others.append(found.take(rest))
            self._bound("others")
        self.limits["fresh"] = BUDGET

    def _bound(self, name: str) -> None:
        """Thin out the `others` or `fresh` pairs if too many: drop what does not enter, then what only ties."""
        parts: list[Found] = getattr(self, name)
        if sum(len(part.query) for part in parts) <= self.limits[name]:
            return
        from operators.kernels import best_of_each

        found = together(parts)
        parts.clear()  # frees memory
        for ties in (False, True):
            kept = np.zeros(len(found.query), np.bool_) if ties else self._enters(found)
            if ties:
                best = best_of_each(found.group, len(self.highest), found.cosine, found.query, self.wanted.columns)
                kept[best] = True
            if name == "fresh":
                kept[self._of_queries(found)] = True
            found = found.take(kept)
            if len(found.query) <= BUDGET // 2:
                break
        parts.append(found)
        self.limits[name] = BUDGET + len(found.query)

    def _enters(self, found: Found) -> NDArray[np.bool_]:
        """Which pairs are among the best of their gallery vector so far, ties included (M,)."""
        if not self.wanted.columns:
            return np.zeros(len(found.query), np.bool_)
        return np.asarray(found.cosine >= self.highest[self.engine.place[found.group], -1])

    def _of_queries(self, found: Found) -> NDArray[np.int64]:
        """Pairs that are among the best of their query, or over the floor, as indices."""
        from operators.kernels import best_of_each

        best: NDArray[np.int64]
        best = best_of_each(found.query, len(self.order), found.cosine, found.group, self.wanted.k)
        if self.wanted.floor is None:
            return best
        wanted = found.cosine >= self.wanted.floor
        wanted[best] = True
        return np.flatnonzero(wanted)


class LibraryPass(TilePass):
    """A library's product fills a tile with scores, which `operators.kernels.sweep` reads."""

    def __init__(self, *arguments: Any) -> None:
        import torch

        super().__init__(*arguments)
        count, kind = len(self.gallery.exact_ND), self.engine.as_bits(np.zeros(0)).dtype
        limits = np.iinfo(kind)
        self.column_bits = np.full(count, limits.min if self.wanted.columns else limits.max, kind)
        self.scores = torch.empty(CHUNK * TILE, dtype=self.engine.dtype)

    def _least(self) -> int:
        return TILE

    def _open(self, rows: slice) -> None:
        self.left = self.queries.low_ND[rows]

    def _multiply(self, rows: slice, start: int, end: int) -> None:
        import torch

        left = self.left
        row_bits = self.engine.as_bits(self.row_bars[rows] - self.row_errors[rows])
        for at in range(start, end, TILE):
            group = slice(at, min(at + TILE, end))
            right = self.gallery.low_ND[group]
            scores = torch.mm(left, right.T, out=self.scores[: len(left) * len(right)].view(len(left), len(right)))
            self._sweep(scores.view(self.engine.bits).numpy(), rows, group, row_bits)

    def _sweep(self, scores: NDArray[Any], rows: slice, group: slice, row_bits: NDArray[Any]) -> None:
        """Hold what passes a bar in one product."""
        from operators.kernels import sweep

        done, count = np.zeros(self.blocks, np.int64), np.zeros(self.blocks, np.int64)
        while done.min() < len(scores):
            sweep(
                scores,
                self.queries.exact_ND[rows],
                self.gallery.exact_ND[group],
                (row_bits, self.row_bars[rows], self.order[rows]),
                (self.column_bits[group], self.column_errors[group], self.highest[group], self.engine.order[group]),
                self.wanted.columns,
                done,
                self.out,
                count,
            )
            self._hold(count)


class FusedPass(TilePass):
    """One kernel multiplies and compares (`operators/fused.py`)."""

    def __init__(self, *arguments: Any) -> None:
        from operators.fused import filled

        super().__init__(*arguments)
        places = self.engine.panels.shape[0] * self.engine.panels.shape[2]
        self.column_bars = np.full(places, -np.inf if self.wanted.columns else np.inf, np.float32)
        self.column_offsets = filled(np.nextafter(self.offsets.astype(np.float32), np.float32(np.inf)), places)

    def _least(self) -> int:
        from operators.fused import PENDING
        from operators.microkernels import COLUMNS, ROWS

        return PENDING + ROWS * COLUMNS

    def _open(self, rows: slice) -> None:
        from operators.fused import filled, packed
        from operators.microkernels import ROWS

        self.left = packed(self.queries.low_ND[rows], ROWS, unsigned=True)
        self.row_scales = filled(self.queries.scale_N[rows], len(self.left) * ROWS)

    def _multiply(self, rows: slice, start: int, end: int) -> None:
        from operators.fused import sweep_fused
        from operators.microkernels import COLUMNS

        low = (self.row_bars[rows] - self.row_errors[rows]).astype(np.float32)
        row_bars = np.full(len(self.row_scales), np.inf, np.float32)
        row_bars[: len(low)] = np.nextafter(low, np.float32(-np.inf))
        starts = np.linspace(start // COLUMNS, -(-end // COLUMNS), self.blocks + 1).astype(np.int64)
        ends = np.diff(starts) * len(self.left)
        done, count = np.zeros(self.blocks, np.int64), np.zeros(self.blocks, np.int64)
        while (done < ends).any():
            sweep_fused(
                (self.left, self.engine.panels),
                self.queries.exact_ND[rows],
                self.gallery.exact_ND,
                (row_bars, self.row_bars[rows], self.order[rows]),
                (self.column_bars, self.column_errors, self.highest, self.engine.order),
                (self.row_scales, *self.engine.scales, self.column_offsets),
                self.wanted.columns,
                starts,
                done,
                self.out,
                count,
            )
            self._hold(count)
