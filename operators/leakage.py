"""Candidates and findings: pairs over the threshold, ranked, and rolled up to persons."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators.tables import CANDIDATES, FINDINGS

DECISION = "candidate: over the threshold; look-alikes are expected among these"
LISTED = "listed: of all that are listed, at most {q:.0%} are expected to be false"
IN_BOTH = "candidate: seen in the training set and in the control set, so not tested"


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


class Tested(NamedTuple):
    """What the controlled audit says of persons, for the list of findings."""

    unit_N: NDArray[np.int64]
    """Unit of each training image; below 0 for images of persons who are in the control set too."""
    people: pa.Table
    """Rows of the PEOPLE contract."""
    q: float
    """False discovery rate of the list."""
    claim: bool
    """Whether error rates may be stated."""


def findings(
    candidates_training: pa.Table, keys: pa.ChunkedArray | None = None, tested: Tested | None = None
) -> pa.Table:
    """One row per training person with a candidate or on the list, under the FINDINGS contract, best first.

    Listed persons come first, by q-value and statistic; then those with candidates, by cosine. Where nothing was
    tested, a person is an identity, and an image where the training set has no labels.

    Parameters
    ----------
    candidates_training
        Candidates against the training set, best first.
    keys
        Keys of all training images in row-number order; needed with `tested`.
    tested
        The controlled audit's units and list.
    """
    own = candidates_training.to_pylist()
    who: list[Any] = [person(row["gallery_identity"], row["gallery_key"]) for row in own]
    if tested is not None and keys is not None:
        units = tested.unit_N[pc.index_in(candidates_training["gallery_key"], keys.combine_chunks()).to_numpy()]
        who = [name if unit < 0 else unit for name, unit in zip(who, units.tolist(), strict=True)]
    persons: dict[Any, list[dict[str, Any]]] = {}
    for name, row in zip(who, own, strict=True):
        persons.setdefault(name, []).append(row)
    rows = [_finding(rows) for rows in persons.values()]
    if tested is not None:
        rows = _with_evidence(dict(zip(persons, rows, strict=True)), tested)
    return FINDINGS.from_rows([row | {"rank": rank} for rank, row in enumerate(rows, 1)])


def _finding(own: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The finding of one person from the person's candidates, best first."""
    best = own[0]
    return {
        "training_identity": best["gallery_identity"],
        "training_key": best["gallery_key"],
        "release_identity": best["release_identity"],
        "release_key": best["release_key"],
        "cosine": best["cosine"],
        "same_bytes": any(row["same_bytes"] for row in own),
        "candidates": len(own),
        "release_images": len({row["release_key"] for row in own}),
        "decision": DECISION,
    }


def _with_evidence(found: Mapping[Any, dict[str, Any]], tested: Tested) -> list[dict[str, Any]]:
    """Findings joined with what was tested, and listed persons without a candidate; the listed ones first."""
    members = tested.people.filter(pc.equal(tested.people["arm"], "training"))
    known = {row["unit"]: row for row in members.to_pylist() if row["unit"] in found}
    listed = members.filter(pc.fill_null(pc.less_equal(members["q"], tested.q), False)).to_pylist()
    chosen = listed if tested.claim else []
    rows = dict(found) | {row["unit"]: _listed_only(row) for row in chosen if row["unit"] not in found}
    known |= {row["unit"]: row for row in chosen}
    joined = [row | _evidence(known.get(unit), isinstance(unit, str), tested) for unit, row in rows.items()]
    on_list = [row for row in joined if row["q"] is not None and row["q"] <= tested.q]
    others = [row for row in joined if not (row["q"] is not None and row["q"] <= tested.q)]
    return [
        *sorted(on_list, key=lambda row: (row["q"], -row["statistic"], row["training_key"])),
        *sorted(others, key=lambda row: (-row["cosine"], row["training_key"])),
    ]


def _listed_only(row: Mapping[str, Any]) -> dict[str, Any]:
    """A finding of a listed person whose best match stays below the threshold."""
    return {
        "training_identity": row["identity"],
        "training_key": row["key"],
        "release_identity": row["release_identity"],
        "release_key": row["release_key"],
        "cosine": row["cosine"],
        "same_bytes": False,
        "candidates": 0,
        "release_images": 0,
    }


def _evidence(row: Mapping[str, Any] | None, straddler: bool, tested: Tested) -> dict[str, Any]:
    """The columns that the controlled audit adds to a finding."""
    if row is None:
        return {"q": None, "decision": IN_BOTH if straddler else DECISION}
    kept = {name: row[name] for name in ("labels", "hub")}
    if not tested.claim:
        return kept | {"q": None, "decision": DECISION}
    kept |= {name: row[name] for name in ("anchor_cosine", "statistic", "p", "q")}
    listed = row["q"] is not None and row["q"] <= tested.q
    return kept | {"decision": LISTED.format(q=tested.q) if listed else DECISION}


def person(identity: str | None, key: str) -> str:
    """The unit of inference that an image belongs to."""
    return f"image {key}" if identity is None else f"identity {identity}"


def arm_count(listed: pa.Table, comparisons: int, highest: float | None) -> ArmCount:
    """Count the candidates of one arm."""
    who = {
        person(i, k) for i, k in zip(*(listed[c].to_pylist() for c in ("gallery_identity", "gallery_key")), strict=True)
    }
    return ArmCount(comparisons, listed.num_rows, len(pc.unique(listed["release_key"])), len(who), highest)
