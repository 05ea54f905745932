"""The search against a plain fp64 product, pair by pair, and under random plans; `make bench-exact`.

Rows 1 and 2 of the checklist of docs/security.md. First all pairs of two sets with exact copies, near ties and
clusters: what an engine leaves out, adds, or scores differently in the last bit is counted. Then one pair of small sets
cut, ordered, batched and merged at random, PLANS times: every plan must give the bytes of the first. The last line is
JSON; code 1 if anything differed.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from operators import neighbors
from operators.engines import ENGINES, Wanted
from operators.gallery import shard
from operators.neighbors import Scored
from operators.vectors import normalise

QUICK = os.environ.get("QUICK") == "1"
SIDE = 4096 if QUICK else 32768
PLANS = int(os.environ.get("PLANS", "100" if QUICK else "1000"))
WIDTH, K, COLUMNS, FLOOR = 64, 10, 3, 0.9
BLOCK = 1024

Hits = NDArray[np.void]
HIT = np.dtype([("release", np.int64), ("gallery", np.int64), ("cosine", np.float64)])


def people(rng: np.random.Generator, count: int, persons: int) -> NDArray[np.float16]:
    """Stored vectors: exact copies, near ties, and clusters."""
    centres = np.random.default_rng(1).standard_normal((persons, WIDTH))
    noise = rng.choice([0.0, 1e-4, 0.3], (count, 1))
    made = centres[rng.integers(persons, size=count)] + noise * rng.standard_normal((count, WIDTH))
    return np.asarray(normalise(made)[0])


def hits(scored: Scored) -> Hits:
    """Pairs in the order of their rows, so that two results can be compared as bytes."""
    made = np.empty(len(scored.cosine), HIT)
    made["release"], made["gallery"], made["cosine"] = scored.release, scored.gallery, scored.cosine
    return np.sort(made, order=("release", "gallery"))


def best(first: int, cosine_QG: NDArray[np.float64], k: int) -> Hits:
    """The k best of every row of a product, ties by the lower column, as plain NumPy finds them."""
    bar_Q = np.partition(cosine_QG, -k, axis=1)[:, -k]
    row, column = np.nonzero(cosine_QG >= bar_Q[:, None])
    order = np.lexsort((column, -cosine_QG[row, column], row))
    row, column = row[order], column[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    return pairs(first, cosine_QG, row[rank < k], column[rank < k])


def pairs(first: int, cosine_QG: NDArray[np.float64], row: NDArray[np.int64], column: NDArray[np.int64]) -> Hits:
    return hits(Scored(first + row, column, cosine_QG[row, column]))


def different(found: Hits, expected: Hits) -> tuple[int, int]:
    """How many expected pairs are lost (or have another score), and how many others are there."""
    ours, theirs = ({one.tobytes() for one in side} for side in (found, expected))
    return len(theirs - ours), len(ours - theirs)


def all_pairs(engine: str, queries: NDArray[np.float16], gallery: NDArray[np.float16]) -> tuple[int, int, int]:
    """Lost, extra and compared pairs of an engine in the lists of the best and in all pairs over the floor."""
    search = neighbors.ShardSearch(shard(np.arange(len(gallery)), gallery), engine, Wanted(K, 0, FLOOR))
    lost = extra = compared = 0
    for first in range(0, len(queries), BLOCK):
        block = queries[first : first + BLOCK]
        tile = search.tile(np.arange(first, first + len(block)), block, 10**8)
        cosine_QG = block.astype(np.float64) @ gallery.astype(np.float64).T
        over = pairs(first, cosine_QG, *np.nonzero(cosine_QG >= FLOOR))
        for found, expected in ((tile.nearest, best(first, cosine_QG, K)), (tile.pairs, over)):
            missing, more = different(hits(found), expected)
            lost, extra = lost + missing, extra + more
        compared += cosine_QG.size
    return lost, extra, compared


def plans(queries: NDArray[np.float16], gallery: NDArray[np.float16]) -> Iterator[str]:
    """The digest of the result under one random plan after the other."""
    rng = np.random.default_rng(7)
    while True:
        engine = str(rng.choice(list(ENGINES)))
        tiles = []
        for rows in _pieces(rng, len(gallery)):
            one = neighbors.ShardSearch(shard(rows, gallery[rows]), engine, Wanted(K, COLUMNS, FLOOR))
            tiles += [one.tile(block, queries[block], 10**7) for block in _pieces(rng, len(queries))]
        tiles += [tiles[at] for at in rng.integers(len(tiles), size=2)]  # a task that was done twice
        rng.shuffle(tiles)  # type: ignore[arg-type]
        parts = (
            neighbors.best(neighbors.merged([tile.nearest for tile in tiles]), K),
            neighbors.best(neighbors.merged([tile.closest for tile in tiles]).turned(), COLUMNS),
            neighbors.ordered(neighbors.merged([tile.pairs for tile in tiles])),
        )
        yield hashlib.sha256(
            b"".join(np.ascontiguousarray(column).tobytes() for part in parts for column in part)
        ).hexdigest()


def _pieces(rng: np.random.Generator, count: int) -> list[NDArray[np.int64]]:
    cuts = np.sort(rng.integers(1, count, rng.integers(0, 4)))
    return [piece for piece in np.split(rng.permutation(count), cuts) if len(piece)]


def main() -> int:
    rng, figures = np.random.default_rng(0), {}
    queries, gallery = people(rng, SIDE, 4000), people(rng, SIDE, 4000)
    for engine in ENGINES:
        start = time.perf_counter()
        lost, extra, compared = all_pairs(engine, queries, gallery)
        print(
            f"{engine}: {compared:,} pairs, {lost} lost, {extra} extra, {time.perf_counter() - start:.0f} s", flush=True
        )
        figures[engine] = {"pairs": compared, "lost": lost, "extra": extra}
    found = plans(queries[:300], gallery[:400])
    digests = {next(found) for _ in range(PLANS)}
    print(f"{PLANS:,} random plans: {len(digests)} different results")
    good = len(digests) == 1 and not any(one["lost"] or one["extra"] for one in figures.values())
    print(json.dumps({"bench": "exactness", **figures, "plans": PLANS, "results": len(digests), "passed": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
