"""The audit of the demo corpus finds what was planted, and reports no control face as a leak."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from operators.tables import CANDIDATES, FINDINGS
from pipeline.audit import audit
from pipeline.config import AuditConfig, load
from pipeline.stage import Run
from seeds.demo.score import score

pytestmark = [pytest.mark.ray, pytest.mark.slow]
COPIES = ("near_copy", "crop_flip", "colour", "dial_01")
"""Classes of which every auditable leak must be found; weaker resemblances are measured, not promised."""


@pytest.fixture(scope="module")
def corpus(root: Path) -> Path:
    """The corpus of `make demo`."""
    made = root / "data" / "demo"
    if not (made / "corpus.json").exists():
        pytest.fail("the demo corpus is missing: run `make setup` first")
    return made


@pytest.fixture(scope="module")
def config(root: Path, corpus: Path, session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuditConfig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        loaded = load("configs/demo.yaml", [f"out={tmp_path_factory.mktemp('audit')}/run"])
        audit(loaded)
        audit(loaded, "plant", "assess", "report")
        yield loaded


def test_every_near_copy_is_found(config: AuditConfig, corpus: Path) -> None:
    classes = {row.leak: row for row in score(Path(config.out), corpus).classes}
    for leak in COPIES:
        assert classes[leak].planted > 0
        assert classes[leak].found == classes[leak].planted - classes[leak].not_auditable, leak


def test_no_control_face_is_reported_as_a_leak(config: AuditConfig, corpus: Path) -> None:
    with Run(config) as run:
        findings = run.table("assess", "findings", FINDINGS).to_pylist()
        candidates = run.table("assess", "candidates", CANDIDATES).to_pylist()
    training = {path.name for path in (corpus / "training").iterdir()}
    assert findings and {row["training_identity"] for row in findings} <= training
    leaked = {row["release_key"] for row in candidates if row["arm"] == "training"}
    control_only = {row["release_key"] for row in candidates if row["arm"] == "control"} - leaked
    assert not control_only & {row["release_key"] for row in findings}


def test_training_stands_out_against_the_control_set(config: AuditConfig) -> None:
    summary = json.loads((Path(config.out) / "summary.json").read_text())
    training, control = summary["arms"]["training"], summary["arms"]["control"]
    assert control["candidates"] <= control["expected_false_high"]
    assert training["candidates"] > 10 * training["expected_false_high"]


def test_every_broken_file_is_a_reject_or_was_counted(config: AuditConfig, corpus: Path) -> None:
    summary = json.loads((Path(config.out) / "summary.json").read_text())
    for role, one in summary["sets"].items():
        assert one["images"] == one["audited"] + sum(one["rejected"].values())
        assert one["images"] == len(list((corpus / role).rglob("*.jpg")))
    with (corpus / "broken.csv").open() as file:
        kinds = {row["kind"] for row in csv.DictReader(file) if row["set"] == "release"}
    rejected = summary["sets"]["release"]["rejected"]
    assert {"empty", "truncated", "text", "no_face"} <= kinds
    assert rejected["not_an_image"] >= 2 and rejected["corrupt"] >= 1 and rejected["no_face"] >= 1


def test_the_outputs_are_there_private_and_without_references_elsewhere(config: AuditConfig) -> None:
    out = Path(config.out)
    page = (out / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "http-equiv" in page
    with (out / "findings.csv").open() as file:
        assert len(list(csv.reader(file))) > 50
    for path in [out, *out.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_second_run_does_no_work_and_gives_the_same_results(
    config: AuditConfig, caplog: pytest.LogCaptureFixture
) -> None:
    out = Path(config.out)
    before = {path: path.read_bytes() for path in out.rglob("*.parquet")}
    caplog.set_level("INFO")
    audit(config)
    assert "embed: nothing to do" in caplog.text and "search: nothing to do" in caplog.text
    assert {path: path.read_bytes() for path in out.rglob("*.parquet")} == before


def test_the_evidence_lists_the_near_copies_and_states_grade_and_sensitivity(config: AuditConfig, corpus: Path) -> None:
    told = json.loads((Path(config.out) / "summary.json").read_text())["evidence"]
    assert (told["grade"], told["claim"], told["placebo"]["passed"]) == ("A", True, True)
    assert told["models"] == ["sface_2021dec", "dlib_resnet_v1"]
    assert told["disagreement"]["control_images"] > 1000
    recall = {one["transform"]: one["recall"]["listed"] for one in told["recall"]}
    assert min(recall[name]["value"] for name in ("copy", "jpeg", "crop", "flip", "colour", "blur")) >= 0.8
    with Run(config) as run:
        findings = run.table("assess", "findings", FINDINGS).to_pylist()
    with (corpus / "planted.csv").open(newline="") as handle:
        leak = {row["release_key"]: row["leak"] for row in csv.DictReader(handle)}
    listed = [row for row in findings if row["decision"].startswith("listed")]
    clean = [row for row in listed if row["release_key"] not in leak]
    assert len(clean) <= 0.1 * len(listed)
    tiers = {row["tier"] for row in listed if leak.get(row["release_key"]) == "near_copy"}
    assert tiers <= {"same photo", "same person"}
