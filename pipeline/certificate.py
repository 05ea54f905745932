"""The coverage certificate of a search: every tile once, every comparison counted, and a sample searched again.

The sample is checked by the oracle, a plain fp64 product of stored vectors that shares no code with the engines: for
random queries and random gallery images of random tiles, the committed lists must be equal to the bit.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.faults import IncompleteTable
from cluster.pool import bounded
from cluster.storage import Place, Store
from operators import histogram
from operators.neighbors import Scored
from operators.oracle import Oracle
from operators.results import by_release, tile_of
from pipeline.embed import unit_store
from pipeline.layout import Comparison, Grid
from pipeline.pieces import Piece
from pipeline.stage import Run
from pipeline.tiles import read_piece

CHUNK = 8_192
"""Gallery images that the oracle holds in fp64 at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CertifyConfig:
    """How much of a search is searched again before it is closed."""

    tiles: int = 4
    """Tiles at most, chosen at random; at least one of each gallery set."""
    rows: int = 64
    """Queries, and gallery images, of each of these tiles."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tiles", 1), ("rows", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}. Got {getattr(self, name)}.")


class Checked(NamedTuple):
    """What came of searching a part of one tile again."""

    key: str
    arm: str
    comparisons: int
    counts: list[int]
    """Exact cosines of the sampled queries with the whole shard, by bins of `operators.histogram.EDGES`."""
    different: list[str]


def tile_facts(run: Run, grid: Grid) -> Iterator[tuple[Piece, Piece, Mapping[str, Any]]]:
    """Block, shard and recorded facts of every tile.

    Raises
    ------
    IncompleteTable
        If an image is in two pieces, a tile is not committed, or it saw other images than were audited.
    """
    for side in (grid.blocks, grid.shards):
        spans = sorted((p.role, *span, unit.name) for p in side for unit in p.units for span in unit.spans)
        for (role, _, end, _), (other, first, _, name) in pairwise(spans):
            if role == other and first < end:
                raise IncompleteTable(f"search: unit {name} of the {role} set is in several pieces.")
    store = run.store.child("search")
    for key, block, shard in grid.tiles():
        made = store.find(f"tile-{key}")
        seen = None if made is None else (made.facts["queries"], made.facts["gallery"])
        if made is None or seen != (block.audited, shard.audited):
            raise IncompleteTable(
                f"{store.address}/tile-{key} saw {seen} of {block.audited} x {shard.audited} audited images. Delete it "
                f"and run `unveil search` again."
            )
        yield block, shard, made.facts


def check_sample(run: Run, grid: Grid, options: CertifyConfig, fresh: Collection[str] = ()) -> list[Checked]:
    """Search parts of random tiles again, on the workers; one of them at least is `fresh`, if any is.

    Raises
    ------
    IncompleteTable
        If anything differs from what is committed.
    """
    import ray

    list(tile_facts(run, grid))  # before anything is made of a tile that saw other images
    roots = unit_store(run), run.store.child("search")
    task = ray.remote(num_cpus=0.5)(check_tile)
    calls = [
        partial(task.remote, *roots, grid.comparison, *tile, options.rows, [options.seed, at])
        for at, tile in enumerate(sampled(grid, options, options.seed, fresh))
    ]
    done = sorted(bounded(calls, run.config.search.in_flight))
    refuse_different(run, [f"tile-{one.key}, {one.arm}: {what}" for one in done for what in one.different])
    return done


def refuse_different(run: Run, different: Sequence[str]) -> None:
    """Raise IncompleteTable if a tile is not what the oracle says."""
    if different:
        raise IncompleteTable(
            f"{run.folder}/search/{different[0]} ({len(different)} differences in the sample). The search is wrong or "
            f"damaged: delete {run.folder / 'search'}, and run `unveil search` again."
        )


def sampled(
    grid: Grid, options: CertifyConfig, seed: int, fresh: Collection[str] = ()
) -> list[tuple[str, Piece, Piece]]:
    """Tiles that are searched again: a random one of each gallery set, a `fresh` one, then random ones."""
    tiles = list(grid.tiles())
    order = np.random.default_rng(seed).permutation(len(tiles)).tolist()
    roles = [tiles[at][2].role for at in order]
    first = [order[roles.index(role)] for role in dict.fromkeys(roles)]
    new = [at for at in order if tiles[at][0] in fresh]
    if new and not set(first) & set(new):
        first.append(new[0])
    rest = [at for at in order if at not in set(first)]
    return [tiles[at] for at in [*first, *rest][: max(options.tiles, len(first))]]


def check_tile(
    root: Place,
    target: Place,
    comparison: Comparison,
    key: str,
    block: Piece,
    shard: Piece,
    rows: int,
    seed: Sequence[int],
) -> Checked:
    """Search random queries and random gallery images of one tile again, and compare with what is committed."""
    k, columns, floor = comparison.kept
    queries, gallery = read_piece(root, block), read_piece(root, shard)
    tile = tile_of(Store(target).read(f"tile-{key}"))
    rng = np.random.default_rng(seed)
    oracle = _oracle(queries, gallery, rng, rows, k, floor)
    different = [
        *_unequal("nearest", tile.nearest, oracle, oracle.best()),
        *_unequal("pairs", by_release(tile.pairs), oracle, oracle.above()),
    ]
    comparisons = oracle.comparisons
    if columns:
        back = _oracle(gallery, queries, rng, rows, columns, 2.0)
        different += _unequal("closest", by_release(tile.closest.turned()), back, back.best())
        comparisons += back.comparisons
    return Checked(key, shard.role, comparisons, oracle.counts.tolist(), different)


def _oracle(
    left: tuple[NDArray[np.int64], NDArray[np.float16]],
    right: tuple[NDArray[np.int64], NDArray[np.float16]],
    rng: np.random.Generator,
    rows: int,
    k: int,
    floor: float,
) -> Oracle:
    """All comparisons of some random rows of `left` with all of `right`."""
    chosen = np.sort(rng.permutation(len(left[0]))[:rows])
    oracle = Oracle(left[0][chosen], left[1][chosen], k, floor)
    for at in range(0, len(right[0]), CHUNK):
        oracle.add(right[0][at : at + CHUNK], right[1][at : at + CHUNK])
    return oracle


def _unequal(name: str, committed: Scored, oracle: Oracle, expected: Scored) -> Iterator[str]:
    """Where committed results, sorted by release row, are not those of the oracle's rows."""
    mine = committed.take(np.flatnonzero(np.isin(committed.release, oracle.rows_Q)))
    if not all(np.array_equal(left, right) for left, right in zip(mine, expected, strict=True)):
        yield f"{name}: {len(mine.cosine)} entries are committed for {len(oracle.rows_Q)} images, not those recomputed"


def sampled_counts(done: Sequence[Checked]) -> dict[str, NDArray[np.int64]]:
    """Score counts of the sampled comparisons of each gallery set."""
    bins = len(histogram.EDGES) - 1
    found: dict[str, NDArray[np.int64]] = {}
    for one in done:
        found[one.arm] = found.get(one.arm, np.zeros(bins, np.int64)) + np.array(one.counts, np.int64)
    return found
