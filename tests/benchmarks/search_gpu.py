"""The exact search on a CUDA device against its peers: `make bench-search-gpu` (QUICK=1 for a smaller shape).

All in one run, on the same vectors, in blocks of queries as the search stage sends them:

- matmul     the bare product of the fp16 vectors with fp32 scores in the tiles of `mixed`, nothing kept: the ceiling
- mixed      this project's engine (`DeviceEngine.propose`): top-k of every query, every cosine exact in fp64, complete
             at ties; vectors of queries come from the processor's memory, pairs go back to it
- both       the same with the three best queries of every gallery vector
- topk       torch: the same product, `topk` of every tile, `topk` of those; one direction, not exact at ties
- faiss      faiss' flat index on the device in each of its types; one direction, not exact at ties

The proposals of some queries are compared with plain fp64 products. It needs torch, NumPy and Numba, not Ray or Arrow:
`PYTHONPATH=. python3 tests/benchmarks/search_gpu.py` runs anywhere. Without a CUDA device it says so and ends; TINY=1
runs all of it on the processor in a tiny shape, whose times mean nothing. The last line is JSON.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import numpy as np
import torch

from operators.cuda import DeviceEngine, tile_shape
from operators.engines import Wanted
from operators.mixed import exact_products

TINY, QUICK = os.environ.get("TINY") == "1", os.environ.get("QUICK") == "1"
SHAPE = (64, 600, 32) if TINY else (16_384, 262_144, 512) if QUICK else (100_000, 1_000_000, 512)
BLOCK = 24 if TINY else 16_384
LISTS = (1, 10, 100)
REPEATS = int(os.environ.get("REPEATS", "1" if TINY else "5"))
CHECKED = 32
COLUMNS = 3


class Vectors(NamedTuple):
    """Stored vectors in the processor's memory and on the device."""

    host: np.ndarray
    device: torch.Tensor


def identities(device: torch.device) -> tuple[Vectors, Vectors]:
    """Queries and gallery: persons with several images; a quarter of the queries show persons of the gallery."""
    queries, gallery, width = SHAPE
    random = torch.Generator(device).manual_seed(0)
    centres = torch.randn(gallery // 10, width, generator=random, device=device)
    made = []
    for count, low, high in ((queries, len(centres) * 3 // 8, len(centres)), (gallery, 0, len(centres) // 2)):
        stored = torch.empty(count, width, dtype=torch.float16, device=device)
        for at in range(0, count, 65_536):
            part = stored[at : at + 65_536]
            who = torch.randint(low, high, (len(part),), generator=random, device=device)
            raw = centres[who] + 0.8 * torch.randn(len(part), width, generator=random, device=device)
            part.copy_(raw.double() / raw.double().norm(dim=1, keepdim=True))
        made.append(Vectors(stored.cpu().numpy(), stored))
    return made[0], made[1]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of `work` after one call that is not counted, the device idle at both ends."""
    times = []
    for _ in range(1 + REPEATS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mixed(engine: DeviceEngine, queries: Vectors, wanted: Wanted) -> float:
    def work() -> None:
        for at in range(0, len(queries.host), BLOCK):
            engine.propose(queries.host[at : at + BLOCK], wanted)

    return seconds(work, engine.device)


def matmul(engine: DeviceEngine, queries: Vectors) -> float:
    def work() -> None:
        for at in range(0, len(queries.device), BLOCK):
            block = queries.device[at : at + BLOCK]
            height, width = tile_shape(len(block), len(engine.gallery_GD), engine.tile_bytes)
            for top in range(0, len(block), height):
                for left in range(0, len(engine.gallery_GD), width):
                    engine.scores(block[top : top + height], engine.gallery_GD[left : left + width])

    return seconds(work, engine.device)


def topk(engine: DeviceEngine, queries: Vectors, k: int) -> float:
    def work() -> None:
        for at in range(0, len(queries.host), BLOCK):
            block = torch.from_numpy(queries.host[at : at + BLOCK]).to(engine.device)
            height, width = tile_shape(len(block), len(engine.gallery_GD), engine.tile_bytes)
            for top in range(0, len(block), height):
                best = []
                for left in range(0, len(engine.gallery_GD), width):
                    part = engine.gallery_GD[left : left + width]
                    value, index = engine.scores(block[top : top + height], part).topk(min(k, len(part)), dim=1)
                    best.append((value, index + left))
                value, place = torch.cat([value for value, _ in best], 1).topk(k, dim=1)
                torch.cat([index for _, index in best], 1).gather(1, place).cpu()
                value.cpu()

    return seconds(work, engine.device)


def faiss_seconds(queries: Vectors, gallery: Vectors, k: int) -> dict[str, float]:
    """Seconds of faiss' flat index in each type; nothing where faiss has no device."""
    try:
        from operators.faiss_gpu import faiss_device

        device = faiss_device()
    except ImportError:
        device = None
    if device is None:
        return {}
    left, right = queries.host.astype(np.float32), gallery.host.astype(np.float32)
    found = {}
    for dtype in device.dtypes:
        held = device.hold(rounded(right, dtype), dtype)
        low = rounded(left, dtype)

        def work(held: object = held, low: np.ndarray = low, dtype: str = dtype) -> None:
            for at in range(0, len(low), BLOCK):
                device.search(held, low[at : at + BLOCK], k, dtype)

        found[dtype] = seconds(work, queries.device.device)
        del held
    return found


def rounded(vectors_ND: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(vectors_ND).to(getattr(torch, dtype)).float().numpy()


def missed(engine: DeviceEngine, queries: Vectors, wanted: Wanted) -> int:
    """Of the k best of some queries, by fp64 products and full sorts, how many are not proposed with their cosine."""
    some = queries.host[:: max(1, len(queries.host) // CHECKED)][:CHECKED]
    left = torch.from_numpy(some).to(engine.device).double()
    right = engine.gallery_GD
    parts = [left @ right[at : at + 65_536].double().T for at in range(0, len(right), 65_536)]
    exact = torch.cat(parts, 1).cpu().numpy()
    best = np.argsort(-exact, axis=1, kind="stable")[:, : wanted.k]
    found = engine.propose(some, wanted)
    pairs = zip(found.query.tolist(), found.group.tolist(), strict=True)
    given = dict(zip(pairs, found.cosine.tolist(), strict=True))
    return sum(given.get((q, g)) != float(exact[q, g]) for q, row in enumerate(best.tolist()) for g in row)


def described(device: torch.device) -> str:
    """The device and the versions of what computes."""
    packages = []
    for name in ("torch", "numpy", "numba", "faiss-gpu", "faiss-gpu-cu12"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name} not installed")
    if device.type != "cuda":
        return f"{platform.machine()} processor, Python {platform.python_version()}, {', '.join(packages)}"
    facts = torch.cuda.get_device_properties(device)
    return (
        f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}, "
        f"CUDA {torch.version.cuda}, Python {platform.python_version()}, {', '.join(packages)}"
    )


def main() -> None:
    if not TINY and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured (TINY=1 runs the script on the processor, in a tiny shape)")
        return
    device = torch.device("cpu" if TINY else "cuda")
    print(described(device))
    queries, gallery, width = SHAPE
    print(f"{queries:,} queries x {gallery:,} gallery vectors x {width}, fp16 stored, scores fp32, cosines fp64")
    print(f"blocks of {BLOCK:,} queries; seconds are medians of {REPEATS} after one; mixed is DeviceEngine.propose")
    exact_products()
    left, right = identities(device)
    engine = DeviceEngine(right.host, device)
    operations = 2 * queries * gallery * width
    bare = matmul(engine, left)
    print(f"matmul: {bare:.4f} s, {operations / bare / 1e12:.1f} TFLOP/s")
    results: dict[int, dict[str, float]] = {}
    by_type: dict[str, float] = {}
    print(" ".join(f"{name:>12}" for name in ("k", "way", "seconds", "TFLOP/s", "of matmul", "mixed faster")))
    for k in LISTS:
        wanted = Wanted(k, 0, None)
        times = {"mixed": mixed(engine, left, wanted), "both": mixed(engine, left, wanted._replace(columns=COLUMNS))}
        times["topk"] = topk(engine, left, k)
        by_type = faiss_seconds(left, right, k)
        times |= {f"faiss {dtype}": took for dtype, took in by_type.items()}
        results[k] = times
        for name, took in times.items():
            figures = (took, operations / took / 1e12, bare / took, took / times["mixed"])
            print(f"{k:>12} {name:>12} " + " ".join(f"{figure:>12.4f}" for figure in figures), flush=True)
    if not by_type:
        print("faiss: not measured, no faiss with GPU support is installed or it sees no device")
    wrong = sum(missed(engine, left, Wanted(k, 0, None)) for k in LISTS)
    print(f"checked against fp64 products: {min(CHECKED, queries)} queries at k={LISTS}, {wrong} of their best missed")
    print(json.dumps(summary(results, bare, operations, wrong, device)))
    if wrong:
        raise SystemExit(1)


def summary(
    results: dict[int, dict[str, float]], bare: float, operations: int, wrong: int, device: torch.device
) -> dict[str, object]:
    """The figures of k=10, and the lowest of all k."""
    main_row = results[10]
    peers = [took for name, took in main_row.items() if name.startswith("faiss")]
    return {
        "bench": "search_gpu",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "shape": list(SHAPE),
        "tflops": round(operations / main_row["mixed"] / 1e12, 3),
        "matmul_tflops": round(operations / bare / 1e12, 3),
        "fraction_of_matmul": round(bare / main_row["mixed"], 3),
        "fraction_of_matmul_lowest": round(min(bare / times["mixed"] for times in results.values()), 3),
        "fraction_of_matmul_both_directions": round(bare / main_row["both"], 3),
        "ratio_vs_topk": round(main_row["topk"] / main_row["mixed"], 2),
        "ratio_vs_faiss": round(min(peers) / main_row["mixed"], 2) if peers else None,
        "peak_device_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None,
        "missed": wrong,
        "tiny": TINY,
        "quick": QUICK,
    }


if __name__ == "__main__":
    main()
