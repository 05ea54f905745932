"""What changed since the audit before: pure comparison on tables made by hand, and what a run folder keeps."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from operators.errors import ConfigError
from operators.leakage import DECISION, LISTED
from operators.tables import FINDINGS
from pipeline.previous import ROWS_TOLD, Audit, about, compare, keep, previous, reasons, told
from pipeline.stage import Run

ABOUT: dict[str, Any] = {
    "title": "Faces", "created": "2026-01-01", "look": "ab", "datasets": {"training": "t", "release": "r"},
    "model": {"sha256": "w", "width": 128}, "models": ["m"], "faces": {"mode": "detect", "min_face": 0},
    "protocol": {"fmr": None, "evidence": {"q": 0.05}}, "threshold": 0.6, "claim": True,
}  # fmt: skip


def finding(who: str | None, *, listed: bool = False, q: float = 0.05, **other: Any) -> dict[str, Any]:
    decision = LISTED.format(q=q) if listed else DECISION
    row = {
        "training_identity": who,
        "training_key": f"{who}/1.jpg",
        "release_key": "a.jpg",
        "cosine": 0.7,
        "q": 0.01,
        "tier": "same person",
        "decision": decision,
    }
    return row | other


def findings(*rows: dict[str, Any]) -> pa.Table:
    return FINDINGS.from_rows([{**row, "rank": rank} for rank, row in enumerate(rows, 1)])


def changed(before: pa.Table, now: pa.Table) -> dict[str | None, str]:
    rows = compare(before, now).to_pylist()
    return {row["training_identity"] or row["training_key"]: row["change"] for row in rows}


def test_persons_are_new_gone_moved_or_unchanged() -> None:
    before = findings(finding("a", listed=True), finding("b"), finding("c"), finding("d"), finding("e", listed=True))
    now = findings(
        finding("f"),
        finding("a", listed=True, cosine=0.9, training_key="a/2.jpg", q=0.1),
        finding("b", listed=True),
        finding("c", tier="hub"),
        finding("d"),
    )
    assert changed(before, now) == {
        "f": "new", "b": "moved", "c": "moved", "e": "gone", "a": "unchanged", "d": "unchanged",
    }  # fmt: skip
    assert list(changed(before, now)) == ["f", "b", "c", "e", "a", "d"], "new, moved, gone, unchanged; best first"
    rows = {row["training_identity"]: row for row in compare(before, now).to_pylist()}
    assert (rows["a"]["rank"], rows["a"]["previous_rank"]) == (2, 1)
    assert (rows["a"]["cosine"], rows["a"]["previous_cosine"]) == (0.9, 0.7)
    assert rows["f"]["previous_cosine"] is None and rows["f"]["previous_listed"] is None
    assert rows["e"]["cosine"] is None and rows["e"]["listed"] is None and rows["e"]["previous_listed"] is True


def test_without_labels_a_person_is_an_image_and_never_a_label() -> None:
    image = finding(None, training_key="x")
    assert changed(findings(image), findings(image)) == {"x": "unchanged"}
    assert sorted(row["change"] for row in compare(findings(image), findings(finding("x"))).to_pylist()) == [
        "gone", "new",
    ]  # fmt: skip


def test_the_first_finding_of_a_person_counts_and_nothing_gives_nothing() -> None:
    twice = findings(finding("a", cosine=0.9), finding("a", cosine=0.6))
    assert compare(twice, findings()).to_pylist()[0]["previous_cosine"] == 0.9
    assert compare(findings(), findings()).num_rows == 0
    same = compare(twice, twice)
    assert same["change"].to_pylist() == ["unchanged"]


def test_the_same_options_are_comparable_and_options_that_a_version_added_do_not_matter() -> None:
    added = ABOUT | {"faces": {**ABOUT["faces"], "new_option": 1}, "title": "Other", "look": "cd"}
    assert reasons(ABOUT, ABOUT) == reasons(ABOUT, added) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"sha256": "other", "width": 128}}, "face models"),
        ({"models": ["m", "second"]}, "m then, m, second now"),
        ({"faces": {"mode": "aligned", "min_face": 0}}, "prepared in another way"),
        ({"datasets": {"training": "u", "release": "r"}}, "training set is another"),
        ({"datasets": {"training": "t", "release": "r", "control": "c"}}, "control set is another"),
        ({"threshold": 0.61}, "0.6000 and is 0.6100"),
        ({"protocol": {"fmr": 1e-5, "evidence": {"q": 0.05}}}, "options of the evidence"),
        ({"claim": False}, "may claim a list"),
    ],
)
def test_what_makes_two_audits_not_comparable_is_said(change: dict[str, Any], said: str) -> None:
    (found,) = reasons(ABOUT, ABOUT | change)
    assert said in found


def test_folders_of_models_are_not_told() -> None:
    (found,) = reasons(ABOUT, ABOUT | {"models": ["m", "/home/anna/cards/own.yaml"]})
    assert found.endswith("m then, m, own.yaml now")


def test_what_is_told_is_bounded_and_gone_rows_have_the_values_that_they_had() -> None:
    many = [finding(f"p{at}", listed=True) for at in range(ROWS_TOLD + 50)]
    then = ABOUT | {"datasets": {"training": "t", "release": "before"}}
    made = told(compare(findings(*many), findings(many[0], finding("z"))), then, ABOUT)
    assert len(made["gone"]) == ROWS_TOLD and made["counts"]["gone"] == ROWS_TOLD + 49
    assert made["gone"][0]["listed"] is True and made["gone"][0]["cosine"] == 0.7
    assert [row["training_identity"] for row in made["new"]] == ["z"]
    assert (made["unchanged"], made["moved"], made["release"]) == (1, 0, "another")
    assert made["counts"]["listed"] == 1 and made["counts"]["listed_before"] == ROWS_TOLD + 50
    assert made["comparable"] and made["previous"] == {"title": "Faces", "created": "2026-01-01", "look": "ab"}
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert told(compare(findings(), findings()), ABOUT | {"datasets": {}}, ABOUT)["release"] == "not known"


@pytest.fixture
def opened(plant: Callable[..., Run]) -> Callable[..., Run]:
    """A run whose assess stage committed these findings."""

    def build(rows: pa.Table, *overrides: str, name: str = "run") -> Run:
        run = plant(*overrides, name=name)
        run.save("assess", "findings", FINDINGS, rows, key="of a test")
        return run

    return build


def test_a_report_that_is_made_again_is_compared_with_the_assessment_before(opened: Callable[..., Run]) -> None:
    first, second, third = (findings(finding(who)) for who in "abc")
    run = opened(first)
    keep(run, "k1", Audit(first, ABOUT))
    assert previous(run) is None
    keep(run, "k1", Audit(first, ABOUT))
    assert previous(run) is None, "the same assessment again"
    run.save("assess", "findings", FINDINGS, second, key="of a test")
    for _ in range(2):
        keep(run, "k1", Audit(second, ABOUT | {"title": "second"}))
        then = previous(run)
        assert then is not None and then.findings.equals(first) and then.about["title"] == "Faces"
    keep(run, "another search", Audit(second, ABOUT | {"title": "again"}))
    then = previous(run)
    assert then is not None and then.findings.equals(second) and then.about["title"] == "second"
    run.save("assess", "findings", FINDINGS, third, key="of a test")
    keep(run, "another search", Audit(third, ABOUT))
    then = previous(run)
    assert then is not None and then.about["title"] == "again"


def test_findings_of_another_contract_are_not_compared(opened: Callable[..., Run]) -> None:
    run = opened(findings())
    run.store.child("report").commit("earlier", findings(), contract="findings/1", key="old", facts=ABOUT)
    assert previous(run) is None


def test_another_run_folder_can_be_named(opened: Callable[..., Run], tmp_path: Path) -> None:
    old = opened(findings(finding("old")), name="old")
    run = opened(findings(finding("new")), f"report.previous={old.folder}", name="new")
    with pytest.raises(ConfigError, match=r"report\.previous.*no finished audit"):
        previous(run)
    old.ledger.datasets({"training": "t"})
    calibration = {"threshold": 0.55}
    summary = {"title": "Old", "calibration": calibration, "evidence": {"frozen": {"digest": "d"}, "claim": True}}
    (old.folder / "summary.json").write_text(json.dumps(summary))
    then = previous(run)
    assert then is not None and then.findings["training_identity"].to_pylist() == ["old"]
    assert (then.about["title"], then.about["look"], then.about["threshold"]) == ("Old", "d", 0.55)
    assert then.about["datasets"] == {"training": "t"} and then.about["models"] == [run.config.embedder.name]
    keep(old, "key", Audit(old.table("assess", "findings", FINDINGS), ABOUT))
    kept = previous(run)
    assert kept is not None and kept.about["title"] == "Faces", "what was reported, whatever run.json says since"
    itself = replace(run.config, report=replace(run.config.report, previous=str(run.folder)))
    assert previous(Run(itself)) is None


def test_options_that_vectors_do_not_depend_on_are_left_out(opened: Callable[..., Run]) -> None:
    record = opened(findings()).ledger.record
    summary = {"title": "x", "calibration": {"threshold": 0.5}, "evidence": None}
    moved = json.loads(json.dumps(record))
    moved["config"]["embedder"] |= {"path": "elsewhere", "batch": 512, "runtime": "openvino"}
    moved["config"]["faces"]["detector"] = "elsewhere"
    assert reasons(about(record, summary), about(moved, summary)) == []
    moved["config"]["embedder"]["sha256"] = "0" * 64
    assert reasons(about(record, summary), about(moved, summary))
