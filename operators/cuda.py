"""The engine for a CUDA device: a product of the stored fp16 vectors filters, with a margin that loses nothing.

Stored vectors are fp16 and scores come out in fp32, so neither is rounded; only the accumulation is. Its error is at
most (d + ceil(d/4)) 2^-23 |x||y|, counting every addend of truncating multi-operand adders (Fasi et al., PeerJ CS
2021). What is kept is scored in fp64 on the device, exactly in any order (`operators/vectors.py`).

Every held pair has a value and says whether it is exact; its cosine lies between `low` and `high`. The k-th highest
`low` of a query bounds its k-th best cosine from below, which gives its bar; likewise for gallery vectors. All other
lines are the same on every device, so they are tested without CUDA too.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.engines import Proposals, Wanted
from operators.errors import DeviceError

if TYPE_CHECKING:
    import torch

TILE_BYTES = 1 << 30
"""Memory for the scores of one product; comparing them takes half as much again."""
LARGEST = 1 << 32
"""More is not used: kernels count the scores of a product in 32 bits."""
ROOM = 4_000_000
"""Pairs held before they are thinned out, beside those that the answer itself needs."""
ROW_SAMPLE = 4096
"""Gallery vectors at least from which first bars of queries are taken."""
COLUMN_SAMPLE = 512
"""Queries at least from which first bars of gallery vectors are taken."""
LONGEST = 1.0011
"""Length of a stored vector at most."""
ALIGNED = 128
"""Gallery vectors of a product are a multiple of this, which fast kernels need."""


def usable_device() -> "torch.device | None":
    """The CUDA device to use; None where torch sees none."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def accumulation(width: int) -> float:
    """Largest error of a score of two stored vectors of `width` coordinates."""
    return (width + -(-width // 4)) * 2.0**-23 * LONGEST**2


class DeviceEngine:
    """Filters by an fp16 matrix product with fp32 scores; see the module's text."""

    def __init__(
        self,
        gallery_GD: NDArray[np.float16],
        device: "torch.device",
        tile_bytes: int = TILE_BYTES,
        room: int = ROOM,
    ) -> None:
        import torch

        self.device, self.tile_bytes, self.room = device, min(tile_bytes, LARGEST), room
        self.gallery_GD = torch.from_numpy(np.array(gallery_GD, np.float16, order="C")).to(device)
        error = accumulation(gallery_GD.shape[1])
        self.margin = error * (1 + 2.0**-20)
        """Bounds the error of a score also after sums and differences with it were rounded in fp64."""
        cuda = device.type == "cuda"
        self.about: dict[str, Any] = {
            "engine": "mixed",
            "device": torch.cuda.get_device_name(device) if cuda else device.type,
            "dtype": "float16",
            "residual": 0.0,
            "accumulation": error,
            "margin": self.margin,
            "reason": "a CUDA device is present" if cuda else "asked for",
        }

    def propose(self, queries_QD: NDArray[np.float16], wanted: Wanted) -> Proposals:
        """See `Engine`; no pairs but the wanted ones are returned."""
        import torch

        from operators.mixed import exact_products

        if not len(queries_QD) or not len(self.gallery_GD):
            return Proposals(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))
        exact_products()
        queries = torch.from_numpy(np.array(queries_QD, np.float16, order="C")).to(self.device)
        held = DevicePass(self, queries, wanted).run()
        return Proposals(held.query.cpu().numpy(), held.group.cpu().numpy(), held.value.cpu().numpy())

    def scores(self, left_MD: "torch.Tensor", right_ND: "torch.Tensor") -> "torch.Tensor":
        """fp32 scores (M, N), none further than the margin from the exact cosine."""
        import torch

        if self.device.type == "cuda":
            return torch.mm(left_MD, right_ND.T, out_dtype=torch.float32)
        return torch.mm(left_MD.float(), right_ND.float().T)

    def exact(self, left_MD: "torch.Tensor", right_MD: "torch.Tensor") -> "torch.Tensor":
        """Exact cosine of row i with row i, shape (M,)."""
        return left_MD.double().mul_(right_MD).sum(1)


class Pairs(NamedTuple):
    """Pairs as parallel arrays on the device."""

    query: "torch.Tensor"
    """int32."""
    group: "torch.Tensor"
    """int32."""
    value: "torch.Tensor"
    """Cosine, fp64: exact, or within the margin."""
    exact: "torch.Tensor"
    """Whether the value is exact, bool."""

    def take(self, index: "torch.Tensor") -> "Pairs":
        """The pairs at `index`."""
        return Pairs(*(array[index] for array in self))


class DevicePass:
    """Compares every product of a block and a gallery with the bars, and keeps what may matter."""

    def __init__(self, engine: DeviceEngine, queries_QD: "torch.Tensor", wanted: Wanted) -> None:
        import torch

        self.engine, self.queries_QD, self.wanted = engine, queries_QD, wanted
        self.gallery_GD = engine.gallery_GD
        rows, columns = len(queries_QD), len(self.gallery_GD)
        self.row_reach = torch.full((rows,), -torch.inf, dtype=torch.float64, device=engine.device)
        """Cosines that at least k gallery vectors of each query reach for certain (Q,)."""
        self.column_reach = torch.full((columns,), -torch.inf, dtype=torch.float64, device=engine.device)
        """Cosines that at least `columns` queries of each gallery vector reach for certain (G,)."""
        self.limit = engine.room + rows * min(wanted.k, columns) + columns * min(wanted.columns, rows)
        none = torch.zeros(0, dtype=torch.int32, device=engine.device)
        self.held = Pairs(none, none, none.double(), none.bool())
        self.fresh: list[Pairs] = []
        self.fresh_count = 0
        self._refresh()

    def run(self) -> Pairs:
        """All wanted pairs, exact."""
        height, width = tile_shape(len(self.queries_QD), len(self.gallery_GD), self.engine.tile_bytes)
        self._seed(self.gallery_GD, self.queries_QD, self.column_reach, self.wanted.columns, COLUMN_SAMPLE)
        for start in range(0, len(self.queries_QD), height):
            chunk, reach = self.queries_QD[start : start + height], self.row_reach[start : start + height]
            self._seed(chunk, self.gallery_GD, reach, self.wanted.k, ROW_SAMPLE)
            self._refresh()
            for at in range(0, len(self.gallery_GD), width):
                self._hold(self.engine.scores(chunk, self.gallery_GD[at : at + width]), start, at)
        self._thin(final=True)
        return self.held

    def _seed(
        self, owners_ND: "torch.Tensor", others_MD: "torch.Tensor", reach_N: "torch.Tensor", limit: int, least: int
    ) -> None:
        """Raise `reach_N` to what `limit` vectors of a sample of `others_MD` reach."""
        import torch

        size = min(len(others_MD), max(least, 32 * limit, len(others_MD) // 16))
        if not 0 < limit <= size:
            return
        chosen = np.random.default_rng(0).permutation(len(others_MD))[:size]
        sample = others_MD[torch.from_numpy(chosen).to(others_MD.device)]
        step = max(1, self.engine.tile_bytes // (4 * size))
        for at in range(0, len(owners_ND), step):
            top = self.engine.scores(owners_ND[at : at + step], sample).topk(limit, dim=1).values[:, -1]
            reach_N[at : at + step].clamp_(min=top.double() - self.engine.margin)

    def _refresh(self) -> None:
        """Bars in fp32, rounded down, from what is reached."""
        wanted, margin = self.wanted, self.engine.margin
        rows = self.row_reach if wanted.floor is None else self.row_reach.clamp(max=wanted.floor)
        self.row_bars = below(rows - margin)
        self.column_bars = below(self.column_reach - margin) if wanted.columns else None

    def _hold(self, scores_MN: "torch.Tensor", start: int, at: int) -> None:
        """Keep the pairs of a tile, whose first is (`start`, `at`), that pass a bar; by halves while too many do."""
        import torch

        rows, columns = scores_MN.shape
        hits = scores_MN >= self.row_bars[start : start + rows, None]
        if self.column_bars is not None:
            hits |= scores_MN >= self.column_bars[at : at + columns]
        if int(hits.count_nonzero()) > self.engine.room and hits.numel() > 1:
            del hits
            if rows >= columns:
                self._hold(scores_MN[: rows // 2], start, at)
                self._hold(scores_MN[rows // 2 :], start + rows // 2, at)
            else:
                self._hold(scores_MN[:, : columns // 2], start, at)
                self._hold(scores_MN[:, columns // 2 :], start, at + columns // 2)
            return
        row, column = hits.nonzero(as_tuple=True)
        value = scores_MN[row, column].double()
        exact = torch.zeros(len(row), dtype=torch.bool, device=row.device)
        self.fresh.append(Pairs((row + start).int(), (column + at).int(), value, exact))
        self.fresh_count += len(row)
        if self.fresh_count > self.engine.room + len(self.held.query) // 2:
            self._thin()

    def _thin(self, *, final: bool = False) -> None:
        """Drop pairs that cannot be wanted; exact scores settle the rest if it is large, or at the end."""
        import torch

        held = Pairs(*(torch.cat(arrays) for arrays in zip(self.held, *self.fresh, strict=True)))
        self.fresh, self.fresh_count = [], 0
        held = self._wanted_of(held)
        if final or int((~held.exact).count_nonzero()) > self.limit:
            held = self._wanted_of(self._settled(held))
        self.held = held
        self._refresh()

    def _wanted_of(self, pairs: Pairs) -> Pairs:
        """Those of `pairs` that may be among the best of either side or over the floor; bars rise with them."""
        query, group, value, exact = pairs
        slack = self.engine.margin * (~exact).double()
        low, high = value - slack, value + slack
        keep = best_of_each(query, group, low, self.row_reach, self.wanted.k)
        keep |= ~exact & (high >= self.row_reach[query])
        if self.wanted.columns:
            keep |= best_of_each(group, query, low, self.column_reach, self.wanted.columns)
            keep |= ~exact & (high >= self.column_reach[group])
        if self.wanted.floor is not None:
            keep |= high >= self.wanted.floor
        return pairs.take(keep)

    def _settled(self, pairs: Pairs) -> Pairs:
        """The same pairs, all exact.

        Raises
        ------
        DeviceError
            If a score is further from the exact cosine than the device's arithmetic allows.
        """
        open_pairs = (~pairs.exact).nonzero()[:, 0]
        value, stray = pairs.value.clone(), 0.0
        step = max(1, self.engine.tile_bytes // (32 * self.queries_QD.shape[1]))
        for at in range(0, len(open_pairs), step):
            part = open_pairs[at : at + step]
            left, right = self.queries_QD[pairs.query[part]], self.gallery_GD[pairs.group[part]]
            value[part] = self.engine.exact(left, right)
            stray = max(stray, float((value[part] - pairs.value[part]).abs().max()))
        if stray > self.engine.margin:
            raise off_by(str(self.engine.about["device"]), stray, self.engine.margin)
        return pairs._replace(value=value, exact=pairs.exact | True)


def off_by(device: str, stray: float, margin: float) -> DeviceError:
    """The error of a `device` one of whose scores is `stray` from the exact cosine, more than the proven `margin`."""
    return DeviceError(
        f"a score of {device} is off by {stray:.2e}; its arithmetic allows {margin:.2e}, so results would not be "
        f"exact. Search on processors, with search.shards.gpus=0, and have the device and its driver checked."
    )


def tile_shape(queries: int, gallery: int, tile_bytes: int) -> tuple[int, int]:
    """Queries and gallery vectors of one product whose fp32 scores fit `tile_bytes`."""
    scores = max(1, min(tile_bytes, LARGEST) // 4)
    width = min(gallery, scores // min(queries, math.isqrt(scores)))
    if ALIGNED < width < gallery:
        width -= width % ALIGNED
    return min(queries, scores // width), width


def best_of_each(
    owner: "torch.Tensor", order: "torch.Tensor", low: "torch.Tensor", reach_N: "torch.Tensor", limit: int
) -> "torch.Tensor":
    """Which entries are among the `limit` best of their owner, by highest `low`, then lowest `order`; shape (M,).

    Raises `reach_N`, one entry for each owner, to the `limit`-th best where an owner has as many.
    """
    import torch

    sequence = order.argsort(stable=True)
    sequence = sequence[low[sequence].argsort(descending=True, stable=True)]
    sequence = sequence[owner[sequence].argsort(stable=True)]
    counts = torch.bincount(owner, minlength=len(reach_N))
    owners = owner[sequence].long()
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owners]
    last = sequence[place == limit - 1]
    reach_N[owner[last].long()] = torch.maximum(reach_N[owner[last].long()], low[last])
    kept = torch.zeros(len(owner), dtype=torch.bool, device=owner.device)
    kept[sequence] = place < limit
    return kept


def below(bars_N: "torch.Tensor") -> "torch.Tensor":
    """The next fp32 number below each bar, so that rounding raises none."""
    import torch

    low = bars_N.float()
    return torch.nextafter(low, torch.full_like(low, -torch.inf))
