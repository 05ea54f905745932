from typing import Any

import pytest

from operators.copies import Tier
from operators.tables import FINDINGS
from pipeline.page_people import judgements, people_rows, tier_class

EVIDENCE = {"claim": True, "q": 0.05}
FOUND = [
    {"rank": 1, "training_identity": "a", "training_key": "a/1", "release_key": "s/1", "tier": "same photo", "q": 0.05},
    {"rank": 2, "training_identity": "b", "training_key": "b/1", "release_key": "s/2", "tier": "hub", "q": 0.2},
    {"rank": 3, "training_identity": "c", "training_key": "c/1", "release_key": "s/3", "tier": None, "q": None},
]
UNITS = {"a/1": 0, "a2/7": 0, "b/1": 1}
"""One person under two labels; c is in the control set too, so there is no unit."""


def candidate(identity: str | None, key: str, release: str = "s/1") -> dict[str, Any]:
    return {"gallery_identity": identity, "gallery_key": key, "release_key": release}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (candidate("a", "a/1"), {"tier": "same photo", "judged": True, "q": 0.05, "listed": True}),
        (candidate("a", "a/1", "s/9"), {"tier": "same photo", "judged": False, "q": 0.05, "listed": True}),
        (candidate("a2", "a2/7"), {"tier": "same photo", "judged": False, "q": 0.05, "listed": True}),
        (candidate("b", "b/1", "s/2"), {"tier": "hub", "judged": True, "q": 0.2, "listed": False}),
        (candidate("c", "c/4", "s/3"), {"tier": None, "judged": False, "q": None, "listed": False}),
        (candidate("d", "d/1"), {}),
    ],
)
def test_a_candidate_is_told_by_its_person(given: dict[str, Any], says: dict[str, Any]) -> None:
    assert judgements(FINDINGS.from_rows(FOUND), UNITS, EVIDENCE)(given) == says


@pytest.mark.parametrize("evidence", [None, EVIDENCE | {"claim": False}])
def test_without_a_claim_no_candidate_has_a_q_value(evidence: dict[str, Any] | None) -> None:
    known = judgements(FINDINGS.from_rows(FOUND), {}, evidence)
    assert known(candidate("a", "a/2")) == {"tier": "same photo", "judged": False, "q": None, "listed": False}


def test_people_without_labels_are_their_images() -> None:
    rows = [FOUND[0] | {"training_identity": None}]
    known = judgements(FINDINGS.from_rows(rows), {}, None)
    assert known(candidate(None, "a/1"))["tier"] == "same photo" and known(candidate(None, "a/2")) == {}


def test_every_tier_has_a_style_and_nothing_else_gets_one() -> None:
    assert [tier_class(tier) for tier in Tier] == ["same", "same", "blend", "", "hub", ""]
    assert tier_class('" onload="x') == tier_class(None) == ""


def test_a_person_at_the_rate_itself_is_listed_and_one_above_is_not() -> None:
    rows = people_rows(FINDINGS.from_rows(FOUND), None, 0.05, claim=True)
    assert [(row.listed, row.q) for row in rows] == [(True, "0.05"), (False, "0.2"), (False, "not estimable")]
    assert not any(row.listed for row in people_rows(FINDINGS.from_rows(FOUND), None, 0.05, claim=False))
