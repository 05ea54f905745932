"""The report's list of people: findings with their evidence, as rows of text."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from operators.copies import Tier
from operators.leakage import person
from operators.tables import FINDINGS, PAIR_EVIDENCE
from pipeline.spreadsheet import values
from pipeline.wording import NOT_ESTIMABLE, cosine, known, p_value

PEOPLE_OPEN, PEOPLE_LISTED = 20, 300
"""People shown at once, and in all; the rest is in `findings.csv`."""

_CLASSES = {
    Tier.SAME_PHOTO: "same",
    Tier.SAME_PERSON: "same",
    Tier.BLEND: "blend",
    Tier.LOOK_ALIKE: "",
    Tier.HUB: "hub",
    Tier.NOT_CALIBRATED: "",
}


class Person(NamedTuple):
    """One finding as it is shown."""

    rank: int
    identity: str | None
    key: str
    release_identity: str | None
    release_key: str
    cosine: str
    anchor: str
    statistic: str
    p: str
    q: str
    listed: bool
    labels: int | None
    tier: str | None
    tier_class: str
    reasons: str
    second: str
    partner: str | None
    """Second source of the release image, if one was found."""
    hub: str | None


def tier_class(tier: str | None) -> str:
    """The style of a tier's badge: one of a closed set, whatever the tier says."""
    return _CLASSES.get(Tier(tier), "") if tier in set(Tier) else ""


def people_rows(findings: pa.Table, pixels: pa.Table | None, q: float | None, claim: bool) -> list[Person]:
    """The first findings, best first; without claim no second source is named, since its test needs the controls too.

    Parameters
    ----------
    findings
        Rows of the FINDINGS contract.
    pixels
        Rows of the PAIR_EVIDENCE contract; None where nothing was looked at.
    q
        False discovery rate of the list; None without a controlled audit.
    claim
        Whether the audit may state rates.
    """
    rows = _dicts(FINDINGS.check(findings).slice(0, PEOPLE_LISTED))
    looked = {} if pixels is None else {row["rank"]: row for row in _dicts(PAIR_EVIDENCE.check(pixels))}
    return [_person(row, looked.get(row["rank"], {}), q if claim else None) for row in rows]


def judgements(
    findings: pa.Table, unit_of: Mapping[str, int], evidence: Mapping[str, Any] | None
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function from a candidate to what its card says of the training person.

    Parameters
    ----------
    findings
        Rows of the FINDINGS contract.
    unit_of
        Unit of the controlled audit by training image; people who are not there are told apart by their labels.
    evidence
        Of the summary; None without a controlled audit.
    """

    def who(identity: str | None, key: str) -> int | str:
        return unit_of.get(key, person(identity, key))

    claim, q = (False, 0.0) if evidence is None else (evidence["claim"], evidence["q"])
    known_of = {who(row["training_identity"], row["training_key"]): row for row in findings.to_pylist()}

    def says(candidate: Mapping[str, Any]) -> dict[str, Any]:
        row = known_of.get(who(candidate["gallery_identity"], candidate["gallery_key"]))
        if row is None:
            return {}
        same = all(row[f"{one}_key"] == candidate[f"{two}_key"] for one, two in SIDES.items())
        value = row["q"] if claim else None
        return {"tier": row["tier"], "judged": same, "q": value, "listed": value is not None and value <= q}

    return says


SIDES = {"release": "release", "training": "gallery"}


def _person(row: dict[str, Any], pixels: dict[str, Any], q: float | None) -> Person:
    second = pixels.get("second_z")
    return Person(
        rank=row["rank"],
        identity=row["training_identity"],
        key=row["training_key"],
        release_identity=row["release_identity"],
        release_key=row["release_key"],
        cosine=cosine(row["cosine"]),
        anchor=cosine(row["anchor_cosine"]),
        statistic=cosine(row["statistic"]),
        p=p_value(row["p"]) if q is not None else NOT_ESTIMABLE,
        q=p_value(row["q"]) if q is not None else NOT_ESTIMABLE,
        listed=q is not None and known(row["q"]) and row["q"] <= q,
        labels=row["labels"],
        tier=row["tier"],
        tier_class=tier_class(row["tier"]),
        reasons=row["reasons"] or "",
        second=f"{second:.2f}" if second is not None and known(second) else "–",
        partner=pixels.get("blend_partner_key") if q is not None else None,
        hub=row["hub"],
    )


def _dicts(table: pa.Table) -> list[dict[str, Any]]:
    columns = [values(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]
