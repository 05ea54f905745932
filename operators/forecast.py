"""What a search will take on this machine: seconds from a short trial of it, bytes from the sizes of its arrays."""

import io
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from operators.engines import SMALL, Wanted, use_threads
from operators.gallery import shard
from operators.neighbors import ShardSearch
from operators.results import Lists, tile_of, tile_table
from operators.vectors import normalise

TRIALS = ((512, 49_152), (512, 8_192), (2_048, 49_152))
"""Queries and gallery vectors of the trial's tiles."""


class Speed(NamedTuple):
    """Seconds of one thread."""

    comparison: float
    query: float
    """Per query and tile, whatever the number of its comparisons: its list is scored, stored, read and merged."""
    vector: float
    """Per gallery vector and tile."""
    load: float
    """Per gallery vector of a shard, once."""
    engine: str


def measure(width: int, engine: str, wanted: Wanted, images: int) -> Speed:
    """Search random vectors for a few seconds, with the engine that a shard of `images` would have.

    Leaves this process with one thread for all engines.
    """
    use_threads(1)
    if engine == "auto" and images < SMALL:
        engine = "faiss"
    rng = np.random.default_rng(0)
    made = normalise(rng.standard_normal((max(q + g for q, g in TRIALS), width), np.float32))[0]
    rows, seconds, loads = [], [], []
    for queries, gallery in TRIALS:
        start = time.perf_counter()
        part = shard(np.arange(gallery), made[:gallery])
        search = ShardSearch(part, engine, wanted)
        loads.append((time.perf_counter() - start) / gallery)
        engine = str(search.engine.about["engine"]) if search.engine else engine  # `auto` tries once
        block = (np.arange(queries), made[gallery : gallery + queries])
        _tile(search, (block[0][:16], block[1][:16]), wanted)  # what is loaded and compiled once is not counted
        seconds.append(_tile(search, block, wanted))
        rows.append((queries * gallery, queries, gallery))
    a, b, c = _fit(rows, seconds)
    return Speed(a, b, c, min(loads), engine)


def _tile(search: ShardSearch, block: tuple[np.ndarray, np.ndarray], wanted: Wanted) -> float:
    """Seconds from a block to its merged results."""
    start = time.perf_counter()
    sink = io.BytesIO()
    pq.write_table(tile_table(search.tile(*block, 10**9)), sink, compression="zstd")
    tile = tile_of(pq.read_table(io.BytesIO(sink.getvalue())))
    for k, scored in ((wanted.k, tile.nearest), (max(1, wanted.columns), tile.closest.turned())):
        Lists(k).add(scored)
    return time.perf_counter() - start


def _fit(rows: Sequence[tuple[int, int, int]], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Non-negative costs per comparison, query and vector that explain the measured seconds best."""
    from scipy.optimize import nnls

    scale = np.array(rows, np.float64).max(axis=0)
    found = nnls(np.array(rows) / scale, np.array(seconds))[0] / scale
    return float(found[0]), float(found[1]), float(found[2])


def seconds_of(speed: Speed, tiles: Sequence[tuple[int, int]], shards: Sequence[int], threads: int) -> float:
    """Seconds for tiles of so many queries and vectors each, and shards of so many vectors, on `threads` threads."""
    work = sum(speed.comparison * q * g + speed.query * q + speed.vector * g for q, g in tiles)
    return (work + speed.load * sum(shards)) / max(1, threads)


def shard_bytes(images: int, width: int) -> int:
    """Memory of a shard at most: stored and single-precision vectors, those of the filter, and numbers per row.

    A filter's vectors are single-precision too on some processors; where they are half as long, the stored vectors are
    there twice while the shard is loaded.
    """
    return images * (width * (2 + 4 + 4) + 64)


def tile_bytes(queries: int, gallery: int, width: int, wanted: Wanted, threads: int = 1) -> int:
    """Working memory of one tile: its queries in three precisions and twice, a product, what is held, and the lists."""
    from operators.tilepass import BUDGET, CHUNK, ROOM, TILE

    kept = queries * min(wanted.k, gallery) + gallery * min(wanted.columns, queries)
    budgets = 3 if wanted.columns else 2  # pairs found are there twice while they are thinned out; others wait
    held = (min(BUDGET, queries * gallery) * budgets + kept * 2) * 16
    best = gallery * wanted.columns * 8 + threads * max(ROOM, TILE) * 16
    return 2 * queries * width * 8 + min(CHUNK, queries) * min(TILE, gallery) * 4 + held + best + kept * 24


def stored_bytes(queries: int, gallery: int, wanted: Wanted) -> int:
    """A tile on disk without its pairs over the floor: 17 bytes an entry, of which about 6 compress away."""
    return 11 * (queries * min(wanted.k, gallery) + gallery * min(wanted.columns, queries))
