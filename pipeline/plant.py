"""plant: how much a finished audit would have found, measured on copies of control people put into the release.

Control people are not in the release, so a planted copy of one is a leak whose truth is known. Their copies are
embedded and searched by the audit's own stages; what the release as published gives is known already, and a best match
in the release with planted copies is the better of the two (a maximum over a union). The release itself is not touched,
planted images never reach the audit's tables, and the bars are those that the audit set.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.storage import private_folder, to_json, write_private
from operators.alignment import similarity_transform
from operators.blends import mmpmr
from operators.calibration import proportion
from operators.errors import ConfigError
from operators.formats import SetConfig
from operators.tables import CLOSEST, IMAGE_UNITS, PEOPLE, UNITS
from operators.transforms import TRANSFORMS, plant, stream
from operators.vectors import exact_cosines
from pipeline.calibrate import set_columns
from pipeline.embed import embed
from pipeline.imagery import Imagery, Seen
from pipeline.scan import scan_sets
from pipeline.search import results, search
from pipeline.stage import Run, fingerprint
from pipeline.tiers import stored_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlantConfig:
    """How sensitivity is measured."""

    transforms: list[str] = field(default_factory=lambda: list(TRANSFORMS))
    """What is done to the copies (`operators.transforms.TRANSFORMS`)."""
    persons: int = 100
    """Control people for each transformation, if there are as many; each person is planted once."""
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.transforms if name not in TRANSFORMS]
        if unknown:
            raise ValueError(f"transforms must be of {', '.join(TRANSFORMS)}. Got {unknown[0]!r}.")
        if self.persons < 1:
            raise ValueError(f"persons must be at least 1. Got {self.persons}.")


class Source(NamedTuple):
    """One planted image to be: its transformation, and the control image, or two, that it is made from."""

    transform: str
    unit: int
    rows: tuple[int, ...]
    key: str


class Bars(NamedTuple):
    """What a person must reach to be found."""

    over_threshold: float
    """Cosine of a candidate."""
    excess: float | None
    """Statistic, at the first alpha of the audit; None where so few controls cannot measure it."""
    listed: float | None
    """Statistic of the last person on the audit's list; None if nobody is listed."""


def plant_copies(run: Run) -> None:
    """Plant, embed and search copies of control people, and write `plant/recall.json`.

    Raises
    ------
    ConfigError
        If the audit has no control set.
    IncompleteTable
        If it was not assessed.
    """
    if "control" not in run.config.sets.given() or not run.config.assess.controlled:
        raise ConfigError(
            "`unveil plant` copies people of the control set, and this audit has none. Give sets.control."
        )
    if "release" in run.config.sets.foreign():
        raise ConfigError("the release is another model's embeddings: no copy can be planted as it would appear there.")
    with run.timed("plant") as facts:
        people = run.table("assess", "people", PEOPLE)
        options = run.config.plant
        sources = chosen(run, people, options)
        folder = run.folder / "plant"
        shutil.rmtree(folder / "images", ignore_errors=True)
        made = _write(run, sources, folder / "images")
        inner = _inner(run, folder)
        _share(run, inner)
        embed(inner)
        search(inner)
        recall = _recall(run, inner, people, made)
        key = sensitivity_key(run)
        write_private(folder / "recall.json", to_json({"key": key, "seed": options.seed, **recall}))
        if run.config.encryption.key:  # nothing reads them any more, and they show people of the control set
            shutil.rmtree(folder / "images")
        facts["planted"], facts["classes"] = len(made), len(recall["classes"])
        log.info("plant: %d copies of control people; recall is in %s", len(made), folder / "recall.json")


def sensitivity_key(run: Run) -> str:
    """Digest of the audit that a recall belongs to."""
    return fingerprint(run.commit("assess", "people").sha256, asdict(run.config.plant))


def chosen(run: Run, people: pa.Table, options: PlantConfig) -> list[Source]:
    """Who is planted and how: every transformation has its own people, drawn at random; blends take a partner too."""
    tested = people.filter(pc.and_(pc.equal(people["arm"], "control"), people["eligible"]))
    columns = set_columns(run, "control", ("key", "status"))
    row_of = {key: row for row, key in enumerate(columns["key"].to_pylist())}
    units, keys = tested["unit"].to_pylist(), tested["key"].to_pylist()
    order = stream(options.seed, "people").permutation(len(units)).tolist()
    each = min(options.persons, len(order) // len(options.transforms))
    if each < 1:
        raise ConfigError(
            f"{len(order)} control people cannot serve {len(options.transforms)} transformations. Give a larger "
            f"control set or fewer plant.transforms."
        )
    sources = []
    for at, name in enumerate(options.transforms):
        own = order[at * each : (at + 1) * each]
        for place, one in enumerate(own):
            partner = own[(place + 1) % len(own)]
            rows = (row_of[keys[one]], row_of[keys[partner]])[: TRANSFORMS[name].sources]
            sources.append(Source(name, units[one], rows, f"{name}/{place:05d}.png"))
    return sources


def _write(run: Run, sources: list[Source], folder: Path) -> list[Source]:
    """Make the planted images; those whose sources can no longer be read are left out, and logged."""
    import cv2

    made = []
    with Imagery(run, "control") as control:
        for source in sources:
            seen = [control(row) for row in source.rows]
            images = [one for one in seen if one is not None]
            if len(images) < len(source.rows):
                continue
            pixels = [images[0].image, *(_onto(images[0], other) for other in images[1:])]
            planted = plant(source.transform, pixels, run.config.plant.seed, source.key).image
            path = folder / source.key
            private_folder(path.parent)
            write_private(path, cv2.imencode(".png", planted[:, :, ::-1])[1].tobytes())
            made.append(source)
    if not made:
        raise ConfigError(
            "no image of the control set can be opened, so none can be copied. Give the images themselves."
        )
    return made


def _onto(first: Seen, second: Seen) -> NDArray[np.uint8]:
    """The second image moved so that its face lies on that of the first; the first where the second ends."""
    import cv2

    if first.landmarks is None or second.landmarks is None:
        return second.image
    matrix = similarity_transform(second.landmarks, first.landmarks)
    size = first.image.shape[1], first.image.shape[0]
    moved = cv2.warpAffine(second.image, matrix, size, flags=cv2.INTER_LINEAR)
    there = cv2.warpAffine(np.ones(second.image.shape[:2], np.uint8), matrix, size, flags=cv2.INTER_NEAREST)
    return np.where(there[:, :, None] > 0, moved, first.image).astype(np.uint8)


def _inner(run: Run, folder: Path) -> Run:
    """The audit of the planted copies against the control set, which shares the embeddings."""
    store = run.config.store or str(run.folder / "store")
    release = SetConfig(uri=str(folder / "images"), format="folder", identity="parent")
    sets = replace(run.config.sets, release=release, control=None, anchor=None, placebo=None)
    if run.config.sets.control is not None:
        sets = replace(sets, training=run.config.sets.control)
    search_options = replace(run.config.search, k=1, columns=1, floor=NO_PAIRS_BELOW, within=[])
    inner = Run(replace(run.config, out=str(folder), store=store, sets=sets, embedders=[], search=search_options))
    inner.ray = run.ray  # type: ignore[method-assign]  # one session serves both
    return inner


NO_PAIRS_BELOW = 0.999
"""Pairs below are not kept: only best matches are needed."""


def _share(run: Run, inner: Run) -> None:
    """List the planted images; the control set is taken as it was listed."""
    listed = run.table("scan", "control", UNITS)
    at = listed.schema.get_field_index("set")
    table = listed.set_column(at, UNITS.schema.field("set"), pa.array(["training"] * listed.num_rows))
    made = run.commit("scan", "control")
    inner.save("scan", "training", UNITS, table, key=made.key, **made.facts)
    scan_sets(inner, ["release"])


def _recall(run: Run, inner: Run, people: pa.Table, made: list[Source]) -> dict[str, Any]:
    """Recall of each class at each bar, with exact intervals."""
    best, audited = _best_planted(run, inner), _audited(inner)
    rows = {row["unit"]: row for row in people.to_pylist()}
    bars = _bars(run, people)
    classes = []
    for name in dict.fromkeys(source.transform for source in made):
        own = [source for source in made if source.transform == name]
        cosine_P = np.array([max(rows[one.unit]["cosine"], best.get(one.unit, -1.0)) for one in own])
        statistic_P = cosine_P - np.array([rows[one.unit]["anchor_cosine"] or 0.0 for one in own])
        reached = {"over_threshold": cosine_P, "excess": statistic_P, "listed": statistic_P}
        recall = {
            bar: None if least is None else proportion(int((reached[bar] >= least).sum()), len(own))._asdict()
            for bar, least in bars._asdict().items()
        }
        lost = sum(not audited.get(source.key, False) for source in own)
        about: dict[str, Any] = {"transform": name, "leak": TRANSFORMS[name].leak, "does": TRANSFORMS[name].does}
        if TRANSFORMS[name].sources > 1:
            about["mmpmr"] = _both_sources(run, inner, own, bars.over_threshold)
        classes.append({**about, "planted": len(own), "not_audited": lost, "recall": recall})
    return {"bars": bars._asdict(), "classes": classes}


def _both_sources(run: Run, inner: Run, own: list[Source], threshold: float) -> dict[str, float] | None:
    """The share of planted blends over the threshold with both their sources (`operators.blends.mmpmr`)."""
    (planted_MD, listed_N), (control_GD, usable_G) = stored_rows(inner, "release"), stored_rows(run, "control")
    keys = set_columns(inner, "release", ("key",))["key"].to_pylist()
    place_of = {key: int(at) for key, at, ok in zip(keys, np.cumsum(listed_N) - 1, listed_N, strict=True) if ok}
    row_of = np.cumsum(usable_G) - 1
    seen = [source for source in own if source.key in place_of]
    if not seen:
        return None
    left = planted_MD[[place_of[source.key] for source in seen]]
    cosines = [exact_cosines(left, control_GD[row_of[[source.rows[side] for source in seen]]]) for side in (0, 1)]
    return mmpmr(np.stack(cosines, axis=1), threshold)._asdict()


def _best_planted(run: Run, inner: Run) -> Mapping[int, float]:
    """For each control unit the best cosine of any of its images with any planted image."""
    units = run.table("assess", "image_units", IMAGE_UNITS)
    unit_N = units.filter(pc.equal(units["arm"], "control"))["unit"].to_numpy()
    best: dict[int, float] = {}
    for block in results(inner, CLOSEST):
        first = block.filter(pc.equal(block["rank"], 1))
        for row, cosine in zip(first["gallery_row"].to_pylist(), first["cosine"].to_pylist(), strict=True):
            unit = int(unit_N[row])
            best[unit] = max(cosine, best.get(unit, -1.0))
    return best


def _audited(inner: Run) -> Mapping[str, bool]:
    columns = set_columns(inner, "release", ("key", "status"))
    return {key: status == "ok" for key, status in zip(*(c.to_pylist() for c in columns.columns), strict=True)}


def _bars(run: Run, people: pa.Table) -> Bars:
    """The bars that the audit itself set."""
    found = json.loads((run.folder / "summary.json").read_bytes())
    excess = found["evidence"]["excess"]
    listed = people.filter(pc.fill_null(pc.less_equal(people["q"], run.config.assess.evidence.q), False))
    return Bars(
        over_threshold=float(found["calibration"]["threshold"]),
        excess=float(excess[0]["threshold"]) if excess else None,
        listed=pc.min(listed["statistic"]).as_py(),
    )


def planted_recall(run: Run) -> Iterator[dict[str, Any]]:
    """The classes of the last `plant`, if it belongs to the audit as it is; nothing otherwise."""
    path = run.folder / "plant" / "recall.json"
    if path.exists():
        found = json.loads(path.read_bytes())
        if found["key"] == sensitivity_key(run):
            yield from found["classes"]
