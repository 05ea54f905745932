"""assess: a threshold with a stated error rate, the pairs over it, and the persons behind them.

This is the plain method: one threshold at a false match rate that is measured on non-mated pairs of the training set,
applied alike to training, control and anchor. It counts what chance would give at this number of comparisons, and shows
the control set beside the training set; it does not control errors per person (docs/method.md).
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import to_json, write_private
from operators import leakage
from operators.addresses import public
from operators.calibration import Threshold
from operators.controlled import EvidenceConfig
from operators.errors import ConfigError
from operators.tables import (
    CANDIDATES,
    DISAGREEMENTS,
    FINDINGS,
    IMAGE_UNITS,
    NEIGHBOURS,
    PAIR_EVIDENCE,
    PAIRS,
    PEOPLE,
    REJECTS,
    STRADDLERS,
)
from pipeline import evidence
from pipeline.agreement import disagreements
from pipeline.calibrate import calibrate, set_columns
from pipeline.catalogue import embedder_sets, overlaps
from pipeline.classes import same_classes
from pipeline.embed import unit_store
from pipeline.face_units import images_among, rejected_images, seen
from pipeline.gathering import gather
from pipeline.plant import planted_recall
from pipeline.review_results import reviewed
from pipeline.search import results
from pipeline.stage import Run, fingerprint
from pipeline.summary_schema import SUMMARY
from pipeline.tiers import judged
from pipeline.translated import cautions, told

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AssessConfig:
    """From scores to candidates."""

    fmr: float | None = None
    """False match rate of the threshold, per pair. Empty: the smallest that the training set can measure."""
    calibration_images: int = 10_000
    """Training images whose pairs are measured, chosen at random; more images measure smaller rates."""
    seed: int = 0
    controlled: bool = True
    """Whether a control set is used for evidence per person (docs/method.md); without one there is none anyway."""
    evidence: EvidenceConfig = field(default_factory=EvidenceConfig)
    judged_pairs: int = 500
    """Findings whose images are compared by their pixels, from the top; 0 for none."""
    judged_controls: int = 500
    """Best pairs of control people whose pixels say how alike strangers look."""
    judged_photos: int = 200
    """Pairs of different photos of one training person, which a copy must be more alike than."""
    blend_images: int = 20_000
    """Release images that are tested for a second source, a random part of the release if it has more; 0 for none."""
    limit: int | None = None
    """Training persons with a candidate that are tolerated; more make `unveil` end with exit code 2."""

    def __post_init__(self) -> None:
        if self.fmr is not None and not 0 < self.fmr < 1:
            raise ValueError(f"fmr must be between 0 and 1. Got {self.fmr}.")
        if self.calibration_images < 2:
            raise ValueError(f"calibration_images must be at least 2. Got {self.calibration_images}.")
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"limit must not be negative. Got {self.limit}.")


def assess(run: Run) -> None:
    """Commit candidates, findings and rejects, and write `summary.json`."""
    with run.timed("assess") as facts:
        comparisons: dict[str, int] = run.commit("search", "coverage").facts["comparisons"]
        sets = {role: set_columns(run, role) for role in run.config.sets.given()}
        found, about = calibrate(run, sets["training"])
        _refuse_below_floor(run, found)
        over = [block.filter(pc.greater_equal(block["cosine"], found.cosine)) for block in results(run, PAIRS)]
        pairs = pa.concat_tables([PAIRS.schema.empty_table(), *over])
        best = highest(results(run, NEIGHBOURS))
        key = assess_key(run, found.cosine)
        listed = {arm: leakage.candidates(pairs, arm, found.cosine, sets["release"], sets[arm]) for arm in comparisons}
        persons, told = _findings(run, listed["training"], sets["training"]["key"], found, key)
        run.save("assess", "candidates", CANDIDATES, pa.concat_tables(listed.values()).combine_chunks(), key=key)
        run.save("assess", "findings", FINDINGS, persons, key=key)
        rejects = [run.table("embed", role, REJECTS) for role in sets]
        run.save("assess", "rejects", REJECTS, pa.concat_tables(rejects).combine_chunks(), key=key)
        arms = {}
        for arm, own in listed.items():
            count = leakage.arm_count(own, comparisons[arm], best.get(arm))
            images = images_among(run, "release", sets["release"]["key"], own["release_key"])
            arms[arm] = _arm(count._replace(release_images=images), found)
        summary = _summary(run, about, arms, persons.num_rows)
        summary |= {"evidence": told, "classes": same_classes(run, sets)}
        write_private(run.folder / "summary.json", to_json(summary))
        facts |= {"threshold": found.cosine, "candidates": listed["training"].num_rows, "findings": persons.num_rows}
        log.info("assess: %d training persons have a candidate at cosine %.4f or more", persons.num_rows, found.cosine)


def _findings(
    run: Run, candidates: pa.Table, keys: pa.ChunkedArray, found: Threshold, key: str
) -> tuple[pa.Table, dict[str, Any] | None]:
    """The findings, and what the summary says of the evidence: there is some where there is a control set."""
    if not evidence.has_control(run):
        return leakage.findings(candidates), None
    frozen = evidence.freeze(run)
    gathered = gather(run)
    made = evidence.test(run, gathered)
    people = evidence.people_table(run, gathered, made)
    run.save("assess", "people", PEOPLE, people, key=key)
    run.save("assess", "image_units", IMAGE_UNITS, evidence.image_units_table(gathered, made), key=key)
    run.save("assess", "straddlers", STRADDLERS, evidence.straddlers_table(gathered, made), key=key)
    told = evidence.summary(run, gathered, made, frozen, found.cosine)
    log.info("assess: evidence grade %s, %d persons listed at q = %g", told["grade"], told["listed"], told["q"])
    units = made.people.persons.unit_N[: len(keys)]
    tested = leakage.Tested(units, people, run.config.assess.evidence.q, made.verdict.claim)
    persons, pixels, told["pairs"] = judged(run, gathered, made, leakage.findings(candidates, keys, tested))
    run.save("assess", "pair_evidence", PAIR_EVIDENCE, pixels, key=key)
    odd, told["disagreement"] = disagreements(run)
    run.save("assess", "disagreements", DISAGREEMENTS, odd, key=key)
    told["recall"] = list(planted_recall(run)) or None
    seen = reviewed(run)
    told["review"] = None if seen is None else {name: value for name, value in seen.items() if name != "persons"}
    return persons, told


def assess_key(run: Run, threshold: float) -> str:
    """Digest of what assess worked on."""
    return fingerprint(CANDIDATES.contract, run.commit("search", "coverage").key, threshold)


def _refuse_below_floor(run: Run, found: Threshold) -> None:
    """ConfigError if the search did not keep all pairs from this threshold up."""
    floor: float = run.commit("search", "coverage").facts["floor"]
    if found.cosine < floor:
        raise ConfigError(
            f"the threshold is cosine {found.cosine:.4f}, and the search kept pairs from {floor} up only. Run search "
            f"again, with search.floor={np.floor(found.cosine * 100) / 100:.2f} or without search.floor."
        )


def highest(blocks: Iterable[pa.Table]) -> dict[str, float]:
    """The highest cosine of any pair, by arm."""
    best: dict[str, float] = {}
    for block in blocks:
        grouped = block.group_by("arm").aggregate([("cosine", "max")])
        for arm, cosine in zip(grouped["arm"].to_pylist(), grouped["cosine_max"].to_pylist(), strict=True):
            best[arm] = max(cosine, best.get(arm, cosine))
    return best


def _warnings(run: Run) -> list[str]:
    """What the catalogue has against the face models: they were trained on people of a set of this audit."""
    named = {role: one.catalogue for role, one in run.config.sets.given().items() if one.catalogue is not None}
    found = [
        f"{model.name}: {warning}"
        for model in run.config.models()
        for name in dict.fromkeys(named.values())
        for warning in overlaps(embedder_sets(model.name, model.training_data), name)
    ]
    return list(dict.fromkeys(found))


def _arm(count: leakage.ArmCount, found: Threshold) -> dict[str, Any]:
    expected = {
        "expected_false": found.fmr.value * count.comparisons,
        "expected_false_low": found.fmr.low * count.comparisons,
        "expected_false_high": found.fmr.high * count.comparisons,
    }
    return {**count._asdict(), **expected}


def _summary(run: Run, about: Mapping[str, Any], arms: Mapping[str, Any], persons: int) -> dict[str, Any]:
    sets = {}
    for role, one in run.config.sets.given().items():
        listed, status = run.commit("scan", role).facts, dict(run.commit("embed", role).facts["status"])
        audited = status.pop("ok", 0)
        counts = {"images": listed["images"], "audited": audited, "identities": listed["identities"]}
        faces = seen(run, role)
        if faces is not None and run.config.faces.several == "all":  # the status is of faces, these are of images
            counts["audited"], status = faces["images"], rejected_images(run, role)
        sets[role] = {
            "uri": public(one.uri),
            "form": listed["form"],
            "notes": listed["notes"],
            **counts,
            "rejected": status,
            "faces": faces,
            "unlisted": listed["unlisted"],
        }
    embedder, translation = run.config.embedder, told(run, unit_store(run))
    return {
        "schema": SUMMARY,
        "title": run.config.title,
        "warnings": [*_warnings(run), *cautions(translation)],
        "sets": sets,
        "embedder": {"name": embedder.name, "sha256": embedder.sha256, "width": embedder.width},
        "translation": translation,
        "calibration": dict(about),
        "arms": dict(arms),
        "findings": persons,
        "limit": run.config.assess.limit,
    }
