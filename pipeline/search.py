"""search: every release image against every gallery image, exactly.

The gallery is held by actors, one shard each. Blocks of release images stream past all shards; the results of a block
are merged and committed before its successor's memory is needed. A block's file is named by everything that it was
computed from, so resume is a listing, and a change of any input is another name.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.pool import bounded
from cluster.resources import Resources
from cluster.storage import Store
from operators import neighbors, vectors
from operators.gallery import shard
from operators.tables import NEIGHBOURS, PAIRS, UNITS, Table
from pipeline.calibrate import calibrate, set_columns
from pipeline.embed import unit_store
from pipeline.progress import Progress
from pipeline.stage import Run, fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """What the search keeps, and how it is spread."""

    k: int = 100
    """Neighbours kept for every release image in each gallery set."""
    floor: float | None = None
    """All pairs from this cosine up are kept. Empty: a little below the threshold that the training set gives."""
    max_pairs: int = 20_000_000
    """Pairs over the floor that one block against one shard may give; more is an error, never a cut."""
    shard_images: int = 262_144
    """Gallery images of a shard at most, in whole units: about 4 bytes x width each in an actor's memory."""
    block_images: int = 4096
    """Release images of a block at most, in whole units."""
    in_flight: int = 4
    """Blocks under way at once."""
    shards: Resources = field(default_factory=lambda: Resources(workers=1, cpus=0.25))
    """Share of the machines for each shard's actor; there are as many actors as shards."""

    def __post_init__(self) -> None:
        for name in ("k", "max_pairs", "shard_images", "block_images", "in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Got {getattr(self, name)}.")
        if self.floor is not None and not -1 <= self.floor < 1:
            raise ValueError(f"floor must be a cosine below 1. Got {self.floor}.")


SLACK = 0.05
"""How far below the threshold pairs are kept, so that a stricter or looser look needs no new search."""

BLOCKS = Table(
    name="blocks",
    version=1,
    schema=pa.schema(
        [
            pa.field("block", pa.string()),  # digest of everything that the block's results depend on
            pa.field("queries", pa.int64()),  # release images that took part
            pa.field("comparisons", pa.int64()),
        ]
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Consecutive units of one set: a shard of an arm or a block of the release."""

    role: str
    units: tuple[str, ...]
    first_rows: tuple[int, ...]


def search(run: Run) -> None:
    """Search all blocks that are not committed yet, then commit the list of this search's blocks."""
    with run.timed("search") as facts:
        units = {role: run.table("scan", role, UNITS) for role in run.config.sets.given()}
        for role in units:
            run.commit("embed", role)
        options, floor = run.config.search, _floor(run)
        shards = [p for role in units if role != "release" for p in pieces(role, units[role], options.shard_images)]
        blocks = {
            block_key(run, floor, block, shards): block
            for block in pieces("release", units["release"], options.block_images)
        }
        store = run.store.child("search")
        pending = [key for key in blocks if store.find(f"pairs-{key}") is None]
        if pending:
            store.sweep()
            run.ray()
            _search_blocks(run, floor, {key: blocks[key] for key in pending}, shards)
        else:
            log.info("search: nothing to do, all %d blocks are searched", len(blocks))
        facts |= {"blocks": len(blocks), "searched_now": len(pending), "shards": len(shards), "floor": floor}
        facts["comparisons"] = _close(run, floor, list(blocks), units)


def _floor(run: Run) -> float:
    """The cosine from which all pairs are kept: the option, or `SLACK` below the threshold, rounded down."""
    if run.config.search.floor is not None:
        return run.config.search.floor
    found, _ = calibrate(run, set_columns(run, "training"))
    floor = float(np.floor((found.cosine - SLACK) * 100) / 100)
    log.info("search: pairs are kept from cosine %.2f up, for a threshold of %.4f", floor, found.cosine)
    return floor


def pieces(role: str, units: pa.Table, images: int) -> Iterator[Piece]:
    """Consecutive units of a set, together of at most `images` images unless one unit alone is larger."""
    held: list[tuple[str, int]] = []
    count = 0
    for row in units.to_pylist():
        size = len(row["members"])
        if held and count + size > images:
            yield _piece(role, held)
            held, count = [], 0
        held.append((row["unit"], row["first_row"]))
        count += size
    if held:
        yield _piece(role, held)


def _piece(role: str, held: Sequence[tuple[str, int]]) -> Piece:
    return Piece(role=role, units=tuple(name for name, _ in held), first_rows=tuple(row for _, row in held))


def block_key(run: Run, floor: float, block: Piece, shards: Sequence[Piece]) -> str:
    """Name of a block's results: independent of how the gallery is cut into shards."""
    gallery: dict[str, list[tuple[str, int]]] = {}
    for one in shards:
        gallery.setdefault(one.role, []).extend(zip(one.units, one.first_rows, strict=True))
    kept = {"k": run.config.search.k, "floor": floor}
    return fingerprint(NEIGHBOURS.contract, PAIRS.contract, unit_store(run).root.name, asdict(block), gallery, kept)


def read_piece(store: Store, piece: Piece) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
    """Row numbers (N,) and stored vectors (N, D) of the images of a piece that were embedded."""
    rows, stored = [], []
    for name, first in zip(piece.units, piece.first_rows, strict=True):
        column = store.read(name)["vector"].combine_chunks()
        valid = np.asarray(column.is_valid())
        rows.append(first + np.flatnonzero(valid))
        stored.append(vectors.from_arrow(column.drop_null()))
    return np.concatenate(rows), np.concatenate(stored)


class ShardActor:
    """Holds one shard of the gallery and searches query blocks in it.

    The shard is loaded by the first call, not by the constructor: a fault in a constructor would reach the user as
    Ray's text about a dead actor instead of as itself.
    """

    def __init__(self, root: str, piece: Piece) -> None:
        self.root, self.piece = root, piece

    @cached_property
    def search(self) -> neighbors.ShardSearch:
        """The loaded shard."""
        return neighbors.ShardSearch(shard(*read_piece(Store(self.root), self.piece)))

    def tile(
        self, block: tuple[NDArray[np.int64], NDArray[np.float16]], k: int, floor: float, max_pairs: int
    ) -> tuple[neighbors.Scored, neighbors.Scored]:
        """The block's best neighbours in this shard, and its pairs over the floor."""
        nearest = self.search.nearest(*block, k)
        return nearest, self.search.above(*block, floor, max_pairs)


def _search_blocks(run: Run, floor: float, pending: dict[str, Piece], shards: Sequence[Piece]) -> None:
    """Stream blocks past the shard actors, with a bounded number under way."""
    import ray

    options = run.config.search
    root = str(unit_store(run).root.resolve())
    target = str(run.store.child("search").root.resolve())
    actors = [ray.remote(ShardActor).options(**options.shards.actor_options()).remote(root, one) for one in shards]
    read = ray.remote(num_cpus=0.1)(_read_block)
    commit = ray.remote(num_cpus=0.1)(_commit_block)

    def submit(key: str, block: Piece) -> Any:
        queries = read.remote(root, block)
        tiles = [actor.tile.remote(queries, options.k, floor, options.max_pairs) for actor in actors]
        return commit.remote(target, key, options.k, [one.role for one in shards], queries, *tiles)

    calls: list[Callable[[], Any]] = [partial(submit, key, block) for key, block in pending.items()]
    progress = Progress("search", len(calls), "blocks")
    for _ in bounded(calls, options.in_flight):
        progress.add(1)
    progress.end()


def _read_block(root: str, block: Piece) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
    return read_piece(Store(root), block)


def _commit_block(
    root: str,
    key: str,
    k: int,
    roles: Sequence[str],
    queries: tuple[NDArray[np.int64], NDArray[np.float16]],
    *tiles: tuple[neighbors.Scored, neighbors.Scored],
) -> str:
    """Merge a block's tiles over the shards of each arm and commit both tables; `pairs` last, as the block's mark."""
    arms = list(dict.fromkeys(roles))

    def of(arm: str, which: int) -> neighbors.Scored:
        return neighbors.merged([tile[which] for role, tile in zip(roles, tiles, strict=True) if role == arm])

    nearest = neighbors.neighbours_table([(arm, neighbors.best(of(arm, 0), k)) for arm in arms])
    pairs = neighbors.pairs_table([(arm, neighbors.ordered(of(arm, 1))) for arm in arms])
    facts = {"queries": len(queries[0])}
    store = Store(root)
    store.commit(f"neighbours-{key}", nearest, contract=NEIGHBOURS.contract, key=key, facts=facts)
    store.commit(f"pairs-{key}", pairs, contract=PAIRS.contract, key=key, facts=facts)
    return key


def _close(run: Run, floor: float, keys: Sequence[str], units: dict[str, pa.Table]) -> dict[str, int]:
    """Commit the list of blocks, and return how many comparisons each arm saw: all of them, or it is an error."""
    audited = {role: run.commit("embed", role).facts["status"].get("ok", 0) for role in units}
    gallery = sum(count for role, count in audited.items() if role != "release")
    rows = []
    for key in keys:
        queries = run.commit("search", f"pairs-{key}").facts["queries"]
        rows.append({"block": key, "queries": queries, "comparisons": queries * gallery})
    searched = sum(row["queries"] for row in rows)
    if searched != audited["release"]:
        raise RuntimeError(f"search covered {searched:,} of {audited['release']:,} release images; this is a defect")
    comparisons = {role: searched * count for role, count in audited.items() if role != "release"}
    run.save(
        "search",
        "blocks",
        BLOCKS,
        BLOCKS.from_rows(rows),
        key=fingerprint(BLOCKS.contract, keys, floor),
        comparisons=comparisons,
        floor=floor,
    )
    return comparisons


def results(run: Run, name: str, contract: Table) -> Iterator[pa.Table]:
    """The `neighbours` or `pairs` tables of the committed search, block by block."""
    for key in run.table("search", "blocks", BLOCKS)["block"].to_pylist():
        yield run.table("search", f"{name}-{key}", contract)
