"""plan: what an audit would do, without doing it."""

import os
from collections.abc import Iterator, Mapping

from cluster.faults import IncompleteTable
from operators import forecast
from operators.engines import Wanted
from operators.formats import listed
from operators.tables import UNITS
from pipeline.config import AuditConfig, to_yaml
from pipeline.embed import unit_store
from pipeline.search import comparisons, current
from pipeline.stage import Run

START_SECONDS = 8
"""For a Ray session, its workers with their libraries and the trial of engines, and the certificate; 5 to 13 s on two
cores."""
LIBRARIES_MIB = 400
"""Of a search actor before it holds anything."""


def plan(config: AuditConfig) -> str:
    """The resolved configuration, the size of every set, what the search takes, and what is already done.

    Sets are listed by name and size; no image is opened, and nothing is written. A trial of the search of about two
    seconds, on random vectors, stands behind the forecast of its time.
    """
    counts: dict[str, int] = {}
    lines = [to_yaml(config), "# What would run"]
    for role, chosen in config.sets.listed().items():
        form, listing = listed(chosen)
        entries = listing.entries
        counts[role] = len(entries)
        size_mb = sum(entry.bytes for entry in entries) / 1e6
        lines.append(f"{role:<20} {len(entries):>16,} images      {size_mb:,.1f} MB in {chosen.uri} ({form})")
    for one in comparisons(Run(config), 1.0):
        for role in one.gallery:
            name = f"{role} x itself" if one.within else f"{one.queries} x {role}"
            lines.append(f"{name:<20} {counts[one.queries] * counts[role]:>16,} comparisons")
    return "\n".join([*lines, *_forecast(config, counts), *_done(Run(config))])


def _forecast(config: AuditConfig, counts: Mapping[str, int]) -> Iterator[str]:
    """Memory, disk and time of the whole search, if nothing of it is there yet."""
    options, width = config.search, config.embedder.width
    floor = 0.999 if options.floor is None else options.floor  # random vectors do not reach a calibrated floor either
    wanted = Wanted(options.k, options.columns, floor)
    jobs = [(one.queries, one.gallery) for one in comparisons(Run(config), floor)]
    tiles, shards = [], []
    for queries, gallery in jobs:
        own = [size for role in gallery for size in _pieces(counts[role], options.shard_images)]
        shards += own
        tiles += [(q, g) for q in _pieces(counts[queries], options.block_images) for g in own]
    if not tiles:
        return
    speed = forecast.measure(width, options.engine, wanted, max(shards))
    cores = config.ray.cpus or len(os.sched_getaffinity(0))
    share = options.shards
    actors = min(share.workers, len(shards), max(1, int((cores - 0.5) / share.cpus)) if share.cpus else cores)
    threads = min(cores, actors * max(1, int(share.cpus)))
    largest = max(tiles, key=lambda tile: tile[0] * tile[1])
    yield f"{'tiles':<20} {len(tiles):>16,} of at most {largest[0]:,} x {largest[1]:,} images"
    held = forecast.shard_bytes(max(shards), width) * -(-len(shards) // actors) / 2**20
    work = forecast.tile_bytes(*largest, width, wanted) / 2**20
    total = LIBRARIES_MIB + held + work
    parts = f"libraries, {held:,.0f} MiB of shards, {work:,.0f} MiB for a tile"
    yield f"{'search memory':<20} {total:>12,.0f} MiB in each of {actors} actors: {parts}"
    stored = sum(forecast.stored_bytes(*tile, wanted) for tile in tiles) / 1e6
    yield f"{'search disk':<20} {2 * stored:>14,.0f} MB for tiles and results, without pairs over the floor"
    seconds = START_SECONDS + forecast.seconds_of(speed, tiles, shards, threads)
    yield (
        f"{'search time':<20} {seconds:>14,.0f} s if it runs here on {threads} threads, engine {speed.engine}, "
        f"{START_SECONDS} s of it for the start"
    )


def _pieces(images: int, most: int) -> list[int]:
    """Sizes of the pieces of a set, which are whole units in truth."""
    count = -(-images // most)
    return [images // count + (at < images % count) for at in range(count)]


def _done(run: Run) -> Iterator[str]:
    """What earlier runs left, stage by stage; scan always lists the sets again."""
    scanned = [role for role in run.config.sets.embedded() if run.store.child("scan").find(role)]
    if not scanned:
        yield f"{'so far':<20} {'nothing':>16} in {run.folder}"
        return
    for role in scanned:
        units = run.table("scan", role, UNITS)
        done = sum(unit_store(run).find(name) is not None for name in units["unit"].to_pylist())
        yield f"{'embedded ' + role:<20} {f'{done} of {units.num_rows}':>16} units of the last scan"
    yield f"{'search':<20} {_search_state(run):>16}"


def _search_state(run: Run) -> str:
    """Whether the committed search still holds for the sets, vectors and options as they are."""
    if run.store.child("search").find("coverage") is None:
        return "not yet"
    try:
        return "up to date" if current(run, "coverage") is not None else "out of date"
    except IncompleteTable:
        return "out of date"
