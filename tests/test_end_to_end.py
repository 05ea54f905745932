"""A newcomer's way, docs/guide.md from its first command to its last, on the demo corpus: what it finds and leaves.

The commands are read out of the guide and run by a shell, in a folder where the checkout's `configs`, `data` and
`models` are; the review is done in Chromium, where it is installed.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

from operators.tables import CANDIDATES, FINDINGS
from pipeline.config import AuditConfig, load
from pipeline.stage import Run
from seeds.demo.score import score

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]
COPIES = ("near_copy", "crop_flip", "colour", "dial_01")
"""Classes of which every auditable leak must be found; weaker resemblances are measured, not promised."""
PAIRS = 20
"""Pairs that the guide's review shows."""


class Walk(NamedTuple):
    """The guide, followed."""

    place: Path
    said: dict[str, subprocess.CompletedProcess[str]]
    """What each command said."""
    results: str | None
    """Text of the review's last page; None without a browser."""

    @property
    def out(self) -> Path:
        return self.place / "runs" / "demo"

    def config(self) -> AuditConfig:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.place)
            loaded = load("configs/demo.yaml", [f"out={self.out}"])
        return loaded

    def summary(self, name: str = "") -> Any:
        return json.loads((self.out / name / "summary.json").read_bytes())


def commands(root: Path) -> list[str]:
    """All `unveil` lines of the guide, in order, without their remarks."""
    blocks = re.findall(r"^```\n(.*?)^```", (root / "docs" / "guide.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("unveil ")]


@pytest.fixture(scope="module")
def corpus(root: Path) -> Path:
    """The corpus of `make demo`."""
    made = root / "data" / "demo"
    if not (made / "corpus.json").exists():
        pytest.fail("the demo corpus is missing: run `make setup` first")
    return made


@pytest.fixture(scope="module")
def walk(root: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """Every command of the guide, run as it stands there."""
    place = tmp_path_factory.mktemp("newcomer")
    for name in ("configs", "data", "models"):
        (place / name).symlink_to(root / name)
    (place / "home").mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(place / "home")}
    said: dict[str, subprocess.CompletedProcess[str]] = {}
    results = None
    for line in commands(root):
        if line.startswith("unveil review"):
            results = reviewed(line, place, environment) if browser() else None
            continue
        said[line] = subprocess.run(
            ["bash", "-c", line], cwd=place, env=environment, capture_output=True, text=True, timeout=400
        )
        assert said[line].returncode == 0, (line, said[line].stderr[-2000:])
    return Walk(place, said, results)


def browser() -> str | None:
    """Chromium, if it and its driver are there."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return None
    return shutil.which("chromium")


def reviewed(line: str, place: Path, environment: dict[str, str]) -> str:
    """Serve the review, and label its pairs in a browser."""
    server = subprocess.Popen(
        ["bash", "-c", f"exec {line}"], cwd=place, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        link = next(found[0] for found in (re.search(r"http://\S+", said) for said in server.stdout) if found)
        return labelled(link)
    finally:
        server.terminate()
        server.communicate()


def labelled(link: str) -> str:
    """Label all pairs by keys, by what the page shows alone; ask for the result, and return what it says."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        program = driver.chromium.launch(executable_path=browser(), args=["--no-sandbox", "--disable-gpu"])
        page = program.new_page()
        page.set_default_timeout(20_000)
        page.goto(link)
        page.get_by_label("Your name").fill("Ada")
        page.get_by_role("button", name="Begin or go on").press("Enter")
        page.wait_for_selector("#work:not([hidden])")
        for at in range(PAIRS):
            while page.evaluate(LOADED) < 2:  # the page's policy keeps Playwright from waiting in the page itself
                page.wait_for_timeout(20)
            page.keyboard.press("2" if page.evaluate(ALIKE) < 16 else "4")
            page.get_by_text(f"{at + 1} of {PAIRS} pairs decided").wait_for()
        page.get_by_role("button", name="Show the result…").click()
        page.get_by_role("button", name="Show the result", exact=True).click()
        page.wait_for_url("**/results")
        text = page.inner_text("main")
        program.close()
    return text


LOADED = "[...document.querySelectorAll('.pair img')].filter((one) => one.naturalWidth).length"
ALIKE = """(() => { const [one, two] = [...document.querySelectorAll('.pair img')].map((image) => {
  const canvas = document.createElement('canvas'); canvas.width = canvas.height = 16;
  const paint = canvas.getContext('2d'); paint.drawImage(image, 0, 0, 16, 16);
  return paint.getImageData(0, 0, 16, 16).data; });
  let sum = 0; for (let at = 0; at < one.length; at += 1) sum += Math.abs(one[at] - two[at]);
  return sum / one.length; })()"""
"""Mean difference of the two pictures, 16 x 16: a reviewer who knows near copies when they see them."""


def test_every_near_copy_is_found(walk: Walk, corpus: Path) -> None:
    classes = {row.leak: row for row in score(walk.out, corpus).classes}
    for leak in COPIES:
        assert classes[leak].planted > 0
        assert classes[leak].found == classes[leak].planted - classes[leak].not_auditable, leak


def test_no_control_face_is_reported_as_a_leak(walk: Walk, corpus: Path) -> None:
    run = Run(walk.config())
    findings = run.table("assess", "findings", FINDINGS).to_pylist()
    candidates = run.table("assess", "candidates", CANDIDATES).to_pylist()
    training = {path.name for path in (corpus / "training").iterdir()}
    assert findings and {row["training_identity"] for row in findings} <= training
    leaked = {row["release_key"] for row in candidates if row["arm"] == "training"}
    control_only = {row["release_key"] for row in candidates if row["arm"] == "control"} - leaked
    assert not control_only & {row["release_key"] for row in findings}


def test_training_stands_out_against_the_control_set(walk: Walk) -> None:
    arms = walk.summary()["arms"]
    assert arms["control"]["candidates"] <= arms["control"]["expected_false_high"]
    assert arms["training"]["candidates"] > 10 * arms["training"]["expected_false_high"]


def test_every_broken_file_is_a_reject_or_was_counted(walk: Walk, corpus: Path) -> None:
    summary = walk.summary()
    for role, one in summary["sets"].items():
        assert one["images"] == one["audited"] + sum(one["rejected"].values())
        assert one["images"] == len(list((corpus / role).rglob("*.jpg")))
    with (corpus / "broken.csv").open() as file:
        kinds = {row["kind"] for row in csv.DictReader(file) if row["set"] == "release"}
    rejected = summary["sets"]["release"]["rejected"]
    assert {"empty", "truncated", "text", "no_face"} <= kinds
    assert rejected["not_an_image"] >= 2 and rejected["corrupt"] >= 1 and rejected["no_face"] >= 1


def test_the_outputs_are_there_private_and_without_references_elsewhere(walk: Walk) -> None:
    page = (walk.out / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "http-equiv" in page
    with (walk.out / "findings.csv").open() as file:
        assert len(list(csv.reader(file))) > 50
    for path in [walk.out, *walk.out.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_second_run_does_no_work_and_gives_the_same_results(walk: Walk) -> None:
    before = {path: path.read_bytes() for path in walk.out.rglob("*.parquet")}
    again = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", "configs/demo.yaml"], cwd=walk.place, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-2000:]
    assert "embed: nothing to do" in again.stderr and "search: nothing to do" in again.stderr
    assert {path: path.read_bytes() for path in walk.out.rglob("*.parquet")} == before


def test_the_evidence_lists_the_near_copies_and_states_grade_and_sensitivity(walk: Walk, corpus: Path) -> None:
    told = walk.summary()["evidence"]
    assert (told["grade"], told["claim"], told["placebo"]["passed"]) == ("A", True, True)
    assert told["models"] == ["sface_2021dec", "dlib_resnet_v1"]
    assert told["disagreement"]["control_images"] > 1000
    recall = {one["transform"]: one["recall"]["listed"] for one in told["recall"]}
    assert min(recall[name]["value"] for name in ("copy", "jpeg", "crop", "flip", "colour", "blur")) >= 0.8
    findings = Run(walk.config()).table("assess", "findings", FINDINGS).to_pylist()
    with (corpus / "planted.csv").open(newline="") as handle:
        leak = {row["release_key"]: row["leak"] for row in csv.DictReader(handle)}
    listed = [row for row in findings if row["decision"].startswith("listed")]
    clean = [row for row in listed if row["release_key"] not in leak]
    assert len(clean) <= 0.1 * len(listed)
    tiers = {row["tier"] for row in listed if leak.get(row["release_key"]) == "near_copy"}
    assert tiers <= {"same photo", "same person"}


def test_a_review_in_the_browser_tells_leaks_from_decoys_and_stands_in_the_report(walk: Walk) -> None:
    if walk.results is None:
        pytest.skip("no chromium on this machine")
    kept = json.loads((walk.out / "review" / "review.json").read_bytes())
    assert kept["complete"] is True
    outcome = walk.summary()["evidence"]["review"]["outcome"]
    confirmed, false = outcome["member_confirmed"], outcome["control_confirmed"]
    assert (outcome["members"], outcome["controls"]) == (PAIRS / 2, PAIRS / 2) and confirmed >= 8 and false <= 1
    assert f"{confirmed} of {PAIRS // 2} training pairs were confirmed" in walk.results


def test_the_cleaned_release_is_without_the_findings(walk: Walk) -> None:
    manifest = pq.read_table(walk.out / "clean" / "manifest.parquet")
    gone = {row["key"] for row in manifest.to_pylist() if not row["kept"]}
    listed = Run(walk.config()).table("assess", "findings", FINDINGS).to_pylist()
    taken = {row["release_key"] for row in listed if row["decision"].startswith("listed")}
    assert taken and taken <= gone
    left = walk.summary("clean/audit")
    assert left["arms"]["training"]["candidates"] < 0.1 * walk.summary()["arms"]["training"]["candidates"]
    assert left["evidence"]["listed"] == 0
    assert left["sets"]["release"]["images"] == manifest.num_rows - len(gone)
    with (walk.out / "clean" / "written.csv").open(newline="") as file:
        assert sum(1 for _ in csv.DictReader(file)) == manifest.num_rows - len(gone)
