"""What the first screen says of coverage and of what to do next."""

import copy
from typing import Any

import pytest

from pipeline.page_changes import changes
from pipeline.page_first import checked, steps

EVIDENCE = {
    "claim": True, "listed": 31, "shortest_list": 20, "recall": [{}], "review": {},
    "persons": {"tested": {"training": 200, "control": 100}},
}  # fmt: skip


def summary(evidence: dict[str, Any] | None, control: bool = True, **changes: Any) -> dict[str, Any]:
    roles = ("release", "training", *["control"] * control)
    arms = {role: {"comparisons": 1_000_000} for role in roles[1:]}
    sets = {role: {"images": 1000, "audited": 995} for role in roles}
    return {"sets": sets, "arms": arms, "evidence": evidence, "findings": 40} | changes


def commands(about: dict[str, Any]) -> list[str]:
    return [one.command for one in steps(about)]


@pytest.mark.parametrize(
    ("evidence", "wanted"),
    [
        (EVIDENCE, ["unveil clean CONFIG"]),
        (EVIDENCE | {"review": None}, ["unveil review CONFIG review.pairs=31", "unveil clean CONFIG"]),
        (EVIDENCE | {"review": None, "listed": 900}, ["unveil review CONFIG review.pairs=100", "unveil clean CONFIG"]),
        (EVIDENCE | {"listed": 0, "recall": None}, ["unveil plant CONFIG"]),
        (EVIDENCE | {"listed": 0}, [""]),
        (EVIDENCE | {"claim": False}, ["unveil run CONFIG", "unveil clean CONFIG clean.findings=candidates"]),
        (EVIDENCE | {"shortest_list": 900, "listed": 0}, ["unveil run CONFIG"]),
    ],
)
def test_what_to_do_follows_from_the_result(evidence: dict[str, Any], wanted: list[str]) -> None:
    assert commands(summary(evidence)) == wanted


def test_a_missing_control_set_and_a_low_coverage_come_first() -> None:
    about = summary(None, control=False)
    assert commands(about)[0] == "unveil run CONFIG sets.control.uri=FOLDER"
    assert "report.faces=clear" in commands(about)[1]
    low = copy.deepcopy(about)
    low["sets"]["release"]["audited"] = 900
    assert "100 of 1,000 in the release set" in steps(low)[0].says
    none = summary(None, arms={"training": {"comparisons": 0}})
    assert commands(none) == ["unveil doctor CONFIG"]


def test_coverage_is_rounded_down_and_names_the_worst_set() -> None:
    about = summary(
        None, sets={"release": {"images": 100_000, "audited": 99_999}, "training": {"images": 5, "audited": 5}}
    )
    share, comparisons = checked(about, {})
    assert share.value == "99.99 %" and "100,004 of 100,005; of the release set 99.99 %" in share.says
    assert comparisons.value == "1,000,000" and "searched again" not in comparisons.says
    manifest = {"stages": {"search": {"certificate": {"comparisons_searched_again": 5000, "outcome": "equal"}}}}
    assert "5,000 searched again by another path: equal" in checked(about, manifest)[1].says
    assert checked(about, {"stages": {"search": {"certificate": "<b>"}}})[1].says == comparisons.says


ROW = {
    "rank": 1, "training_identity": "p1", "training_key": "p1/1", "release_identity": None, "release_key": "s/1",
    "cosine": 0.9, "q": 0.01, "tier": None,
}  # fmt: skip
CHANGES = {
    "previous": {"title": "Demo", "created": "2025-01-01", "look": "ab"}, "comparable": True, "new": [ROW], "gone": [],
    "reasons": ["Other model."], "unchanged": 5, "moved": 2, "counts": {"new": 300, "gone": 0, "unchanged": 5},
}  # fmt: skip


def test_changes_are_counted_and_listed_where_the_audits_can_be_compared() -> None:
    made = changes(CHANGES, claim=True)
    assert made is not None and "300 findings are new, 0 gone, 5 unchanged, 2 with another tier" in made.says[1]
    assert [table.title for table in made.tables] == ["New findings, the first 1 of 300"]
    assert len(made.tables[0].columns) == len(made.tables[0].rows[0].cells) == len(made.tables[0].rows[0].keys) == 6
    without = changes(CHANGES, claim=False)
    assert without is not None and len(without.tables[0].columns) == 5
    other = changes(CHANGES | {"comparable": False}, claim=True)
    assert other is not None and (other.reasons, other.tables, len(other.says)) == (["Other model."], [], 1)
    assert changes(None, claim=True) is None
