"""The exact search against its peers: `make bench-search` (QUICK=1 for a minute's version).

Peers, all in the same run, with the same number of threads, on the same vectors:

- faiss      faiss.IndexFlatIP, top-k of every query, one direction, not exact at ties
- matmul     the bare low-precision matrix product of the same shape, nothing kept: the ceiling of any such filter
- script     NumPy dot products of blocks, every positive score through a Python heap, as published research scripts do

`exact` is this project's search: top-k of every query, every cosine exact in fp64, complete at ties; `both` adds the
three best queries of every gallery vector. The last line is JSON.
"""

import heapq
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np

from operators.engines import Wanted, tell, use_threads
from operators.gallery import shard
from operators.neighbors import ShardSearch
from operators.vectors import normalise

QUICK = os.environ.get("QUICK") == "1"
THREADS = len(os.sched_getaffinity(0))
QUERIES, GALLERY = (4_000, 50_000) if QUICK else (20_000, 200_000)
REPEATS = int(os.environ.get("REPEATS", "2" if QUICK else "3"))


def identities(width: int, queries: int, gallery: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of persons with several images; a quarter of the queries show persons of the gallery."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((gallery // 10, width), np.float32)
    people = [rng.integers(0, len(centres) // 2, gallery), rng.integers(len(centres) * 3 // 8, len(centres), queries)]
    made = [centres[who] + 0.8 * rng.standard_normal((len(who), width), np.float32) for who in people]
    return normalise(made[1])[0], normalise(made[0])[0]


def crowded(width: int, queries: int, gallery: int) -> tuple[np.ndarray, np.ndarray]:
    """Adversarial: all scores close together, one vector in four an exact copy of another."""
    rng = np.random.default_rng(1)
    centre = rng.standard_normal(width)
    made = [centre + 0.5 * rng.standard_normal((count, width), np.float32) for count in (queries, gallery)]
    for one in made:
        one[: len(one) // 4] = one[len(one) // 4 : 2 * (len(one) // 4)]
    return normalise(made[0])[0], normalise(made[1])[0]


def seconds(work: Callable[[], object]) -> float:
    """Median time of `work` after one call that is not counted."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def exact(queries: np.ndarray, gallery: np.ndarray, k: int, columns: int) -> float:
    search = ShardSearch(shard(np.arange(len(gallery)), gallery), "mixed", Wanted(k, columns, None))
    if search.engine and not columns:
        print(f"{'':>10} {search.engine.about['reason']}")
    return seconds(lambda: search.tile(np.arange(len(queries)), queries, 0))


def flat(queries: np.ndarray, gallery: np.ndarray, k: int) -> float:
    import faiss

    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery.astype(np.float32))
    return seconds(lambda: index.search(queries.astype(np.float32), k))


def matmul(queries: np.ndarray, gallery: np.ndarray) -> float:
    import torch

    from operators.tilepass import CHUNK, TILE

    def product(dtype: torch.dtype, count: int) -> Callable[[], None]:
        left, right = torch.from_numpy(queries[:count]).to(dtype), torch.from_numpy(gallery).to(dtype)
        out = torch.empty(CHUNK * TILE, dtype=dtype)

        def work() -> None:
            for start in range(0, len(left), CHUNK):
                for at in range(0, len(right), TILE):
                    a, b = left[start : start + CHUNK], right[at : at + TILE]
                    torch.mm(a, b.T, out=out[: len(a) * len(b)].view(len(a), len(b)))

        return work

    trial = {dtype: seconds(product(dtype, CHUNK)) for dtype in (torch.bfloat16, torch.float32)}
    return seconds(product(min(trial, key=lambda one: trial[one]), len(queries)))


def script(queries: np.ndarray, gallery: np.ndarray, k: int) -> float:
    """Seconds for the whole shape, from a part of it: the loop's time is proportional to the number of pairs."""
    part_q, part_g = queries[:64].astype(np.float32), gallery[:8_000].astype(np.float32)
    start = time.perf_counter()
    heap: list[tuple[float, int, int]] = []
    for at in range(0, len(part_g), 1_000):
        scores = part_q @ part_g[at : at + 1_000].T
        for q, row in enumerate(scores):
            for g, score in enumerate(row):
                if score > 0:
                    entry = (float(score), q, at + g)
                    if len(heap) < k:
                        heapq.heappush(heap, entry)
                    elif entry > heap[0]:
                        heapq.heapreplace(heap, entry)
    share = len(part_q) * len(part_g) / (len(queries) * len(gallery))
    return (time.perf_counter() - start) / share


def peak_gib(queries: int) -> float:
    """Peak memory of a process that searches, beyond what it holds before the search."""
    code = f"from benchmark_search import memory; memory({queries})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    code = code.replace("benchmark_search", os.path.splitext(os.path.basename(__file__))[0])
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(shown.stdout.splitlines()[-1])


def memory(queries: int) -> None:
    """Search in blocks of the default size, as the stage does, and print the peak beyond the inputs."""
    use_threads(THREADS)
    tell("faiss", "torch", "numba")
    left, right = identities(512, queries, GALLERY // 2)
    search = ShardSearch(shard(np.arange(len(right)), right), "mixed", Wanted(10, 3, None))
    search.tile(np.arange(8), left[:8], 0)
    before = _status_gib("VmRSS")
    for at in range(0, queries, 8_192):
        block = left[at : at + 8_192]
        search.tile(np.arange(at, at + len(block)), block, 0)
    print(_status_gib("VmHWM") - before)


def _status_gib(name: str) -> float:
    """A size from /proc/self/status. (`ru_maxrss` would count the peak of the process that started this one.)"""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 2**20


def main() -> None:
    use_threads(THREADS)
    tell("faiss", "torch", "numba")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "faiss-cpu", "numba", "numpy"))
    with open("/proc/cpuinfo") as file:
        processor = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    print(f"{processor}, {THREADS} threads, Python {platform.python_version()}, {packages}")
    print(f"{QUERIES:,} queries x {GALLERY:,} gallery vectors, fp16 stored; seconds are medians of {REPEATS}")
    header = ("vectors", "d", "k", "faiss s", "matmul s", "exact s", "vs faiss", "of matmul", "both s", "vs 2 faiss")
    print(" ".join(f"{name:>10}" for name in header))
    rows = []
    for name, make in (("identities", identities), ("crowded", crowded)):
        for width in (512, 128):
            left, right = make(width, QUERIES, GALLERY)
            bare = matmul(left, right)
            for k in (10, 100) if name == "identities" else (10,):
                peer, one, both = flat(left, right, k), exact(left, right, k, 0), exact(left, right, k, 3)
                row = (name, width, k, peer, bare, one, peer / one, bare / one, both, 2 * peer / both)
                rows.append(row)
                print(" ".join(f"{v:>10.2f}" if isinstance(v, float) else f"{v:>10}" for v in row), flush=True)
    left, right = identities(512, QUERIES, GALLERY)
    slow = script(left, right, 100)
    small, large = peak_gib(8_192), peak_gib(16_384 if QUICK else 40_960)
    print(
        f"script, extrapolated: {slow:,.0f} s; peak memory beyond inputs: {small:.2f} and {large:.2f} GiB at two sizes"
    )
    main_row = rows[0]
    figures = {
        "bench": "search",
        "ratio_vs_faiss": round(main_row[6], 2),
        "ratio_vs_faiss_lowest": round(min(row[6] for row in rows), 2),
        "ratio_both_directions_vs_two_faiss": round(main_row[9], 2),
        "fraction_of_matmul": round(main_row[7], 2),
        "ratio_vs_script": round(slow / main_row[5], 1),
        "peak_rss_gib": round(max(small, large), 2),
        "quick": QUICK,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
