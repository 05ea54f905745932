"""The summary on the terminal, from summaries made by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.closing import closing
from pipeline.config import load

ARM = {"comparisons": 100, "candidates": 3, "persons": 2, "expected_false": 0.5}
EVIDENCE: dict[str, Any] = {
    "grade": "A", "claim": True, "reasons": ["Because.\x1b[31m"], "listed": 2, "q": 0.05, "recall": None,
    "persons": {"tested": {"training": 40, "control": 50}},
    "excess": [{"delta": 0.05, "delta_low": 0.01, "delta_high": 0.1, "p": 0.003}],
}  # fmt: skip


@pytest.fixture
def ended(tmp_path: Path) -> Callable[..., tuple[str, bool]]:
    """What `closing` says of a summary with these changes."""

    def build(**changes: Any) -> tuple[str, bool]:
        for role in ("release", "training"):
            (tmp_path / role).mkdir(exist_ok=True)
        sets = {role: {"uri": str(tmp_path / role)} for role in ("release", "training")}
        (tmp_path / "a.yaml").write_text(yaml.safe_dump({"out": str(tmp_path), "sets": sets}))
        about = {
            "sets": {"release": {"images": 10, "audited": 9}, "training": {"images": 20, "audited": 20}},
            "arms": {"training": ARM}, "calibration": {"threshold": 0.5, "fmr": 1e-5}, "findings": 2, "limit": None,
        }  # fmt: skip
        (tmp_path / "summary.json").write_text(json.dumps(about | changes))
        return closing(load(str(tmp_path / "a.yaml")))

    return build


def test_without_a_control_set_nothing_is_said_of_evidence(ended: Callable[..., tuple[str, bool]]) -> None:
    for changes in ({}, {"evidence": None}):
        text, over = ended(**changes)
        assert not over and "evidence" not in text and "recall" not in text
        assert "faces         29 audited, 1 not" in text


def test_grade_list_excess_and_recall_are_said(ended: Callable[..., tuple[str, bool]]) -> None:
    text, _ = ended(evidence=EVIDENCE)
    assert "evidence      grade A, random hold-out" in text
    assert "listed        2 of 40 persons at a false discovery rate of 0.05" in text
    assert "excess        5 % of members over controls (1 % to 10 %), exact p 0.003" in text
    assert "recall        not measured: run `unveil plant CONFIG`" in text


def test_without_a_claim_the_reasons_are_said_and_no_rate(ended: Callable[..., tuple[str, bool]]) -> None:
    text, _ = ended(evidence=EVIDENCE | {"claim": False, "grade": "C"})
    assert "evidence      grade C, no rates are claimed" in text
    assert "              Because.\\u001b[31m" in text and "\x1b" not in text
    assert "excess" not in text and "listed" not in text


@pytest.mark.parametrize(("limit", "over"), [(1, True), (2, False)])
def test_the_limit_decides(ended: Callable[..., tuple[str, bool]], limit: int, over: bool) -> None:
    text, exceeded = ended(limit=limit, evidence=EVIDENCE)
    assert exceeded is over and ("exceeded" in text) is over


def test_further_faces_of_the_images_are_counted(ended: Callable[..., tuple[str, bool]]) -> None:
    def faces(audited: int, images: int, passed_over: int) -> dict[str, Any]:
        counts = {"audited": audited, "images": images, "passed_over": passed_over, "images_with_passed_over": 1}
        return {"images": 10, "audited": images, "faces": counts}

    sets = {
        "release": faces(13, 10, 1),
        "training": faces(9, 8, 0),
        "anchor": {"images": 1, "audited": 1, "faces": None},
    }
    assert "further faces 4 audited, 1 not (faces.several)" in ended(sets=sets)[0]
    assert "further faces" not in ended(sets={"release": faces(10, 10, 0)})[0]
