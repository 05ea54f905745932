"""search: every release image against every gallery image, exactly.

    layout -> tiles (actors that hold the gallery in shards) -> certificate -> parts of each unit

The gallery is held by actors in shards; blocks of release images stream past all shards, and every tile (a block
against a shard) is committed under the name of all that it was computed from. So a kill loses the tiles under way and
nothing else, and new units cost only the tiles that they are in. The tiles are then put together into one part for
each unit, whose bytes do not depend on the cut into tiles. The list of tiles is committed last, as the search's mark.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.faults import IncompleteTable
from cluster.pool import bounded
from cluster.resources import Resources
from operators.controlled import SENSITIVITY
from operators.engines import ENGINES, Wanted
from operators.errors import ConfigError
from operators.tables import Table
from pipeline.calibrate import calibrate, set_columns
from pipeline.certificate import CertifyConfig, check_sample
from pipeline.coverage import close, counted, coverage_key
from pipeline.embed import unit_store
from pipeline.layout import Comparison, Grid, keep_layout, lay_out
from pipeline.merge import Parts, merge, missing, parts
from pipeline.pieces import Piece
from pipeline.progress import Progress
from pipeline.second import adopt, opinions
from pipeline.stage import Run
from pipeline.tiles import ShardActor, read_piece

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """What the search keeps, and how it is spread."""

    engine: str = "auto"
    """What filters: `faiss`, `mixed`, or `auto` for the faster one on each worker. Results do not depend on it."""
    k: int = 100
    """Neighbours kept for every release image in each gallery set."""
    columns: int = 3
    """Release neighbours kept for every gallery image; 0 for none."""
    floor: float | None = None
    """All pairs from this cosine up are kept. Empty: a little below the threshold that the training set gives."""
    counts: str = "tail"
    """Comparisons counted by cosine: `tail` for those from the floor up, at no cost; `all` for all, by a second product
    in fp32. Both are exact. Below the floor, `tail` leaves the exact counts of a random sample."""
    max_pairs: int = 20_000_000
    """Pairs over the floor that one block against one shard may give; more is an error, never a cut."""
    within: list[str] = field(default_factory=list)
    """Sets that are also searched against themselves: duplicates, doubtful labels, hubs."""
    shard_images: int = 262_144
    """Gallery images of a shard at most, in whole units: at most 10 bytes x width each in an actor's memory."""
    block_images: int = 16_384
    """Release images of a block at most, in whole units."""
    in_flight: int = 4
    """Tiles under way at once for each actor."""
    shards: Resources = field(default_factory=lambda: Resources(workers=64, cpus=0.5))
    """Actors that hold the gallery. Each holds one shard, or several where there are more shards than actors, and uses
    as many threads as it has whole CPUs, at least one."""
    certify: CertifyConfig = field(default_factory=CertifyConfig)

    def __post_init__(self) -> None:
        for name in ("k", "max_pairs", "shard_images", "block_images", "in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Got {getattr(self, name)}.")
        if self.engine not in ("auto", *ENGINES):
            raise ValueError(f"engine must be auto, {' or '.join(ENGINES)}. Got {self.engine!r}.")
        if self.counts not in ("tail", "all"):
            raise ValueError(f"counts must be tail or all. Got {self.counts!r}.")
        if self.columns < 0:
            raise ValueError(f"columns must not be negative. Got {self.columns}.")
        if self.floor is not None and not -1 <= self.floor < 1:
            raise ValueError(f"floor must be a cosine below 1. Got {self.floor}.")


SLACK = 0.05
"""How far below the threshold pairs are kept, so that a stricter or looser look needs no new search."""


def search(run: Run) -> None:
    """Search all tiles that are not committed yet, and put together and commit what they give."""
    with run.timed("search") as facts:
        floor = _floor(run)
        for comparison in comparisons(run, floor):
            done = _compare(run, comparison)
            facts |= done if comparison.main else {comparison.title: done}
    if for_evidence(run, list(run.config.sets.given())):
        for other in opinions(run):
            log.info("search: again by %s", other.config.embedder.name)
            adopt(run, other)
            search(other)


def comparisons(run: Run, floor: float) -> list[Comparison]:
    """The release against all gallery sets, then what evidence needs, then sets that are searched against themselves.

    Raises
    ------
    ConfigError
        If `search.within` names a set that this audit does not have.
    """
    options = run.config.search
    given = list(run.config.sets.given())
    unknown = [role for role in options.within if role not in given]
    if unknown:
        raise ConfigError(f"search.within names {unknown[0]!r}; the sets of this audit are {', '.join(given)}.")
    arms = tuple(role for role in given if role not in ("release", "placebo"))
    asked = {
        one.title: one
        for one in (
            Comparison(queries="release", gallery=arms, k=options.k, columns=options.columns, floor=floor),
            *for_evidence(run, given),
        )
    }
    for role in dict.fromkeys(options.within):
        wanted = Comparison(queries=role, gallery=(role,), k=options.k, columns=0, floor=floor)
        known = asked.get(wanted.title)
        lowest = min(floor, known.floor) if known else floor
        asked[wanted.title] = replace(wanted, floor=lowest)
    return list(asked.values())


NO_PAIRS = 2.0
"""A floor that no cosine reaches."""


def for_evidence(run: Run, given: Sequence[str]) -> list[Comparison]:
    """What the controlled audit needs beside the release: each real image's best match in the anchor and placebo sets,
    and the pairs of real images that show one person under two labels (docs/method.md, "Persons").
    """
    if "control" not in given or not run.config.assess.controlled:
        return []
    people = ("training", "control")
    found = [
        Comparison(queries=role, gallery=people, k=1, columns=1, floor=NO_PAIRS, fixed=True)
        for role in ("anchor", "placebo")
        if role in given
    ]
    evidence = run.config.assess.evidence
    if evidence.near_duplicates:
        floor = round(evidence.persons.tau_dup - SENSITIVITY, 4)
        same = partial(Comparison, k=1, columns=0, floor=floor, fixed=True)
        found += [same(queries=role, gallery=(role,)) for role in people]
        found.append(same(queries="control", gallery=("training",)))
    return found


def _floor(run: Run) -> float:
    """The cosine from which all pairs are kept: the option, or `SLACK` below the threshold, rounded down."""
    if run.config.search.floor is not None:
        return run.config.search.floor
    found, _ = calibrate(run, set_columns(run, "training"))
    floor = float(np.floor((found.cosine - SLACK) * 100) / 100)
    log.info("search: pairs are kept from cosine %.2f up, for a threshold of %.4f", floor, found.cosine)
    return floor


def _compare(run: Run, comparison: Comparison) -> dict[str, Any]:
    """Make one comparison complete; return what the manifest says about it."""
    wanted = parts(run, comparison)
    key = coverage_key(run, wanted)
    made = run.store.child("search").find(comparison.title)
    if made is not None and made.key == key and counted(run, comparison, key) and not missing(run, comparison, wanted):
        log.info("search: nothing to do, %s is complete", comparison.title)
        return {**made.facts, "tiles_now": 0, "comparisons_now": 0}
    grid = lay_out(run, comparison)
    store = run.store.child("search")
    store.sweep()
    keep_layout(run, grid)
    pending = [tile for tile in grid.tiles() if store.find(f"tile-{tile[0]}") is None]
    run.ray()
    now = _search_tiles(run, grid, pending)
    checked = check_sample(run, grid, run.config.search.certify, {tile[0] for tile in pending})
    merge(run, grid, wanted)
    made = close(run, grid, wanted, checked)
    store.sweep()
    return {**made.facts, "tiles_now": len(pending), "comparisons_now": now}


def _search_tiles(run: Run, grid: Grid, pending: Sequence[tuple[str, Piece, Piece]]) -> int:
    """Stream blocks past the shard actors, with a bounded number of tiles under way; return the comparisons made."""
    import ray

    if not pending:
        return 0
    options = run.config.search
    root, target = unit_store(run), run.store.child("search")
    holder = ray.remote(ShardActor).options(**options.shards.actor_options())
    threads = max(1, int(options.shards.cpus))
    shards = list(dict.fromkeys(shard for _, _, shard in pending))
    count = options.shards.fitting(len(shards))
    given = (root, target, options.engine, Wanted(*grid.comparison.kept), threads)
    actors = [holder.remote(*given, gpu=options.shards.gpus > 0) for _ in range(count)]
    owner = dict(zip(shards, cycle(actors), strict=False))
    read = ray.remote(num_cpus=0)(read_piece)  # else two audits whose actors fill a cluster wait for each other's
    blocks: dict[str, Any] = {}

    def submit(key: str, block: Piece, shard: Piece) -> Any:
        if block.name not in blocks:  # the block before is dropped: its tiles have their own hold on it
            blocks.clear()
            blocks[block.name] = read.remote(root, block)
        return owner[shard].tile.remote(key, shard, blocks[block.name], options.max_pairs, grid.counts)

    calls: list[Callable[[], Any]] = [partial(submit, *tile) for tile in pending]
    progress = Progress("search", len(calls), "tiles")
    done = 0
    for made in bounded(calls, options.in_flight * count):
        done += made
        progress.add(1)
    progress.end()
    return done


def current(run: Run, title: str = "coverage") -> tuple[Comparison, Parts] | None:
    """The committed search `title` and its parts, or None if it is of other sets, vectors or options than these."""
    made = run.commit("search", title)
    for comparison in comparisons(run, made.facts["floor"]):
        wanted = parts(run, comparison)
        if comparison.title == title and made.key == coverage_key(run, wanted):
            return comparison, wanted
    return None


def finished(run: Run, title: str = "coverage") -> tuple[Comparison, Parts]:
    """The committed search `title` and its parts.

    Raises
    ------
    IncompleteTable
        If the sets or options have changed since that search: its row numbers would name other images.
    """
    found = current(run, title)
    if found is None:
        raise IncompleteTable(f"{run.folder}/search is of other sets or options than these. Run `unveil search` again.")
    return found


def results(run: Run, contract: Table, title: str = "coverage") -> Iterator[pa.Table]:
    """The parts of a finished search that follow `contract`, unit by unit in row order; raises as `finished` does."""
    comparison, wanted = finished(run, title)
    for name, kind in wanted.names(comparison):
        if kind is contract:
            yield run.table("search", name, contract)
