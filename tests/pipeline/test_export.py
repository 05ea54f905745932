"""What other programs get: a dataset card that holds nothing confidential, a list for FiftyOne, a verdict for CI."""

import csv
import io
import json
import re
from typing import Any

import pytest
import yaml

from operators.tables import FINDINGS
from pipeline.export import card, fiftyone_csv, verdict

HOSTILE = 'A "title": x\n---\n```\n<script>alert(1)</script> | [a](http://b) *b* \u202e # c'


def summary(**changes: Any) -> dict[str, Any]:
    arm = {
        "candidates": 12,
        "persons": 5,
        "comparisons": 1000,
        "expected_false": 0.4,
        "release_images": 9,
        "highest": 0.9,
    }
    images = {"images": 100, "audited": 97, "identities": 20, "uri": "/secret/place", "rejected": {}, "unlisted": {}}
    found = {
        "title": HOSTILE,
        "embedder": {"name": "sface_<2021>", "sha256": "ab" * 32, "width": 128},
        "sets": dict.fromkeys(("control", "release", "training"), images),
        "calibration": {"threshold": 0.62, "fmr": 1.6e-05},
        "arms": {"training": arm, "control": {**arm, "candidates": 1, "persons": 1}},
        "findings": 5,
        "limit": None,
        "evidence": None,
    }
    return {**found, **changes}


def evidence(**changes: Any) -> dict[str, Any]:
    excess = {
        "alpha": 0.01,
        "member_hits": 9,
        "members": 20,
        "control_hits": 0,
        "controls": 20,
        "p": 1e-5,
        "delta": 0.45,
    }
    found = {
        "claim": True, "grade": "A", "reasons": [], "listed": 4, "q": 0.05, "shortest_list": 2, "recall": None,
        "persons": {"tested": {"training": 20, "control": 20}}, "detectable": [],
        "excess": [{**excess, "delta_low": 0.2, "delta_high": 0.6}],
    }  # fmt: skip
    return {**found, **changes}


RECORD = {
    "audit": {"candidates": "-"},
    "before": {"images": 100}, "after": {"images": 90, "identities": 19}, "removed": {"images": 10},
    "audit_again": {"before": {"candidates": 12}, "after": {"candidates": 1}, "note": "It must find less."},
    "notes": ["3 images stay that could not be audited: nothing is known of them"],
}  # fmt: skip


@pytest.mark.parametrize("found", [None, evidence(), evidence(claim=False, grade="C")])
@pytest.mark.parametrize("record", [None, RECORD])
def test_a_card_is_harmless_and_says_what_is_not_claimed(found: Any, record: Any) -> None:
    text = card(summary(evidence=found), "2026-01-02", record)
    lines = text.split("\n")
    assert not [line for line in lines if line.strip() in ("---", "...", "```") and line != "```"]
    assert sum(line.startswith("```") for line in lines) == 2
    outside = text.split("```yaml")[0]
    assert "<" not in re.sub(r"\\.", "", outside)
    assert "/secret" not in text
    assert "\u202e" not in text
    assert "private" in text.split("### What is not claimed")[1]
    assert ("### What was removed" in text) == (record is not None)
    assert ("must find less" in text) == (record is not None)
    listed = found is not None and found["claim"]
    assert ("4 of 20 tested training people are listed" in text) == listed
    assert ("No rates" in text or "no rates" in text or "Any rate" in text) == (not listed)
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| release", "| training", "| control"]


def test_the_numbers_of_a_card_are_read_by_any_yaml_reader() -> None:
    text = card(summary(evidence=evidence(), limit=3), "2026-01-02")
    block = yaml.safe_load(text.split("```yaml\n")[1].split("\n```")[0])["leakage_audit"]
    assert (block["listed"], block["grade"], block["passed"], block["threshold"]) == (4, "A", False, 0.62)
    assert block["excess_p"] == 1e-5
    assert block["title"].startswith('A "title": x\\u000a---')
    header = f"---\nlicense: mit\n---\n\n# Faces\n\n{text}"
    assert yaml.safe_load(header.split("---\n")[1]) == {"license": "mit"}
    assert len(re.findall(r"^---$", header, re.M)) == 2


@pytest.mark.parametrize(("limit", "passed"), [(None, None), (4, False), (5, True)])
def test_a_verdict_passes_at_the_limit(limit: int | None, passed: bool | None) -> None:
    made = verdict(summary(limit=limit))
    assert (made["passed"], made["grade"], made["listed"], made["claim"]) == (passed, None, None, False)
    assert made["not_audited"] == {"control": 3, "release": 3, "training": 3}
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_a_verdict_states_rates_only_with_a_claim() -> None:
    with_claim = verdict(summary(evidence=evidence()))
    without = verdict(summary(evidence=evidence(claim=False, grade="C")))
    names = ("grade", "claim", "listed", "q", "excess_p")
    assert [with_claim[name] for name in names] == ["A", True, 4, 0.05, 1e-5]
    assert [without[name] for name in names] == ["C", False, None, None, None]


def test_findings_for_fiftyone_have_one_row_for_each_image_and_fields_of_their_own() -> None:
    rows = [
        {"rank": 1, "release_key": "a/1.jpg", "training_key": "p", "cosine": 0.9, "q": 0.01, "tier": "same photo"},
        {"rank": 2, "release_key": "=x,\n.jpg", "training_key": "@q", "cosine": 0.8, "same_bytes": True},
        {"rank": 3, "release_key": "a/1.jpg", "training_key": "r", "cosine": 0.7},
    ]
    made = list(csv.DictReader(io.StringIO(fiftyone_csv(FINDINGS.from_rows(rows)).decode(), newline="")))
    assert [row["filepath"] for row in made] == ["a/1.jpg", "=x,\n.jpg"]
    assert [row["unveil_findings"] for row in made] == ["2", "1"]
    assert [row["unveil_rank"] for row in made] == ["1", "2"]
    assert made[0]["unveil_q"] == "0.01"
    assert (made[1]["unveil_training_key"], made[1]["unveil_q"], made[1]["unveil_same_bytes"]) == ("'@q", "", "True")
    assert all(name == "filepath" or name.startswith("unveil_") for name in made[0])
