"""What a finding is: same photo, same person, blend, look-alike or hub, from pixels and neighbours of the listed pairs.

Pixels of control people's best pairs say how alike strangers look here, and pairs of different photos of one training
person how alike a person's own photos do. Nothing of it changes who is listed.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators import copies, vectors
from operators.blends import DecoyTest, Shortlist, decoy_partners
from operators.controlled import Controlled
from operators.copies import CopySignals, CopyThresholds, Picture
from operators.persons import CONTROL
from operators.statistic import image_hashes
from operators.tables import FINDINGS, NEIGHBOURS, PAIR_EVIDENCE, UNITS
from pipeline.calibrate import set_columns
from pipeline.embed import unit_store
from pipeline.gathering import Gathered
from pipeline.imagery import Imagery
from pipeline.progress import Progress
from pipeline.search import results
from pipeline.stage import Run

log = logging.getLogger(__name__)

SECOND_LEVEL = 0.01
"""Share of control people who may pass as confirmed by the second face model."""
BLEND_Q = 0.1
"""False discovery rate of the test for second sources."""


class Blends(NamedTuple):
    """The test for second sources over (a random part of) the release."""

    row_of: dict[int, int]
    """Place in the test of each release row."""
    found: DecoyTest
    """Partners are rows of the training set."""
    keys: pa.ChunkedArray
    """Of the training images."""


class Judged(NamedTuple):
    """Findings with tiers and reasons, their evidence under PAIR_EVIDENCE, and what the summary says of both."""

    findings: pa.Table
    evidence: pa.Table
    summary: dict[str, Any]


def judged(run: Run, gathered: Gathered, made: Controlled, findings: pa.Table) -> Judged:
    """Look at the images and neighbours of the findings, as far as `assess.judged_pairs` goes."""
    options = run.config.assess
    looked = findings.slice(0, options.judged_pairs)
    keys = {role: set_columns(run, role, ("key",))["key"] for role in ("release", "training", "control")}
    rows = {role: _rows(keys[role], looked[f"{role}_key"]) for role in ("release", "training")}
    blends = _blends(run, made, keys["training"])
    with Imagery(run, "release") as release, Imagery(run, "training") as training, Imagery(run, "control") as control:
        shown = compared(release, training, list(zip(rows["release"], rows["training"], strict=True)), "findings")
        strangers = compared(release, control, _control_pairs(gathered, made, options.judged_controls), "controls")
        others = compared(training, training, _other_photos(gathered, made, options.judged_photos), "other photos")
    thresholds = copies.calibrate(_known(strangers), _known(others))
    second_U, second_cut = _second(made)
    units = made.people.persons.unit_N[np.array(rows["training"], np.int64)].tolist()
    told, evidence = [], []
    for finding, unit, row, signals in zip(looked.to_pylist(), units, rows["release"], shown, strict=True):
        z = None if second_U is None or unit < 0 or np.isnan(second_U[unit]) else float(second_U[unit])
        blend = _blend_of(blends, row)
        tier, reasons = copies.tier(
            copies.Evidence(
                discovery=None if finding["q"] is None else finding["q"] <= options.evidence.q,
                second_z=z,
                second_cut=second_cut,
                signals=signals,
                thresholds=thresholds,
                blend=None if blend is None else blend["blend_partner_key"] is not None,
                hub=finding["hub"] is not None,
                same_bytes=finding["same_bytes"],
            )
        )
        told.append(finding | {"tier": str(tier), "reasons": "; ".join(reasons)})
        evidence.append({"rank": finding["rank"], "second_z": z, **_signal_columns(signals), **(blend or {})})
    told += findings.slice(options.judged_pairs).to_pylist()
    about = _summary(told, thresholds, blends, len(_known(strangers)), len(_known(others)))
    return Judged(FINDINGS.from_rows(told), PAIR_EVIDENCE.from_rows(evidence), about)


def _summary(
    told: Sequence[dict[str, Any]],
    thresholds: CopyThresholds | None,
    blends: Blends | None,
    strangers: int,
    others: int,
) -> dict[str, Any]:
    tiers = [row["tier"] for row in told if row["tier"] is not None]
    found: dict[str, Any] = {
        "tiers": {str(tier): tiers.count(str(tier)) for tier in copies.Tier},
        "judged": len(tiers),
        "copies": None,
        "blends": None,
    }
    if thresholds is not None:
        levels = {name: getattr(thresholds, name).value for name in thresholds._fields}
        found["copies"] = {"level": thresholds.says, **levels, "control_pairs": strangers, "other_photo_pairs": others}
    if blends is not None:
        found["blends"] = {"tested": len(blends.row_of), "found": int(blends.found.rejected_Q.sum()), "q": BLEND_Q}
    return found


def compared(left: Imagery, right: Imagery, pairs: Sequence[tuple[int, int]], what: str) -> list[CopySignals | None]:
    """Signals of pairs of rows; None where one of the images cannot be opened any more, or never was one."""
    progress = Progress(f"compare {what}", len(pairs), "pairs")
    found: list[CopySignals | None] = []
    for one, other in pairs:
        seen = left(one), right(other)
        pictures = [Picture(image.crop, image.image) for image in seen if image is not None]
        found.append(copies.compare(*pictures) if len(pictures) == 2 else None)
        progress.add(1, found[-1] is None)
    progress.end()
    return found


def _known(signals: Sequence[CopySignals | None]) -> list[CopySignals]:
    return [one for one in signals if one is not None]


def _rows(keys: pa.ChunkedArray, wanted: pa.ChunkedArray) -> list[int]:
    found: list[int] = pc.index_in(wanted, keys.combine_chunks()).to_pylist()
    return found


def _control_pairs(gathered: Gathered, made: Controlled, most: int) -> list[tuple[int, int]]:
    """The best pair of random control people: chosen by the rule that chose the pairs of training people."""
    found = made.people
    units = np.flatnonzero(found.eligible_U & (found.persons.arm_U == CONTROL))
    units = np.random.default_rng(0).permutation(units)[:most]
    rows = found.best.row_U[units]
    return list(zip(gathered.release_row_N[rows].tolist(), (rows - gathered.starts[1]).tolist(), strict=True))


def _other_photos(gathered: Gathered, made: Controlled, most: int) -> list[tuple[int, int]]:
    """Two images of random training people who have several."""
    unit_N = made.people.persons.unit_N[: gathered.starts[1]]
    order = np.argsort(unit_N, kind="stable")
    order = order[unit_N[order] >= 0]
    first = np.flatnonzero(np.diff(unit_N[order]) == 0)
    first = first[np.append(True, np.diff(first) > 1)] if len(first) else first
    chosen = np.sort(np.random.default_rng(0).permutation(first)[:most])
    return [(int(order[at]), int(order[at + 1])) for at in chosen]


def _second(made: Controlled) -> tuple[NDArray[np.float64] | None, float | None]:
    """Standardised statistic of every person under the second face model, and the level that few controls reach."""
    found = made.people
    if len(found.per_model_U) < 2:
        return None, None
    known = found.per_model_U[1][~np.isnan(found.per_model_U[1])]
    middle = float(np.median(known))
    scale = float(np.median(np.abs(known - middle)))
    z_U = (found.per_model_U[1] - middle) / (scale or 1.0)
    control = z_U[found.eligible_U & (found.persons.arm_U == CONTROL)]
    return z_U, copies.cut(control[~np.isnan(control)], SECOND_LEVEL).value


def _signal_columns(signals: CopySignals | None) -> dict[str, Any]:
    if signals is None:
        return {}
    kept: dict[str, Any] = {name: getattr(signals, name) for name in ("hash_distance", "ncc", "ssim")}
    return kept | {"mirrored": bool(signals.face_mirrored or signals.hash_mirrored)}


def _blends(run: Run, made: Controlled, keys: pa.ChunkedArray) -> Blends | None:
    """The decoy-partner test over the release, or over a random part of it."""
    most = run.config.assess.blend_images
    if not most:
        return None
    stored = {arm: stored_rows(run, arm) for arm in ("training", "control")}
    place_of = {arm: _places(usable_N) for arm, (_, usable_N) in stored.items()}
    release = set_columns(run, "release", ("key", "status"))
    hashes = image_hashes(release["key"].to_pylist(), run.config.assess.seed)
    taken = set(np.argsort(hashes, kind="stable")[:most].tolist())
    lists: dict[str, dict[int, list[tuple[int, float]]]] = {arm: {} for arm in stored}
    for block in results(run, NEIGHBOURS):
        for arm, own in lists.items():
            table = block.filter(pc.equal(block["arm"], arm))
            columns = (table[name].to_pylist() for name in ("release_row", "gallery_row", "cosine"))
            for query, row, cosine in zip(*columns, strict=True):
                if query in taken:
                    own.setdefault(query, []).append((int(place_of[arm][row]), cosine))
    queries = sorted(lists["training"].keys() & lists["control"].keys())
    if not queries:
        return None
    usable_N = stored["training"][1]
    unit_N = made.people.persons.unit_N[: len(keys)]
    person_N = np.where(unit_N < 0, -2 - np.arange(len(unit_N)), unit_N)  # a straddler's images are nobody else's
    training, control = (_shortlist([lists[arm][query] for query in queries]) for arm in ("training", "control"))
    found = decoy_partners(
        training,
        control,
        stored["training"][0],
        stored["control"][0],
        person_N[usable_N],
        rng=np.random.default_rng(run.config.assess.seed),
        q=BLEND_Q,
    )
    row_G = np.flatnonzero(usable_N)
    partners = np.where(found.partner_Q < 0, -1, row_G[found.partner_Q])
    return Blends({query: at for at, query in enumerate(queries)}, found._replace(partner_Q=partners), keys)


def _places(usable_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The place of each row among the usable ones, shape (N,)."""
    return np.cumsum(usable_N) - 1


def _shortlist(lists: Sequence[Sequence[tuple[int, float]]]) -> Shortlist:
    """Lists of one length, filled up with -1."""
    most = max(map(len, lists))
    rows_QK, cosines_QK = np.full((len(lists), most), -1, np.int64), np.full((len(lists), most), -np.inf)
    for at, own in enumerate(lists):
        rows_QK[at, : len(own)], cosines_QK[at, : len(own)] = zip(*own, strict=True)
    return Shortlist(rows_QK, cosines_QK)


def stored_rows(run: Run, role: str) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
    """The stored vectors of a set's audited images (M, D), and which rows these are (N,)."""
    store, parts, usable = unit_store(run), [], []
    for name in run.table("scan", role, UNITS)["unit"].to_pylist():
        column = store.read(name, ["vector"])["vector"].combine_chunks()
        usable.append(np.asarray(column.is_valid()))
        parts.append(vectors.from_arrow(column.drop_null()))
    return np.concatenate(parts), np.concatenate(usable)


def _blend_of(blends: Blends | None, row: int) -> dict[str, Any] | None:
    """The second source of a release image, without a partner where none was found; None if it was not tested."""
    if blends is None or row not in blends.row_of:
        return None
    at = blends.row_of[row]
    partner = int(blends.found.partner_Q[at]) if blends.found.rejected_Q[at] else -1
    key = blends.keys[partner].as_py() if partner >= 0 else None
    return {"blend_partner_key": key, "blend_q": float(blends.found.q_value_Q[at])}
