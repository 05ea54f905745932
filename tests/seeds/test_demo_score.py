"""Audits are graded by the key of the demo corpus as one would by hand."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.tables import CANDIDATES
from seeds.demo import leaks
from seeds.demo.__main__ import main
from seeds.demo.score import interval, score


@pytest.fixture
def graded(tmp_path: Path) -> tuple[Path, Path]:
    """A run and a corpus written by hand: 4 near copies, 2 blends; persons p1 to p4, of whom p4 has no usable image."""
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    for key in (
        "training/p1/1.jpg",
        "training/p2/1.jpg",
        "training/p2/2.jpg",
        "training/p3/1.jpg",
        "training/p4/1.jpg",
    ):
        (corpus / key).parent.mkdir(parents=True, exist_ok=True)
        (corpus / key).touch()
    for number in range(1, 10):
        (corpus / "release/s").mkdir(parents=True, exist_ok=True)
        (corpus / f"release/s/{number}.jpg").touch()
    (corpus / "training/p4/notes.txt").touch()
    (corpus / "broken.csv").write_text("set,key,kind\ntraining,p4/notes.txt,other_extension\nrelease,s/9.jpg,empty\n")
    (corpus / "planted.csv").write_text(
        "release_key,leak,source_key,source_identity,second_source_key,second_source_identity\n"
        "s/1.jpg,near_copy,p1/1.jpg,p1,,\n"
        "s/2.jpg,near_copy,p2/1.jpg,p2,,\n"
        "s/3.jpg,near_copy,p3/1.jpg,p3,,\n"
        "s/4.jpg,near_copy,p4/1.jpg,p4,,\n"
        "s/5.jpg,blend_50,p4/1.jpg,p4,p1/1.jpg,p1\n"
        "s/6.jpg,blend_50,p2/2.jpg,p2,p3/1.jpg,p3\n"
    )
    pairs = [
        ("training", "s/1.jpg", "p1"),  # found
        ("training", "s/2.jpg", "p3"),  # the wrong person: not found
        ("control", "s/2.jpg", "p2"),  # control does not count
        ("training", "s/6.jpg", "p3"),  # found by its second source
        ("training", "s/6.jpg", "p1"),
        ("training", "s/7.jpg", "p1"),  # a false alarm, twice
        ("training", "s/7.jpg", "p2"),
        ("control", "s/8.jpg", "n1"),
    ]
    candidates = [
        {"rank": n, "arm": arm, "release_key": key, "gallery_identity": person, "cosine": 0.9}
        for n, (arm, key, person) in enumerate(pairs, start=1)
    ]
    rejects = [("training", "p4/1.jpg"), ("training", "p2/1.jpg"), ("release", "s/3.jpg"), ("control", "s/5.jpg")]
    columns = {name: pa.array([None] * len(rejects), pa.string()) for name in ("digest", "status", "error")}
    keys = {"set": [name for name, _ in rejects], "key": [key for _, key in rejects]}
    (run / "assess").mkdir(parents=True)
    pq.write_table(CANDIDATES.from_rows(candidates), run / "assess" / "candidates.parquet")
    pq.write_table(pa.table(keys | columns), run / "assess" / "rejects.parquet")
    return run, corpus


def test_an_audit_is_graded_as_by_hand(graded: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, corpus = graded
    result = score(run, corpus)
    grades = {c.leak: (c.planted, c.not_auditable, c.found, c.recall) for c in (*result.classes, result.total)}
    assert grades["near_copy"] == (4, 2, 1, 0.5)  # s/3 is a reject, p4 has no image left; s/2 was missed
    assert grades["blend_50"] == (2, 0, 1, 0.5)  # s/5 was missed: p1 could have been found
    assert grades["blend_70"] == (0, 0, 0, None)
    assert grades["all"] == (6, 2, 2, 0.5)
    assert (result.false_alarms, result.clean_images) == (1, 2)  # s/7 of s/7 and s/8
    assert main(["score", str(run), str(corpus)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith("planted leaks found: 2 of 6 (2 not auditable, recall 0.500 (0.068 to 0.932)")
    assert told[-1].endswith("false alarms: 1 of 2 clean release images)")
    written = json.loads((run / "planted.json").read_text())
    assert written["total"]["found"] == 2
    assert [c["leak"] for c in written["classes"]] == list(leaks.LEAKS)


@pytest.mark.parametrize(
    ("found", "trials", "low", "high"),
    [
        (0, 0, 0.0, 1.0),
        (0, 10, 0.0, 1 - 0.025**0.1),
        (10, 10, 0.025**0.1, 1.0),
        (1, 2, 1 - np.sqrt(0.975), np.sqrt(0.975)),
    ],
)
def test_the_interval_is_that_of_clopper_and_pearson(found: int, trials: int, low: float, high: float) -> None:
    assert interval(found, trials) == pytest.approx((low, high), abs=1e-12)


def test_a_run_without_an_assessment_and_a_corpus_without_a_key_are_named(
    graded: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, corpus = graded
    (run / "assess" / "rejects.parquet").unlink()
    assert main(["score", str(run), str(corpus)]) == 1
    assert "rejects.parquet is missing. Run the audit" in capsys.readouterr().err
    (corpus / "planted.csv").unlink()
    assert main(["score", str(run), str(corpus)]) == 1
    assert "planted.csv is missing. Make the corpus" in capsys.readouterr().err
