"""Candidates and findings: pairs over the threshold, ranked, and rolled up to persons."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.tables import CANDIDATES, FINDINGS

DECISION = "candidate: over the threshold; look-alikes are expected among these"


class ArmCount(NamedTuple):
    """What the threshold lets through against one gallery set."""

    comparisons: int
    candidates: int
    release_images: int
    """Distinct release images among the candidates."""
    persons: int
    """Distinct persons of the gallery set among the candidates."""
    highest: float | None
    """The highest cosine of any pair; None without a comparison."""


def candidates(pairs: pa.Table, arm: str, threshold: float, release: pa.Table, gallery: pa.Table) -> pa.Table:
    """Pairs of one arm at or over `threshold`, under the CANDIDATES contract, best first.

    Parameters
    ----------
    pairs
        Rows of the PAIRS contract.
    arm
        The gallery set to list.
    threshold
        Lowest cosine of a candidate.
    release, gallery
        Columns `key`, `identity` and `digest` of the two sets, one row per image, in row-number order.
    """
    chosen = pairs.filter(pc.and_(pc.equal(pairs["arm"], arm), pc.greater_equal(pairs["cosine"], threshold)))
    chosen = chosen.sort_by([("cosine", "descending"), ("release_row", "ascending"), ("gallery_row", "ascending")])
    left, right = release.take(chosen["release_row"]), gallery.take(chosen["gallery_row"])
    return CANDIDATES.check(
        pa.table(
            [
                pa.array(np.arange(1, chosen.num_rows + 1)),
                chosen["arm"],
                left["key"],
                left["identity"],
                right["key"],
                right["identity"],
                chosen["cosine"],
                pc.equal(left["digest"], right["digest"]),
                _multiplicity(chosen["release_row"]),
                _multiplicity(chosen["gallery_row"]),
            ],
            schema=CANDIDATES.schema,
        )
    )


def _multiplicity(rows: pa.ChunkedArray) -> pa.Array:
    """How often each value occurs in the column, per row."""
    _, inverse, counts = np.unique(rows.to_numpy(), return_inverse=True, return_counts=True)
    return pa.array(counts[inverse], pa.int64())


def findings(candidates_training: pa.Table) -> pa.Table:
    """One row per training person with a candidate, under the FINDINGS contract, best first.

    A person is an identity; where the training set has no labels, every image is its own person.
    """
    persons: dict[str, list[dict[str, object]]] = {}
    for row in candidates_training.to_pylist():
        persons.setdefault(person(row["gallery_identity"], row["gallery_key"]), []).append(row)
    rows = [
        {
            "rank": rank,
            "training_identity": own[0]["gallery_identity"],
            "training_key": own[0]["gallery_key"],
            "release_identity": own[0]["release_identity"],
            "release_key": own[0]["release_key"],
            "cosine": own[0]["cosine"],
            "same_bytes": any(row["same_bytes"] for row in own),
            "candidates": len(own),
            "release_images": len({row["release_key"] for row in own}),
            "decision": DECISION,
        }
        for rank, own in enumerate(persons.values(), 1)
    ]
    return FINDINGS.from_rows(rows)


def person(identity: str | None, key: str) -> str:
    """The unit of inference that an image belongs to."""
    return f"image {key}" if identity is None else f"identity {identity}"


def arm_count(listed: pa.Table, comparisons: int, highest: float | None) -> ArmCount:
    """Count the candidates of one arm."""
    who = {
        person(i, k) for i, k in zip(*(listed[c].to_pylist() for c in ("gallery_identity", "gallery_key")), strict=True)
    }
    return ArmCount(comparisons, listed.num_rows, len(pc.unique(listed["release_key"])), len(who), highest)
