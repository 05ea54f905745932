"""One pass of the mixed-precision engine over all products of a block with a shard."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.engines import Wanted

if TYPE_CHECKING:
    import torch

    from operators.mixed import MixedEngine, Operand

CHUNK = 1024
"""Queries of one product."""
TILE = 8192
"""Gallery vectors of one product; its scores (16 MB in bf16) stay in the processor's cache."""
GROUP = 64
"""Scores that are looked at together; divides CHUNK and TILE."""
BUDGET = 3_000_000
"""Pairs held before they are scored and thinned out, which bounds memory however many tie."""
SAMPLE = 512
"""Queries from which the first bars of gallery vectors are taken."""


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


class TilePass:
    """Compares every product with the bars and keeps what may matter."""

    def __init__(
        self, engine: "MixedEngine", queries: "Operand", wanted: Wanted, row_bars_Q: NDArray[np.float64]
    ) -> None:
        import torch

        self.engine, self.queries, self.wanted = engine, queries, wanted
        self.gallery = engine.gallery
        self.row_errors, self.column_errors = engine.errors(queries)
        self.row_bits = engine.as_bits(row_bars_Q - self.row_errors)
        count = len(self.gallery.exact_ND)
        self.seeds = self._seeds()
        self.highest = np.full((count, max(wanted.columns, 1)), -np.inf, np.float32)
        self.scores = torch.empty(CHUNK * TILE, dtype=engine.dtype)
        self.held = Found(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))
        self.fresh: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        self.budget = BUDGET

    def run(self) -> Found:
        """All pairs that are wanted as far as this block and shard know."""
        for start in range(0, len(self.queries.exact_ND), CHUNK):
            column_bits = self._column_bits()
            for at in range(0, len(self.gallery.exact_ND), TILE):
                self._product(start, at, column_bits)
                if sum(len(query) for query, _ in self.fresh) > self.budget:
                    self._settle()
        self._settle()
        return self.held

    def _seeds(self) -> NDArray[np.float64]:
        """Scores that `columns` queries of a sample reach, per gallery vector (G,)."""
        import torch

        seeds = np.full(len(self.gallery.exact_ND), -np.inf)
        chosen = np.random.default_rng(0).permutation(len(self.queries.exact_ND))[:SAMPLE]
        if 0 < self.wanted.columns <= len(chosen):
            sample = self.queries.low_ND[torch.from_numpy(chosen)]
            for at in range(0, len(seeds), TILE):
                scores = torch.mm(self.gallery.low_ND[at : at + TILE], sample.T).float()
                seeds[at : at + TILE] = scores.topk(self.wanted.columns, dim=1).values[:, -1].double().numpy()
        return seeds

    def _column_bits(self) -> "torch.Tensor | None":
        """Bars of the gallery vectors from what has been seen so far."""
        if not self.wanted.columns:
            return None
        reached = np.maximum(self.seeds, self.highest[:, -1].astype(np.float64))
        return self.engine.as_bits(reached - 2 * self.column_errors)

    def _product(self, start: int, at: int, column_bits: "torch.Tensor | None") -> None:
        """Multiply one chunk of queries with one tile, and hold what passes a bar."""
        import torch

        left = _padded(self.queries.low_ND[start : start + CHUNK])
        right = _padded(self.gallery.low_ND[at : at + TILE])
        scores = torch.mm(left, right.T, out=self.scores[: len(left) * len(right)].view(len(left), len(right)))
        bits = scores.view(self.engine.bits)
        row_bits = torch.full((len(left),), torch.iinfo(self.engine.bits).max, dtype=self.engine.bits)
        row_bits[: len(self.row_bits[start : start + CHUNK])] = self.row_bits[start : start + CHUNK]
        self._hold(start, at, scores, *_row_hits(bits, row_bits))
        if column_bits is not None:
            own = torch.full((len(right),), torch.iinfo(self.engine.bits).max, dtype=self.engine.bits)
            own[: len(column_bits[at : at + TILE])] = column_bits[at : at + TILE]
            self._hold(start, at, scores, *_column_hits(bits, row_bits, own))

    def _hold(self, start: int, at: int, scores: "torch.Tensor", query: "torch.Tensor", group: "torch.Tensor") -> None:
        """Keep pairs, given by their place in a product, that are no padding."""
        from operators.kernels import raise_bars

        real = (query < len(self.queries.exact_ND) - start) & (group < len(self.gallery.exact_ND) - at)
        query, group = query[real], group[real]
        q, g = (query + start).int().numpy(), (group + at).int().numpy()
        if self.wanted.columns and len(q):
            raise_bars(self.highest, g, scores[query, group].float().numpy())
        self.fresh.append((q, g))

    def _settle(self) -> None:
        """Score what was held exactly, and keep what is among the best of its query or vector, or over the floor."""
        from operators.kernels import best_of_each, exact_pairs

        if not self.fresh:
            return
        query, group = (np.concatenate([part[side] for part in self.fresh]) for side in (0, 1))
        self.fresh = []
        cosine = exact_pairs(self.queries.exact_ND, self.gallery.exact_ND, query, group)
        both = self.held.plus(Found(query, group, cosine))
        wanted = self.wanted
        keep = best_of_each(both.query, len(self.queries.exact_ND), both.cosine, both.group, wanted.k)
        if wanted.columns:
            count = len(self.gallery.exact_ND)
            keep |= best_of_each(both.group, count, both.cosine, both.query, wanted.columns)
        if wanted.floor is not None:
            keep |= both.cosine >= wanted.floor
        self.held = both.take(keep)
        self.budget = BUDGET + len(self.held.query)


def _padded(vectors_ND: "torch.Tensor") -> "torch.Tensor":
    """`vectors_ND` with zero rows up to a multiple of GROUP."""
    import torch

    missing = -len(vectors_ND) % GROUP
    return torch.nn.functional.pad(vectors_ND, (0, 0, 0, missing)) if missing else vectors_ND


def _row_hits(bits_QG: "torch.Tensor", row_bits_Q: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Places of the scores that reach the bar of their query.

    Column j belongs to group j mod (G / GROUP), so that maxima run along memory.
    """
    rows, groups = len(bits_QG), bits_QG.shape[1] // GROUP
    grouped = bits_QG.view(rows, GROUP, groups)
    row, group = (grouped.amax(1) >= row_bits_Q[:, None]).nonzero(as_tuple=True)
    place, within = (grouped[row, :, group] >= row_bits_Q[row][:, None]).nonzero(as_tuple=True)
    return row[place], group[place] + within * groups


def _column_hits(
    bits_QG: "torch.Tensor", row_bits_Q: "torch.Tensor", column_bits_G: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Places of the scores that reach the bar of their gallery vector but not that of their query."""
    groups, columns = len(bits_QG) // GROUP, bits_QG.shape[1]
    grouped = bits_QG.view(GROUP, groups, columns)
    group, column = (grouped.amax(0) >= column_bits_G).nonzero(as_tuple=True)
    scores = grouped[:, group, column]
    passed = (scores >= column_bits_G[column]) & (scores < row_bits_Q.view(GROUP, groups)[:, group])
    within, place = passed.nonzero(as_tuple=True)
    return group[place] + within * groups, column[place]
