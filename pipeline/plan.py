"""plan: what an audit would do, without doing it."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from cluster.faults import ClusterError, IncompleteTable
from operators import forecast
from operators.addresses import public
from operators.alignment import alignment
from operators.backbones import open_backbone
from operators.engines import Wanted
from operators.errors import AuditError
from operators.faces import FacePreparation
from operators.formats import listed
from operators.selftest import drawn_face
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
WORKER_MIB = 650
"""Of a worker of embed with its decoder, without faces and weights: docs/benchmarks.md, memory of the embedding."""
FACE_KB = 38
"""A prepared face: 112 x 112 pixels of three bytes."""
PICTURE = 256
"""Side of the picture that is drawn to try preparation, in pixels."""
TRIAL_S = 0.5
"""How long preparation and each model are tried."""


def plan(config: AuditConfig) -> str:
    """The resolved configuration, the size of every set, what the search takes, and what is already done.

    Sets are listed by name and size; no image is opened, and nothing is written. Trials of a few seconds, on a drawn
    picture and on random vectors, stand behind the forecasts of time.
    """
    counts: dict[str, int] = {}
    pictures = 0
    lines = [to_yaml(config, hide=True), "# What would run"]
    for role, chosen in config.sets.listed().items():
        form, listing = listed(chosen)
        entries = listing.entries
        counts[role] = len(entries)
        pictures += len(entries) if form != "vectors" and role in config.sets.embedded() else 0
        size_mb = sum(entry.bytes for entry in entries) / 1e6
        lines.append(f"{role:<20} {len(entries):>16,} images      {size_mb:,.1f} MB in {public(chosen.uri)} ({form})")
    for one in comparisons(Run(config), 1.0):
        for role in one.gallery:
            name = f"{role} x itself" if one.within else f"{one.queries} x {role}"
            lines.append(f"{name:<20} {counts[one.queries] * counts[role]:>16,} comparisons")
    return "\n".join([*lines, *_sizing(config, pictures), *_forecast(config, counts), *_done(Run(config))])


def _sizing(config: AuditConfig, images: int) -> Iterator[str]:
    """Workers, memory and time of the embedding; docs/cluster.md turns the lines into a cluster."""
    if not images:  # ready embeddings only
        return
    options, cores = config.embed, config.ray.cpus or len(os.sched_getaffinity(0))
    weights = [one.path for one in config.models() if os.path.exists(one.path)]
    faces = config.scan.unit_images * FACE_KB / 1024
    memory = WORKER_MIB + faces + sum(map(os.path.getsize, weights)) / 2**20
    steps = (
        {"embed": options.worker} if options.in_one_worker else {"prepare": options.prepare, "embed": options.encode}
    )
    for name, share in steps.items():
        fit = min(share.workers, max(1, int(cores / share.cpus))) if share.cpus else share.workers
        each = f"{share.cpus:g} CPUs, {share.gpus:g} GPUs and about {memory:,.0f} MiB each"
        yield f"{name + ' workers':<20} {fit:>16,} at most on these {cores} cores, {share.workers} on a cluster; {each}"
    if not options.in_one_worker:
        held = 2 * options.encode.workers * faces
        yield f"{'object store':<20} {held:>12,.0f} MiB for faces between the steps"
    try:
        prepared, embedded = _prepare_seconds(config), _model_seconds(config)
    except (AuditError, ClusterError) as error:
        yield f"{'embed rate':<20} {'not known':>16}: {error}"
        return
    rate = 1 / (prepared + embedded)
    yield (
        f"{'embed rate':<20} {rate:>16,.0f} images/s on one core: {1000 * prepared:.2f} ms to prepare a drawn picture "
        f"of {PICTURE} x {PICTURE}, {1000 * embedded:.2f} ms in {len(config.models())} models"
    )
    yield f"{'cores for a GPU':<20} {1000 * prepared:>16,.1f} for each 1,000 images/s that it embeds"
    seconds = START_SECONDS + images / (rate * cores)
    yield f"{'embed time':<20} {seconds:>14,.0f} s for all images if it runs here on {cores} cores"


def _prepare_seconds(config: AuditConfig) -> float:
    """Seconds of one core to decode a picture, find its face and cut it out."""
    import cv2

    side = PICTURE if config.faces.mode == "detect" else 112
    picture = cv2.resize(drawn_face(), (side, side))
    data = cv2.imencode(".jpg", picture)[1].tobytes()
    names = tuple(dict.fromkeys(one.alignment for one in config.models()))
    preparation = FacePreparation(replace(config.faces, isolate=False), names)
    return _seconds(lambda: preparation.guarded(data))


def _model_seconds(config: AuditConfig) -> float:
    """Seconds of one worker for a face in all models."""
    total = 0.0
    for one in config.models():  # nothing is fetched
        backbone = open_backbone(one)
        faces = np.stack([drawn_face(alignment(one.alignment).pixels)] * one.batch)
        total += _seconds(lambda: backbone(faces)) / one.batch  # noqa: B023 (called at once)
    return total


def _seconds(call: Callable[[], object]) -> float:
    """The mean of calls for a moment, after a first one that is not counted."""
    call()
    start, done = time.perf_counter(), 0
    while not done or time.perf_counter() - start < TRIAL_S:
        call()
        done += 1
    return (time.perf_counter() - start) / done


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
