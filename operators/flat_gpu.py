"""faiss' flat index on a CUDA device: its lists filter, with a margin that loses nothing.

The device is asked for lists of scores only (`Device`); what may be wanted is scored exactly on the processor. Stored
vectors are fp16, so fp16 and fp32 hold them as they are, and rounding to bf16 takes away E, measured for every vector:
|s - <x,y>| <= E_x|y| + E_y|x| + E_xE_y (Cauchy-Schwarz) + (d + ceil(d/4)) 2^-23 |x||y| (accumulation in fp32, counting
every addend of truncating multi-operand adders; Fasi et al., PeerJ CS 2021). faiss sums in fp32, with reduced-precision
sums disallowed and TF32 left off. A machine that is set to force TF32 on changes nothing here: TF32 keeps the 11
significant bits that an fp16 number has, at the exponents of fp32, so it rounds no stored vector, and the bound above
covers its sums. Every fetched score that is kept is compared with the exact cosine; one beyond the margin is an error.

A device's lists are short (2,048 entries). Whoever needs more is searched again in halves of the vectors, down to
slices that one list holds whole; so there is no range search, and no crowd of ties is too large.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from operators.cuda import LONGEST, accumulation, off_by
from operators.engines import SMALL, TRIAL_GALLERY, Proposals, Wanted, tell
from operators.errors import DeviceError

SPARE = 16
"""Entries of a first list beyond the k wanted: few queries need a second."""
ENTRIES = 1 << 24
"""Entries of all lists that are fetched at once."""
OWNERS = 1 << 16
"""Lists that are fetched at once."""
TRIAL = 512
"""Queries of the trial that chooses the type."""

Lists = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Scores in descending order and whose they are, both (N, fetched)."""


class Device(Protocol):
    """What the engine needs of a device. Implemented by `operators/faiss_gpu.py`; tests have one of NumPy."""

    name: str
    limit: int
    """Longest list."""
    dtypes: tuple[str, ...]
    """Types in which it multiplies."""

    def hold(self, low_ND: NDArray[np.float32], dtype: str) -> Any:
        """Keep vectors, whose values `dtype` has, on the device for `search`."""
        ...

    def search(self, held: Any, queries_QD: NDArray[np.float32], k: int, dtype: str) -> Lists:
        """The k highest scores of every query, 1 <= k <= `limit` and at most as many as are held."""
        ...


class Side(NamedTuple):
    """Vectors of one side."""

    exact_ND: NDArray[np.float32]
    low_ND: NDArray[np.float32]
    """What the device multiplies."""
    residual: float
    """Largest length of what rounding took away."""

    def take(self, index: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        """What the device multiplies, of the vectors at `index`."""
        return np.ascontiguousarray(self.low_ND[index])


class Found(NamedTuple):
    """Pairs with the device's scores, as parallel arrays."""

    owner: NDArray[np.int64]
    other: NDArray[np.int64]
    score: NDArray[np.float32]


def side(vectors_ND: NDArray[np.float16], dtype: str) -> Side:
    """Round vectors to `dtype` and measure what is lost."""
    exact = np.ascontiguousarray(vectors_ND, np.float32)
    if dtype != "bfloat16":
        return Side(exact, exact, 0.0)
    bits = exact.view(np.uint32)
    # To nearest, ties to even; a vector of length 1 has no value that would overflow.
    low = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    lost = (low - exact).astype(np.float64)  # a difference of neighbours: exact
    return Side(exact, low, float(np.sqrt(np.einsum("nd,nd->n", lost, lost)).max(initial=0.0)) * (1 + 1e-9))


class FlatDeviceEngine:
    """faiss' flat index on a device; see the module's text."""

    def __init__(self, gallery_GD: NDArray[np.float16], device: Device, dtype: str | None = None) -> None:
        tell("faiss", "numba")
        reason = "given"
        if dtype is None:
            dtype, reason = fastest(gallery_GD, device)
        self.device, self.dtype = device, dtype
        self.gallery = side(gallery_GD, dtype)
        self.held = device.hold(self.gallery.low_ND, dtype)
        self.about: dict[str, Any] = {
            "engine": "faiss",
            "device": device.name,
            "dtype": dtype,
            "residual": self.gallery.residual,
            "accumulation": self.accumulation(self.gallery),
            "margin": self.margin(self.gallery),
            "reason": reason,
        }

    def accumulation(self, queries: Side) -> float:
        """Largest error of the sum of a score of `queries`, whose rounded vectors may be longer than stored ones."""
        longer = (1 + queries.residual / LONGEST) * (1 + self.gallery.residual / LONGEST)
        return accumulation(self.gallery.low_ND.shape[1]) * longer

    def margin(self, queries: Side) -> float:
        """Largest error of a score of `queries`, also after sums and differences with it were rounded in fp64."""
        left, right = queries.residual, self.gallery.residual
        return ((left + right) * LONGEST + left * right + self.accumulation(queries)) * (1 + 2.0**-20)

    def propose(self, queries_QD: NDArray[np.float16], wanted: Wanted) -> Proposals:
        """See `Engine`; the second direction is a second search, with the roles exchanged.

        Raises
        ------
        DeviceError
            If a score is no number, or further from the exact cosine than the device's arithmetic allows.
        """
        if not len(queries_QD) or not len(self.gallery.exact_ND):
            return Proposals(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))
        queries = side(queries_QD, self.dtype)
        margin = self.margin(queries)
        found = [Search(self.device, self.dtype, queries, self.gallery, margin).run(self.held, wanted.k, wanted.floor)]
        if wanted.columns:
            held = self.device.hold(queries.low_ND, self.dtype)
            turned = Search(self.device, self.dtype, self.gallery, queries, margin).run(held, wanted.columns, None)
            found.append(Found(turned.other, turned.owner, turned.score))
        return self._exact(queries, Found(*map(np.concatenate, zip(*found, strict=True))), margin)

    def _exact(self, queries: Side, found: Found, margin: float) -> Proposals:
        """The pairs, each once, with exact cosines, from which no score may stray."""
        from operators.kernels import exact_pairs

        count = len(self.gallery.exact_ND)
        flat, place = np.unique(found.owner * count + found.other, return_inverse=True)
        left, right = (flat // count).astype(np.int32), (flat % count).astype(np.int32)
        cosine = exact_pairs(queries.exact_ND, self.gallery.exact_ND, left, right)
        stray = float(np.abs(cosine[place] - found.score).max(initial=0.0))
        if stray > margin:
            raise off_by(self.device.name, stray, margin)
        return Proposals(left, right, cosine)


class Search:
    """The search of one direction: for every owner the others that may be wanted."""

    def __init__(self, device: Device, dtype: str, owners: Side, others: Side, margin: float) -> None:
        self.device, self.dtype, self.margin = device, dtype, margin
        self.owners, self.others = owners, others
        self.kept: list[Found] = []

    def run(self, held: Any, k: int, floor: float | None) -> Found:
        """All pairs that may be among the k best of an owner, or may reach the floor; `held` holds all others.

        At least k others have a cosine within the margin of the k-th score or above it, and every wanted pair's score
        is within the margin of its cosine; so no wanted pair scores less than the k-th score less twice the margin.
        """
        count = len(self.others.low_ND)
        wanted, most = min(k, count), min(self.device.limit, count)
        bars = np.full(len(self.owners.low_ND), -np.inf)
        pending = np.arange(len(bars))
        if wanted > most:
            if wanted < count:
                self._guess(bars, k, floor)
            fetch = 0
        else:
            fetch = min(k + SPARE, most)
        while len(pending) and fetch:
            later = []
            for rows, scores, index in self._lists(held, pending, fetch):
                bars[rows] = self._bars(scores[:, wanted - 1], floor)
                later.append(self._keep(rows, scores, index, bars, whole=fetch == count, start=0))
            pending = np.concatenate(later)
            fetch = min(4 * fetch, most) if fetch < most else 0
        self._halves(pending, bars, 0, count)
        return Found(*map(np.concatenate, zip(*self.kept, strict=True)))

    def _bars(self, scores_N: NDArray[np.float32], floor: float | None) -> NDArray[np.float64]:
        """The lowest scores that a wanted pair can have, from scores that k others of each owner reach."""
        bars = scores_N.astype(np.float64) - 2 * self.margin
        return bars if floor is None else np.minimum(bars, floor - self.margin)

    def _guess(self, bars_N: NDArray[np.float64], k: int, floor: float | None) -> None:
        """Bars where k is more than a list holds: the k-th of the lists of several slices cannot be too high."""
        count = len(self.others.low_ND)
        size = -(-count // -(-2 * k // self.device.limit))
        fetched = []
        for start in range(0, count, size):
            held = self.device.hold(self.others.take(slice(start, start + size)), self.dtype)
            fetch = min(self.device.limit, size, count - start)
            parts = [scores for _, scores, _ in self._lists(held, np.arange(len(bars_N)), fetch)]
            fetched.append(np.concatenate(parts))
        pool = np.concatenate(fetched, axis=1)
        bars_N[:] = self._bars(-np.partition(-pool, k - 1, axis=1)[:, k - 1], floor)

    def _halves(self, pending: NDArray[np.int64], bars_N: NDArray[np.float64], start: int, stop: int) -> None:
        """All others from `start` to `stop` that reach the bars of the owners `pending`."""
        if not len(pending):
            return
        middle = (start + stop) // 2
        for left, right in ((start, middle), (middle, stop)):
            fetch = min(self.device.limit, right - left)
            held = self.device.hold(self.others.take(slice(left, right)), self.dtype)
            later = [
                self._keep(rows, scores, index, bars_N, whole=fetch == right - left, start=left)
                for rows, scores, index in self._lists(held, pending, fetch)
            ]
            del held
            self._halves(np.concatenate(later), bars_N, left, right)

    def _lists(
        self, held: Any, rows_N: NDArray[np.int64], fetch: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]]:
        """The lists of some owners at a time, with whose they are."""
        step = max(1, min(OWNERS, ENTRIES // fetch))
        for at in range(0, len(rows_N), step):
            rows = rows_N[at : at + step]
            scores, index = self.device.search(held, self.owners.take(rows), fetch, self.dtype)
            if not np.isfinite(scores).all() or index.min() < 0:
                raise DeviceError(
                    f"{self.device.name} gave a list with gaps, so results would not be exact. Search on processors, "
                    f"with search.shards.gpus=0, and have the device and its driver checked."
                )
            yield rows, scores, index

    def _keep(
        self,
        rows_N: NDArray[np.int64],
        scores_NF: NDArray[np.float32],
        index_NF: NDArray[np.int64],
        bars: NDArray[np.float64],
        *,
        whole: bool,
        start: int,
    ) -> NDArray[np.int64]:
        """Keep what reaches the bars in lists that are complete; return the owners of the others."""
        bar = bars[rows_N]
        complete = (scores_NF[:, -1] < bar) | whole
        keep = (scores_NF >= bar[:, None]) & complete[:, None]
        owners = rows_N[np.nonzero(keep)[0]]
        self.kept.append(Found(owners, index_NF[keep] + start, scores_NF[keep]))
        return rows_N[~complete]


def fastest(gallery_GD: NDArray[np.float16], device: Device) -> tuple[str, str]:
    """The type in which a short trial on the device is fastest, and why. All types are exact; a margin costs time."""
    if len(gallery_GD) < SMALL:
        return "float16", f"{len(gallery_GD)} vectors are too few for a trial of types"
    sample, seconds = gallery_GD[:TRIAL_GALLERY], {}
    for dtype in device.dtypes:
        engine = FlatDeviceEngine(sample, device, dtype)
        engine.propose(sample[:TRIAL], Wanted(10, 0, None))
        start = time.perf_counter()
        engine.propose(sample[:TRIAL], Wanted(10, 0, None))
        seconds[dtype] = time.perf_counter() - start
    trial = ", ".join(f"{one} {took:.4f} s" for one, took in seconds.items())
    chosen = min(seconds, key=lambda one: seconds[one])
    return chosen, f"{chosen} is the fastest of {trial} for {TRIAL} x {len(sample)}"
