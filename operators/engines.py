"""Engines find the pairs that could matter, and score them exactly.

An engine holds the distinct vectors of a shard. For a block of distinct queries it returns pairs, each once and with
its exact cosine, that include for certain

- the `k` best gallery vectors of every query,
- the `columns` best queries of every gallery vector,
- every pair with a cosine of `floor` or more,

where ties at the last place go to the lower index. More pairs do no harm: `operators/neighbors.py` keeps the best.
`ENGINES` is the closed list; results do not depend on the choice.
"""

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """What a tile must give."""

    k: int
    """Gallery neighbours of each query."""
    columns: int
    """Release neighbours of each gallery vector; 0 for none."""
    floor: float | None
    """All pairs from this cosine up; None for none."""


class Proposals(NamedTuple):
    """Pairs (query, gallery vector) as parallel arrays, each pair once."""

    query: NDArray[np.int32]
    group: NDArray[np.int32]
    cosine: NDArray[np.float64]
    """Exact."""


class Engine(Protocol):
    """The small interface of all engines."""

    about: dict[str, Any]
    """What the manifest says: engine, device, dtype, residual (largest measured rounding residual of a gallery vector),
    accumulation (bound on the error of the sums), margin (largest error of a score, measured from both) and reason."""

    def propose(self, queries_QD: NDArray[np.float16], wanted: Wanted) -> Proposals:
        """Pairs that include for certain what is `wanted`."""
        ...


def margin(width: int, longest: float = 1.002) -> float:
    """Largest difference between an fp32 inner product of two stored vectors and their exact cosine.

    (d-1)u / (1-(d-1)u) times both lengths, u = 2^-24, holds for any order of summation (Higham, Accuracy and Stability
    of Numerical Algorithms, 2nd ed., section 3.1). `longest` bounds the product of the lengths; stored lengths are 1
    within 1e-3.
    """
    steps = (width - 1) * 2.0**-24
    return steps / (1 - steps) * longest


class FlatEngine:
    """faiss' flat inner-product index; its fp32 scores filter."""

    def __init__(self, gallery_GD: NDArray[np.float16]) -> None:
        tell("faiss", "numba")
        self.gallery_GD = np.ascontiguousarray(gallery_GD, np.float32)
        self.margin = margin(gallery_GD.shape[1])
        self.about: dict[str, Any] = {
            "engine": "faiss",
            "device": "cpu",
            "dtype": "float32",
            "residual": 0.0,
            "accumulation": self.margin,
            "margin": self.margin,
            "reason": "given",
        }

    def propose(self, queries_QD: NDArray[np.float16], wanted: Wanted) -> Proposals:
        """See `Engine`; the second direction is a second search, with the roles exchanged."""
        from operators.kernels import exact_pairs

        queries = np.ascontiguousarray(queries_QD, np.float32)
        pairs = [self._lists(queries, self.gallery_GD, wanted.k)]
        if wanted.columns:
            group, query = self._lists(self.gallery_GD, queries, wanted.columns)
            pairs.append((query, group))
        if wanted.floor is not None:
            pairs.append(self._above(queries, wanted.floor))
        count = len(self.gallery_GD)
        flat = np.unique(np.concatenate([query * count + group for query, group in pairs]))
        left, right = (flat // count).astype(np.int32), (flat % count).astype(np.int32)
        return Proposals(left, right, exact_pairs(queries, self.gallery_GD, left, right))

    def _lists(
        self, queries_QD: NDArray[np.float32], held_GD: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The k best of every query, widened until the last fetched score lies below the margin."""
        index = _index(held_GD)
        queries: list[NDArray[np.int64]] = []
        groups: list[NDArray[np.int64]] = []
        pending = np.arange(len(queries_QD))
        fetch = min(k + 16, len(held_GD))
        while len(pending):
            scores, found = index.search(queries_QD[pending], fetch)
            bar = scores[:, min(k, len(held_GD)) - 1] - 2 * self.margin
            complete = (scores[:, -1] < bar) | (fetch == len(held_GD))
            keep = (scores >= bar[:, None]) & complete[:, None]
            queries.append(pending[np.nonzero(keep)[0]])
            groups.append(found[keep])
            pending = pending[~complete]
            fetch = min(4 * fetch, len(held_GD))
        return np.concatenate(queries), np.concatenate(groups)

    def _above(self, queries_QD: NDArray[np.float32], floor: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All pairs whose cosine can reach the floor."""
        radius = np.nextafter(np.float32(floor - self.margin), np.float32(-2))
        limits, _, group = _index(self.gallery_GD).range_search(queries_QD, float(radius))
        found = limits.astype(np.int64)
        return np.repeat(np.arange(len(queries_QD)), found[1:] - found[:-1]), group.astype(np.int64)


def _index(vectors_GD: NDArray[np.float32]) -> Any:
    import faiss

    index = faiss.IndexFlatIP(vectors_GD.shape[1])
    index.add(vectors_GD)
    return index


def _flat(gallery_GD: NDArray[np.float16], wanted: Wanted) -> Engine:
    from operators.faiss_gpu import faiss_device
    from operators.flat_gpu import FlatDeviceEngine

    device = faiss_device() if _process["gpu"] else None
    engine = FlatEngine(gallery_GD) if device is None else FlatDeviceEngine(gallery_GD, device)
    if device is None and _process["gpu"]:
        engine.about["reason"] = "faiss sees no CUDA device, or was built without support for one"
    return engine


def _mixed(gallery_GD: NDArray[np.float16], wanted: Wanted) -> Engine:
    from operators.cuda import DeviceEngine, usable_device
    from operators.mixed import MixedEngine

    tell("torch", "numba")
    device = usable_device() if _process["gpu"] else None
    return MixedEngine(gallery_GD, wanted) if device is None else DeviceEngine(gallery_GD, device)


ENGINES: Mapping[str, Callable[[NDArray[np.float16], Wanted], Engine]] = {"faiss": _flat, "mixed": _mixed}
"""What is wanted lets an engine choose how it works; it proposes whatever it is asked for."""


_process: dict[str, Any] = {"threads": None, "gpu": False}


def use_threads(count: int, *, gpu: bool = False) -> None:
    """Let all engines of this process use `count` threads, and a CUDA device if `gpu`; results do not depend on it.

    Libraries are told when an engine that uses them is opened: importing all of them takes seconds in every worker.
    """
    _process.update(threads=count, gpu=gpu)


def tell(*libraries: str) -> None:
    """Give `libraries`, of faiss, numba and torch, the number of threads that `use_threads` was called with."""
    count = _process["threads"]
    if count is None:
        return
    for name in libraries:
        library = importlib.import_module(name)
        if name == "faiss":
            library.omp_set_num_threads(count)
        elif name == "numba":
            library.set_num_threads(min(count, library.config.NUMBA_NUM_THREADS))
        else:
            library.set_num_threads(count)


TRIAL_QUERIES = 1024
TRIAL_GALLERY = 32_768
SMALL = 16_384
"""Gallery vectors below which no trial is worth its time."""


def open_engine(name: str, gallery_GD: NDArray[np.float16], wanted: Wanted) -> Engine:
    """The engine called `name`, or for `auto` the one that a short trial on this worker shows to be faster."""
    if name != "auto":
        return ENGINES[name](gallery_GD, wanted)
    if len(gallery_GD) < SMALL:
        return _chosen("faiss", gallery_GD, wanted, f"{len(gallery_GD)} vectors are too few for a trial")
    sample = gallery_GD[:TRIAL_GALLERY]
    seconds = {}
    for candidate, build in ENGINES.items():
        engine = build(sample, wanted)
        engine.propose(sample[:16], wanted)
        start = time.perf_counter()
        engine.propose(sample[:TRIAL_QUERIES], wanted)
        seconds[candidate] = time.perf_counter() - start
    trial = ", ".join(f"{one} {took:.3f} s" for one, took in seconds.items())
    reason = f"fastest of {trial} for {min(TRIAL_QUERIES, len(sample))} x {len(sample)}"
    return _chosen(min(seconds, key=lambda one: seconds[one]), gallery_GD, wanted, reason)


def _chosen(name: str, gallery_GD: NDArray[np.float16], wanted: Wanted, reason: str) -> Engine:
    engine = ENGINES[name](gallery_GD, wanted)
    given = engine.about["reason"]
    engine.about["reason"] = reason if given == "given" else f"{reason}; {given}"
    log.info("engine %s: %s", name, engine.about["reason"])
    return engine


NO_ENGINE: Mapping[str, Any] = {
    "engine": "none",
    "device": "none",
    "dtype": "none",
    "residual": 0.0,
    "accumulation": 0.0,
    "margin": 0.0,
    "reason": "the shard is empty",
}
"""What an empty shard is searched with."""
