"""search: every release image against every gallery image, exactly.

The gallery is held by actors in shards. Blocks of release images stream past all shards; the results of a block are
merged and committed before its successors need the memory. A block's file is named by everything that it was computed
from, so resume is a listing, and a change of any input is another name.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.faults import IncompleteTable
from cluster.pool import bounded
from cluster.resources import Resources
from cluster.storage import Commit
from operators.engines import ENGINES, Wanted
from operators.tables import CLOSEST, NEIGHBOURS, PAIRS, UNITS, Table
from pipeline.calibrate import calibrate, set_columns
from pipeline.embed import closed, unit_store
from pipeline.progress import Progress
from pipeline.stage import Run, fingerprint
from pipeline.tiles import Piece, ShardActor, commit_block, pieces, read_piece

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """What the search keeps, and how it is spread."""

    engine: str = "auto"
    """What filters: `faiss`, `mixed`, or `auto` for the faster one on each worker. Results do not depend on it."""
    k: int = 100
    """Neighbours kept for every release image in each gallery set."""
    columns: int = 3
    """Release neighbours kept for every gallery image in each block; 0 for none."""
    floor: float | None = None
    """All pairs from this cosine up are kept. Empty: a little below the threshold that the training set gives."""
    max_pairs: int = 20_000_000
    """Pairs over the floor that one block against one shard may give; more is an error, never a cut."""
    shard_images: int = 262_144
    """Gallery images of a shard at most, in whole units: about 6 bytes x width each in an actor's memory."""
    block_images: int = 16_384
    """Release images of a block at most, in whole units."""
    in_flight: int = 2
    """Blocks under way at once."""
    shards: Resources = field(default_factory=lambda: Resources(workers=64, cpus=0.5))
    """Actors that hold the gallery. Each holds one shard, or several where there are more shards than actors, and uses
    as many threads as it has whole CPUs, at least one."""

    def __post_init__(self) -> None:
        for name in ("k", "max_pairs", "shard_images", "block_images", "in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Got {getattr(self, name)}.")
        if self.engine not in ("auto", *ENGINES):
            raise ValueError(f"engine must be auto, {' or '.join(ENGINES)}. Got {self.engine!r}.")
        if self.columns < 0:
            raise ValueError(f"columns must not be negative. Got {self.columns}.")
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


def search(run: Run) -> None:
    """Search all blocks that are not committed yet, then commit the list of this search's blocks."""
    with run.timed("search") as facts:
        floor = _floor(run)
        shards, blocks = layout(run, floor)
        store = run.store.child("search")
        pending = {key: block for key, block in blocks.items() if store.find(f"pairs-{key}") is None}
        if pending:
            store.sweep()
            run.ray()
            _search_blocks(run, floor, pending, shards)
        else:
            log.info("search: nothing to do, all %d blocks are searched", len(blocks))
        facts |= {"blocks": len(blocks), "searched_now": len(pending), "shards": len(shards), "floor": floor}
        facts["comparisons"] = _close(run, floor, list(blocks))


def _floor(run: Run) -> float:
    """The cosine from which all pairs are kept: the option, or `SLACK` below the threshold, rounded down."""
    if run.config.search.floor is not None:
        return run.config.search.floor
    found, _ = calibrate(run, set_columns(run, "training"))
    floor = float(np.floor((found.cosine - SLACK) * 100) / 100)
    log.info("search: pairs are kept from cosine %.2f up, for a threshold of %.4f", floor, found.cosine)
    return floor


def layout(run: Run, floor: float) -> tuple[list[Piece], dict[str, Piece]]:
    """The shards of the gallery, and the blocks of the release by the names of their results."""
    options = run.config.search
    units = {role: run.table("scan", role, UNITS) for role in run.config.sets.given()}
    for role, table in units.items():
        closed(run, role, table)
    shards = [one for role in units if role != "release" for one in pieces(role, units[role], options.shard_images)]
    blocks = pieces("release", units["release"], options.block_images)
    gallery = [_content(run, one) for one in shards]
    return shards, {block_key(run, floor, block, gallery): block for block in blocks}


def block_key(run: Run, floor: float, block: Piece, gallery: Sequence[tuple[str, list[Any]]]) -> str:
    """Name of a block's results: every stored vector counts, and how the gallery is cut into shards does not."""
    arms: dict[str, list[Any]] = {}
    for role, content in gallery:
        arms.setdefault(role, []).extend(content)
    kept = {"k": run.config.search.k, "columns": run.config.search.columns, "floor": floor}
    contracts = [table.contract for table in (NEIGHBOURS, CLOSEST, PAIRS)]
    return fingerprint(contracts, _content(run, block), arms, kept)


def _content(run: Run, piece: Piece) -> tuple[str, list[Any]]:
    """The set of a piece, and for each unit its first row and the digest of its embeddings."""
    store = unit_store(run)
    content = []
    for name, first in zip(piece.units, piece.first_rows, strict=True):
        made = store.find(name)
        if made is None:
            raise IncompleteTable(f"{store.root}: unit {name} is not embedded. Run `unveil embed` again.")
        content.append((first, made.sha256))
    return piece.role, content


def _search_blocks(run: Run, floor: float, pending: Mapping[str, Piece], shards: Sequence[Piece]) -> None:
    """Stream blocks past the shard actors, with a bounded number under way."""
    import ray

    options = run.config.search
    root = str(unit_store(run).root.resolve())
    target = str(run.store.child("search").root.resolve())
    holder = ray.remote(ShardActor).options(**options.shards.actor_options())
    wanted = Wanted(options.k, options.columns, floor)
    threads = max(1, int(options.shards.cpus))
    count = options.shards.fitting(len(shards))
    actors = [holder.remote(root, options.engine, wanted, threads) for _ in range(count)]
    read = ray.remote(num_cpus=0.1)(read_piece)
    commit = ray.remote(num_cpus=0.1)(commit_block)

    def submit(key: str, piece: Piece) -> Any:
        block = read.remote(root, piece)
        tiles = [
            actor.tile.remote(one, block, options.max_pairs) for one, actor in zip(shards, cycle(actors), strict=False)
        ]
        return commit.remote(target, key, options.k, [one.role for one in shards], block, *tiles)

    calls: list[Callable[[], Any]] = [partial(submit, key, piece) for key, piece in pending.items()]
    progress = Progress("search", len(calls), "blocks")
    for _ in bounded(calls, options.in_flight):
        progress.add(1)
    progress.end()


def _close(run: Run, floor: float, keys: Sequence[str]) -> dict[str, int]:
    """Commit the list of blocks, and return how many comparisons were made with each gallery set.

    Raises
    ------
    IncompleteTable
        If a release image or a gallery image that was audited did not take part.
    """
    audited = {role: run.commit("embed", role).facts["status"].get("ok", 0) for role in run.config.sets.given()}
    release = audited.pop("release")
    rows = []
    for key in keys:
        facts = run.commit("search", f"pairs-{key}").facts
        if facts["gallery"] != audited:
            raise IncompleteTable(f"search/pairs-{key} saw {facts['gallery']} gallery images of {audited}. Delete it.")
        comparisons = facts["queries"] * sum(audited.values())
        rows.append({"block": key, "queries": facts["queries"], "comparisons": comparisons})
    searched = sum(row["queries"] for row in rows)
    if searched != release:
        raise IncompleteTable(
            f"the search covered {searched:,} of {release:,} release images. Run `unveil embed` again."
        )
    done = {role: searched * count for role, count in audited.items()}
    key = blocks_key(keys, floor)
    run.save("search", "blocks", BLOCKS, BLOCKS.from_rows(rows), key=key, comparisons=done, floor=floor)
    log.info("search: %s comparisons in %d blocks", f"{sum(done.values()):,}", len(keys))
    return done


def blocks_key(keys: Sequence[str], floor: float) -> str:
    """Digest of a whole search."""
    return fingerprint(BLOCKS.contract, list(keys), floor)


def current_blocks(run: Run, made: Commit) -> list[str] | None:
    """The blocks of the committed search `made`, or None if it is of other sets, vectors or options than these."""
    floor = made.facts["floor"]
    keys = list(layout(run, floor)[1])
    return keys if made.key == blocks_key(keys, floor) else None


def results(run: Run, name: str, contract: Table) -> Iterator[pa.Table]:
    """The `neighbours`, `closest` or `pairs` tables of the committed search, block by block.

    Raises
    ------
    IncompleteTable
        If the sets or options have changed since that search: its row numbers would name other images.
    """
    made = run.commit("search", "blocks")
    keys = current_blocks(run, made)
    if keys is None:
        raise IncompleteTable(f"{run.folder}/search is of other sets or options than these. Run `unveil search` again.")
    for key in keys:
        yield run.table("search", f"{name}-{key}", contract)
