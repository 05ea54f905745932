"""The report's list of people: findings with their evidence, as rows of text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from operators.copies import Tier
from operators.leakage import IN_BOTH, person
from operators.tables import FINDINGS, PAIR_EVIDENCE
from pipeline.page_tables import Cell, Column, Filters, LongTable, Part, Row, text, who
from pipeline.spreadsheet import values
from pipeline.wording import NOT_ESTIMABLE, cosine, known, p_value

HELD = 10_000
"""Findings that the page holds; all are in `findings.csv` and `assess/findings.parquet`."""

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

    row: Mapping[str, Any]
    """Of FINDINGS."""
    pixels: Mapping[str, Any]
    """Of PAIR_EVIDENCE; empty where nothing was looked at."""
    p: str
    q: str
    listed: bool
    places: tuple[int, int] | None
    """Of the two images in each other's lists (`pipeline.page_clusters.mutual`)."""
    said: str | None
    """The label that reviewers gave the pair; None where it was not reviewed."""


def tier_class(tier: str | None) -> str:
    """The style of a tier's badge: one of a closed set, whatever the tier says."""
    return _CLASSES.get(Tier(tier), "") if tier in set(Tier) else ""


def people_rows(
    findings: pa.Table,
    pixels: pa.Table | None,
    q: float | None,
    claim: bool,
    mutual: Mapping[int, tuple[int, int]] | None = None,
    reviewed: Mapping[int, str] | None = None,
) -> list[Person]:
    """The first `HELD` findings, best first.

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
    mutual, reviewed
        Places in each other's lists, and reviewers' labels, by rank of the finding.
    """
    rows = _dicts(FINDINGS.check(findings).slice(0, HELD))
    looked = {} if pixels is None else {row["rank"]: row for row in _dicts(PAIR_EVIDENCE.check(pixels))}
    stated = q if claim else None
    return [
        Person(
            row,
            looked.get(row["rank"], {}),
            p_value(row["p"]) if stated is not None else NOT_ESTIMABLE,
            p_value(row["q"]) if stated is not None else NOT_ESTIMABLE,
            stated is not None and known(row["q"]) and row["q"] <= stated,
            (mutual or {}).get(row["rank"]),
            (reviewed or {}).get(row["rank"]),
        )
        for row in rows
    ]


def people_table(people: Sequence[Person], claim: bool, second: bool, tested: bool) -> LongTable:
    """The table of people.

    Parameters
    ----------
    people
        Of `people_rows`.
    claim
        Whether rates are shown; without claim no second source is named either, since its test needs the controls.
    second
        Whether a second face model ran.
    tested
        Whether there was a controlled audit, without which there are no tiers.
    """
    places = any(one.places is not None for one in people)
    columns = [
        Column("#", "rank", number=True),
        Column("Training person", head=True),
        Column("Closest in the release"),
        Column("Cosine", number=True, falls=True),
    ]
    columns += [Column("Statistic", number=True, falls=True), Column("q", number=True)] * claim
    columns += [Column("2nd model", "second model, z", number=True, falls=True)] * second
    columns += [Column("Ranks", "mutual ranks", number=True)] * places
    columns += [Column("Tier and evidence", "tier")] * tested
    cosine_at, tier_at = 3, len(columns) - 1 if tested else None
    rows = [_row(one, claim, second, places, tested) for one in people]
    filters = Filters((1, 2), "Search names", tier_at, cosine_at, "listed people only" if claim else "")
    return LongTable("people", "People", columns, rows, filters, "people")


def _row(one: Person, claim: bool, second: bool, places: bool, tested: bool) -> Row:
    row, z = one.row, one.pixels.get("second_z")
    labels = f"{row['labels']:,} labels" if known(row["labels"]) and row["labels"] > 1 else ""
    images = f"{row['release_images']:,} release images" if known(row["release_images"]) else ""
    made: list[tuple[Cell, float | None]] = [
        (text(f"{row['rank']:,}"), row["rank"]),
        (who(row["training_identity"], row["training_key"], labels), None),
        (who(row["release_identity"], row["release_key"], images if (row["release_images"] or 0) > 1 else ""), None),
        (text(cosine(row["cosine"])), _key(row["cosine"])),
    ]
    if claim:
        anchor = [Part("small", f"anchor {cosine(row['anchor_cosine'])}")] * known(row["anchor_cosine"])
        made.append(((*text(cosine(row["statistic"])), *anchor), _key(row["statistic"])))
        notes = [Part("small", f"p {one.p}")] * known(row["p"]) + [Part("small", "not listed")] * (not one.listed)
        made.append(((*text(one.q), *notes), _key(row["q"])))
    if second:
        made.append((text(f"{z:.2f}" if z is not None and known(z) else "–"), _key(z)))
    if places:
        made.append((_places(one.places), None if one.places is None else sum(one.places)))
    if tested:
        made.append((_tier(one, claim), None))
    cells, keys = zip(*made, strict=True)
    return Row(cells, keys, one.listed or not claim)


def _key(value: float | None) -> float | None:
    return value if known(value) else None


def _places(places: tuple[int, int] | None) -> Cell:
    if places is None:
        return text("–")
    told = text(f"{places[0]:,} / {places[1]:,}")
    return (*told, Part("small", "mutual")) if places == (1, 1) else told


def _tier(one: Person, claim: bool) -> Cell:
    """Tier, reasons and what they rest on."""
    row, pixels = one.row, one.pixels
    tier = row["tier"]
    style = f"tier {tier_class(tier)}".strip()
    parts = [Part("muted", "not looked at") if tier is None else Part(style, tier)]
    partner = pixels.get("blend_partner_key") if claim else None
    told = [
        "identical file bytes" if row["same_bytes"] else "",
        _looks(pixels),
        f"second source: {partner}" if partner is not None else "",
        f"flagged: {row['hub']}" if row["hub"] is not None else "",
        f"reviewed: {one.said}" if one.said is not None else "",
        f"decision: {_decision(row['decision'])}" if row["decision"] else "",
    ]
    parts += [Part("why", line) for line in told if line]
    return (*parts, *[Part("more", row["reasons"] or "")] * bool(row["reasons"]))


def _looks(pixels: Mapping[str, Any]) -> str:
    """How alike the pixels of the two images are, as numbers."""
    names = {"hash_distance": "hash distance", "ncc": "correlation", "ssim": "structure"}
    told = [f"{name} {pixels[field]:.3f}" for field, name in names.items() if known(pixels.get(field))]
    return ", ".join([*told, "mirrored"] if pixels.get("mirrored") else told)


def _decision(decision: str) -> str:
    """The word of a decision; the whole where it says more than the list's own introduction."""
    return decision if decision == IN_BOTH else decision.split(":")[0]


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

    def unit(identity: str | None, key: str) -> int | str:
        return unit_of.get(key, person(identity, key))

    claim, q = (False, 0.0) if evidence is None else (evidence["claim"], evidence["q"])
    known_of = {unit(row["training_identity"], row["training_key"]): row for row in findings.to_pylist()}

    def says(candidate: Mapping[str, Any]) -> dict[str, Any]:
        row = known_of.get(unit(candidate["gallery_identity"], candidate["gallery_key"]))
        if row is None:
            return {}
        same = all(row[f"{one}_key"] == candidate[f"{two}_key"] for one, two in SIDES.items())
        value = row["q"] if claim else None
        return {"tier": row["tier"], "judged": same, "q": value, "listed": value is not None and value <= q}

    return says


SIDES = {"release": "release", "training": "gallery"}


def _dicts(table: pa.Table) -> list[dict[str, Any]]:
    columns = [values(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]
