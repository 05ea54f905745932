"""The verdict as SARIF, against the parts of the standard that such a file uses."""

import json
import re
from typing import Any

import pytest

from pipeline.export import verdict
from pipeline.sarif import RULES, sarif

ARM = {"candidates": 12, "persons": 5, "comparisons": 1000, "expected_false": 0.4}
EVIDENCE: dict[str, Any] = {
    "claim": True, "grade": "A", "reasons": [], "listed": 4, "q": 0.05, "shortest_list": 2, "recall": [{}],
    "persons": {"tested": {"training": 20, "control": 20}}, "detectable": [],
    "excess": [{"alpha": 0.01, "member_hits": 9, "members": 20, "control_hits": 0, "controls": 20, "p": 1e-5,
                "delta": 0.45, "delta_low": 0.2, "delta_high": 0.6}],
}  # fmt: skip


def summary(**changes: Any) -> dict[str, Any]:
    sets = {role: {"images": 100, "audited": 100, "uri": "/secret"} for role in ("release", "training")}
    arms = {"training": ARM}
    return {"title": "\u202ezq", "sets": sets, "arms": arms, "findings": 5, "limit": None, "evidence": None} | changes


def rules(log: dict[str, Any]) -> list[str]:
    return [one["ruleId"] for one in log["runs"][0]["results"]]


CASES = [
    (summary(), ["candidates-found", "no-control"]),
    (summary(evidence=EVIDENCE, limit=4), ["leakage-found", "excess-found", "limit-exceeded", "candidates-found"]),
    (summary(evidence=EVIDENCE | {"claim": False, "grade": "C"}, limit=5), ["candidates-found", "no-claim"]),
    (
        summary(
            evidence=EVIDENCE | {"listed": 0, "recall": None, "excess": []}, arms={"training": ARM | {"candidates": 0}},
            findings=0, limit=0,
        ),
        ["sensitivity-unknown"],
    ),
    (
        summary(sets={"release": {"images": 9, "audited": 7}, "training": {"images": 1, "audited": 1}}),
        ["candidates-found", "coverage-incomplete", "no-control"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("found", "expected"), CASES)
def test_a_result_stands_for_each_thing_that_holds(found: dict[str, Any], expected: list[str]) -> None:
    log = sarif(found)
    assert rules(log) == expected
    assert ("limit-exceeded" in expected) == (verdict(found | {"arms": found["arms"]})["passed"] is False)
    text = json.dumps(log, allow_nan=False)
    assert "/secret" not in text and "zq" not in text, "aggregates only"
    assert not re.search("private|no leak|anonymous", text)


@pytest.mark.parametrize("found", [case[0] for case in CASES])
def test_the_log_has_what_the_standard_asks_for(found: dict[str, Any]) -> None:
    """SARIF 2.1.0: 3.13 (log), 3.14 (run), 3.18 and 3.19 (tool), 3.27 (result), 3.49 (rules)."""
    log = sarif(found)
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] and re.fullmatch(r"\d+\.\d+\.\d+\S*", driver["semanticVersion"])
    ids = [rule["id"] for rule in driver["rules"]]
    assert len(set(ids)) == len(ids) == len(RULES), "3.19.23: unique"
    for rule in driver["rules"]:
        assert re.fullmatch(r"[a-z-]+", rule["id"]) and rule["name"] != rule["id"]
        assert rule["shortDescription"]["text"].endswith(".") and rule["fullDescription"]["text"].endswith(".")
        assert rule["defaultConfiguration"]["level"] in ("none", "note", "warning", "error")
    for result in run["results"]:
        assert ids[result["ruleIndex"]] == result["ruleId"], "3.27.6"
        assert result["level"] in ("none", "note", "warning", "error")
        assert result["message"]["text"]
        (location,) = result["locations"]
        assert location["physicalLocation"]["artifactLocation"]["uri"] == "summary.json"
        assert all(isinstance(value, str) for value in result["partialFingerprints"].values())
