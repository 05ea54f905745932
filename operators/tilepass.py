"""One pass of the mixed-precision engine over all products of a block with a shard."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.engines import Wanted

if TYPE_CHECKING:
    from operators.mixed import MixedEngine, Operand

CHUNK = 1024
"""Queries of one product."""
TILE = 8192
"""Gallery vectors of one product; its scores (16 MB in bf16) stay in the processor's cache."""
BUDGET = 3_000_000
"""Pairs held before they are thinned out, which bounds memory however many tie."""
ROOM = 1 << 16
"""Pairs that one thread finds before it hands them over; at least the columns of a product."""


class Found(NamedTuple):
    """Pairs with their exact cosines, as parallel arrays."""

    query: NDArray[np.int32]
    group: NDArray[np.int32]
    cosine: NDArray[np.float64]

    def take(self, index: NDArray[np.integer[Any]] | NDArray[np.bool_]) -> "Found":
        """The pairs at `index`."""
        return Found(self.query[index], self.group[index], self.cosine[index])

    def plus(self, other: "Found") -> "Found":
        """These pairs and then the others."""
        return Found(
            np.concatenate([self.query, other.query]),
            np.concatenate([self.group, other.group]),
            np.concatenate([self.cosine, other.cosine]),
        )

    def joined(self, again: "Found", rows: NDArray[np.int64]) -> "Found":
        """These pairs and those of a second pass over the queries `rows`, each once."""
        merged = self.plus(again._replace(query=rows[again.query].astype(np.int32)))
        _, first = np.unique(merged.query.astype(np.int64) << 32 | merged.group, return_index=True)
        return merged.take(first)


NOTHING = Found(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))


class TilePass:
    """Compares every product with the bars and keeps what may matter."""

    def __init__(
        self, engine: "MixedEngine", queries: "Operand", wanted: Wanted, row_bars_Q: NDArray[np.float64]
    ) -> None:
        import numba
        import torch

        self.engine, self.wanted, self.gallery = engine, wanted, engine.gallery
        self.order = np.random.default_rng(0).permutation(len(queries.exact_ND))
        self.queries = queries.take(self.order)
        row_errors, self.column_errors = engine.errors(self.queries)
        self.row_bars = row_bars_Q[self.order]
        self.row_bits = engine.as_bits(self.row_bars - row_errors)
        count = len(self.gallery.exact_ND)
        limits = np.iinfo(self.row_bits.dtype)
        self.column_bits = np.full(count, limits.min if wanted.columns else limits.max, self.row_bits.dtype)
        self.highest = np.full((count, wanted.columns), -np.inf)
        self.scores = torch.empty(CHUNK * TILE, dtype=engine.dtype)
        self.blocks = numba.get_num_threads()
        room = (self.blocks, max(ROOM, TILE))
        self.out = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.float64)
        self.held = NOTHING
        self.fresh: list[Found] = []
        self.budget = BUDGET

    def run(self) -> Found:
        """All pairs that are wanted as far as this block and shard know."""
        for start in range(0, len(self.queries.exact_ND), CHUNK):
            for at in range(0, len(self.gallery.exact_ND), TILE):
                self._product(start, at)
        self._settle()
        return self.held

    def _product(self, start: int, at: int) -> None:
        """Multiply one chunk of queries with one tile, and hold what passes a bar."""
        import torch

        from operators.kernels import sweep

        rows, group = slice(start, start + CHUNK), slice(at, at + TILE)
        left, right = self.queries.low_ND[rows], self.gallery.low_ND[group]
        scores = torch.mm(left, right.T, out=self.scores[: len(left) * len(right)].view(len(left), len(right)))
        done, count = np.zeros(self.blocks, np.int64), np.zeros(self.blocks, np.int64)
        while done.min() < len(left):
            sweep(
                scores.view(self.engine.bits).numpy(),
                self.queries.exact_ND[rows],
                self.gallery.exact_ND[group],
                (self.row_bits[rows], self.row_bars[rows]),
                (self.column_bits[group], self.column_errors[group], self.highest[group]),
                self.wanted.columns,
                done,
                self.out,
                count,
            )
            for block, used in enumerate(count):
                query, column, cosine = (part[block, :used] for part in self.out)
                query = self.order[query + start].astype(np.int32)
                self.fresh.append(Found(query, column + np.int32(at), cosine.copy()))
            if sum(len(part.query) for part in self.fresh) > self.budget:
                self._settle()

    def _settle(self) -> None:
        """Keep what is among the best of its query or vector, or over the floor."""
        from operators.kernels import best_of_each

        both = Found(*(np.concatenate(sides) for sides in zip(self.held, *self.fresh, strict=True)))
        self.fresh = []
        wanted = self.wanted
        keep = best_of_each(both.query, len(self.queries.exact_ND), both.cosine, both.group, wanted.k)
        if wanted.columns:
            count = len(self.gallery.exact_ND)
            keep |= best_of_each(both.group, count, both.cosine, both.query, wanted.columns)
        if wanted.floor is not None:
            keep |= both.cosine >= wanted.floor
        self.held = both.take(keep)
        self.budget = BUDGET + len(self.held.query)
