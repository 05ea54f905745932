"""The report of a small audit: what is shown, what is hidden, and what the command says at its end."""

import base64
import csv
import io
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from cluster.faults import IncompleteTable
from operators.pictures import COVER_RGB
from operators.tables import CANDIDATES, FINDINGS
from pipeline import __main__ as command
from pipeline.audit import audit
from pipeline.config import load
from pipeline.stage import Run

pytestmark = pytest.mark.ray


def pictures(page: Path) -> list[np.ndarray]:
    codes = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page.read_text())
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(code)))) for code in codes]


def test_faces_are_under_solid_boxes_unless_asked_for(audited: Path) -> None:
    page = audited.parent / "run" / "report.html"
    audit(load(str(audited)), "report")
    covered = pictures(page)
    assert "do not share" not in page.read_text().lower()
    audit(load(str(audited), ["report.faces=clear"]), "report")
    clear = pictures(page)
    assert len(covered) == len(clear) > 0
    middle = slice(50, 94)
    for hidden, seen in zip(covered, clear, strict=True):
        assert np.abs(hidden[middle, middle].astype(int) - COVER_RGB).max() <= 3
        assert seen[middle, middle].std() > 5
    assert re.search(r"biometric", page.read_text())


def test_findings_csv_holds_every_finding(audited: Path) -> None:
    audit(load(str(audited)), "report")
    with Run(load(str(audited))) as run:
        findings = run.table("assess", "findings", FINDINGS)
    with (audited.parent / "run" / "findings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["training_identity"] for row in rows] == findings["training_identity"].to_pylist()


def test_findings_and_figures_stand_beside_the_report_for_programs_and_documents(audited: Path) -> None:
    folder = audited.parent / "run"
    (folder / "figures").mkdir(exist_ok=True)
    for name in ("old.svg", "mine.txt"):
        (folder / "figures" / name).write_text("left")
    audit(load(str(audited)), "report")
    with Run(load(str(audited))) as run:
        findings = run.table("assess", "findings", FINDINGS)
    assert pq.read_table(folder / "findings.parquet").equals(findings)
    drawn = {f"{name}.{kind}" for name in ("scores", "best-match", "exceedance") for kind in ("svg", "png")}
    assert {path.name for path in (folder / "figures").iterdir()} == drawn | {"mine.txt"}, "no claim, so no ROC"
    for name in drawn:
        assert not (folder / "figures" / name).stat().st_mode & 0o077
    assert (folder / "figures" / "scores.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    for name in ("scores", "best-match", "exceedance"):
        assert f'aria-labelledby="{name}-title' in page
    assert not (folder / "public").exists() and not (folder / "audience.key").exists()


def test_a_report_says_what_changed_since_the_assessment_before(
    audited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = audited.parent / "run"
    audit(load(str(audited)), "report")
    assert not (folder / "changes.csv").exists(), "the first assessment, reported again"
    with Run(load(str(audited))) as run:
        whole, made = run.table("assess", "findings", FINDINGS), run.commit("assess", "findings")
        names = whole["training_identity"].to_pylist()
        run.save("assess", "findings", FINDINGS, whole.slice(2), key=made.key)
    for _ in range(2):
        assert command.main(["report", str(audited)]) == 0
    with (folder / "changes.csv").open(newline="") as file:
        rows = {row["training_identity"]: row["change"] for row in csv.DictReader(file)}
    assert rows == dict.fromkeys(names[2:], "unchanged") | dict.fromkeys(names[:2], "gone")
    said = capsys.readouterr().out
    assert said.count(f"0 new, 2 gone, 0 moved, {len(names) - 2} unchanged since the audit before") == 2
    audit(load(str(audited)), "assess", "report")
    changes = pq.read_table(folder / "changes.parquet")
    assert changes["change"].to_pylist() == ["new"] * 2 + ["unchanged"] * (len(names) - 2)


def test_the_number_of_pairs_shown_is_an_option(audited: Path) -> None:
    audit(load(str(audited), ["report.pairs=2"]), "report")
    assert len(pictures(audited.parent / "run" / "report.html")) == 4


def test_an_image_that_is_gone_is_said_and_nothing_else_is_lost(audited: Path, corpus: Path) -> None:
    with Run(load(str(audited))) as run:
        listed = run.table("assess", "candidates", CANDIDATES).to_pylist()
    first = next(row for row in listed if row["arm"] == "training")
    gone = corpus / "release" / first["release_key"]
    gone.rename(gone.with_suffix(".away"))
    try:
        audit(load(str(audited), ["report.pairs=1"]), "report")
    finally:
        gone.with_suffix(".away").rename(gone)
    assert len(pictures(audited.parent / "run" / "report.html")) == 1


def test_results_of_another_search_are_refused(audited: Path) -> None:
    with Run(load(str(audited))) as run:
        made = run.commit("assess", "candidates")
        table = run.table("assess", "candidates", CANDIDATES)
        run.save("assess", "candidates", CANDIDATES, table, key="another")
        with pytest.raises(IncompleteTable, match="Run `unveil assess` again"):
            audit(load(str(audited)), "report")
        run.save("assess", "candidates", CANDIDATES, table, key=made.key)


def test_the_command_ends_with_a_summary_and_the_limit_decides_the_exit_code(
    audited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Run(load(str(audited))) as run:
        found = run.table("assess", "findings", FINDINGS).num_rows
    assert found > 0
    for limit, code in [(None, 0), (found, 0), (found - 1, 2)]:
        assert command.main(["run", str(audited), f"assess.limit={'null' if limit is None else limit}"]) == code
        shown = capsys.readouterr().out
        for word in ("images", "faces", "comparisons", "threshold", "training", "control", "anchor", "report"):
            assert re.search(rf"^{word} ", shown, re.MULTILINE), word
        assert ("exceeded" in shown) == (code == 2)


@pytest.mark.usefixtures("short_trial")
def test_plan_tells_a_search_that_holds_from_one_that_does_not(
    audited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for override, state in [
        ("report.pairs=1", "up to date"),
        ("search.k=7", "out of date"),
        ("faces.several=reject", "out of date"),
    ]:
        assert command.main(["plan", str(audited), override]) == 0
        assert re.search(rf"^search +{state}$", capsys.readouterr().out, re.MULTILINE), override
