"""The controlled audit on made-up embeddings, from the search's tables to findings, against plain NumPy."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from operators.persons import CONTROL, MEMBER
from operators.tables import CANDIDATES, FINDINGS, IMAGE_UNITS, PEOPLE, STRADDLERS
from operators.vectors import normalise
from pipeline.assess import assess
from pipeline.evidence import freeze
from pipeline.gathering import gather
from pipeline.search import search
from pipeline.stage import Run

WIDTH = 128
SIZES = {"release": 90, "training": 80, "control": 90, "anchor": 60, "placebo": 60}
LEAKED = 40
OPTIONS = (
    "assess.controlled=true", "assess.evidence.source=hold_out", "assess.evidence.neutral=true", "assess.fmr=0.01",
    "assess.evidence.alphas=[0.05]", "search.k=10",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(planted_unit: Callable, planted_sets: Callable):
    """Sets without labels: the first 40 training images are in the release, one control image is a training image."""
    rng = np.random.default_rng(3)
    vectors = {role: rng.standard_normal((size, WIDTH)) for role, size in SIZES.items()}
    vectors["release"][:LEAKED] = vectors["training"][:LEAKED] + 0.3 * rng.standard_normal((LEAKED, WIDTH))
    vectors["control"][7] = vectors["training"][70] + 0.1 * rng.standard_normal(WIDTH)
    units = {}
    for role, own in vectors.items():
        stored, failed = normalise(own)[0], np.zeros(len(own), bool)
        failed[5:6] = role == "control"
        parts = enumerate(pairwise((0, len(own) // 3, len(own))))
        units[role] = tuple(planted_unit(role, at, stored[a:b], failed[a:b]) for at, (a, b) in parts)
    return planted_sets(units)


@pytest.fixture(scope="module")
def assessed(session: None, world, committed: Callable[..., Run]) -> Run:
    run = committed(world, *OPTIONS)
    search(run)
    assess(run)
    return run


def test_best_matches_are_those_of_all_cosines(assessed: Run, world) -> None:
    gathered = gather(assessed)
    _, anchor_N, placebo_N = gathered.images.matches[0]
    for role, found in (("anchor", anchor_N), ("placebo", placebo_N)):
        expected = np.concatenate([world.cosines(role, arm).max(axis=0) for arm in ("training", "control")])
        np.testing.assert_array_equal(found, expected)
    near = np.concatenate([world.cosines("release", arm).max(axis=0) for arm in ("training", "control")])
    np.testing.assert_array_equal(gathered.images.matches[0].release_N, near)
    closest = np.concatenate([world.cosines("release", arm).argmax(axis=0) for arm in ("training", "control")])
    known = ~np.isnan(near)
    np.testing.assert_array_equal(gathered.release_row_N[known], closest[known])
    assert gathered.images.arm_N.tolist() == [MEMBER] * 80 + [CONTROL] * 90


def test_people_have_the_statistic_p_and_q_of_plain_counting(assessed: Run, world) -> None:
    people = assessed.table("assess", "people", PEOPLE).to_pylist()
    statistic = {
        arm: world.cosines("release", arm).max(axis=0) - world.cosines("anchor", arm).max(axis=0)
        for arm in ("training", "control")
    }
    gone = {"training": 70, "control": 7}
    controls = np.delete(statistic["control"], [5, 7])
    rows = {(row["arm"], row["key"]): row for row in people}
    keys = {arm: [key for unit in world.units[arm] for key in unit.keys] for arm in gone}
    for at, key in enumerate(keys["training"]):
        if at == gone["training"]:
            assert ("training", key) not in rows
            continue
        row = rows["training", key]
        assert row["statistic"] == statistic["training"][at]
        assert row["p"] == pytest.approx((1 + (controls >= row["statistic"]).sum()) / (1 + len(controls)), abs=1e-15)
        assert (row["images"], row["labels"], row["eligible"]) == (1, 1, True)
    assert ("control", keys["control"][7]) not in rows
    assert sum(row["arm"] == "control" and row["eligible"] for row in people) == len(controls)
    straddlers = assessed.table("assess", "straddlers", STRADDLERS).to_pylist()
    assert [(row["set"], row["key"]) for row in straddlers] == [(arm, keys[arm][at]) for arm, at in gone.items()]
    units = assessed.table("assess", "image_units", IMAGE_UNITS)["unit"].to_pylist()
    assert [at for at, unit in enumerate(units) if unit == -1] == [70, 87]


def test_findings_hold_the_leaked_with_q_values_and_the_others_without_a_claim(assessed: Run, world) -> None:
    findings = assessed.table("assess", "findings", FINDINGS).to_pylist()
    keys = [key for unit in world.units["training"] for key in unit.keys]
    listed = [row for row in findings if row["decision"].startswith("listed")]
    assert {row["training_key"] for row in listed} >= set(keys[:LEAKED])
    assert len(listed) <= LEAKED + 4
    assert all(row["q"] <= 0.05 for row in listed)
    assert [row["rank"] for row in findings] == list(range(1, len(findings) + 1))
    assert findings[: len(listed)] == listed
    release = [key for unit in world.units["release"] for key in unit.keys]
    whose = {row["training_key"]: row["release_key"] for row in listed}
    assert [whose[key] for key in keys[:LEAKED]] == release[:LEAKED]
    assert {row["tier"] for row in listed} == {"look-alike / indeterminate"}  # no images, and no second model
    assert all("pixels were not compared" in row["reasons"] for row in listed)
    candidates = assessed.table("assess", "candidates", CANDIDATES)
    assert sum(row["candidates"] for row in findings) == (np.array(candidates["arm"].to_pylist()) == "training").sum()


def test_the_summary_states_grade_tests_and_what_was_not_measured(assessed: Run) -> None:
    told = json.loads((assessed.folder / "summary.json").read_bytes())["evidence"]
    assert (told["grade"], told["claim"], told["anchored"], told["recall"]) == ("A", True, True, None)
    assert told["placebo"]["passed"]
    assert told["persons"]["straddlers"] == 1
    assert told["persons"]["tested"] == {"training": 79, "control": 88}
    assert told["excess"][0]["member_hits"] >= LEAKED
    assert told["over_threshold"]["training"] >= LEAKED
    assert 0 <= told["over_threshold"]["false_at_most"] < told["over_threshold"]["training"]
    assert told["sensitivity"][0]["what"] == "without the anchor set"
    assert told["pairs"]["blends"]["tested"] == 90


def test_what_was_decided_is_written_down_before_and_other_looks_are_counted(assessed: Run) -> None:
    looks = json.loads((assessed.folder / "frozen.json").read_bytes())
    assert [look["options"]["evidence"]["q"] for look in looks] == [0.05]
    assert freeze(assessed) == {"digest": looks[0]["digest"], "look": 1, "looks": 1}
    evidence = replace(assessed.config.assess.evidence, q=0.1)
    other = Run(replace(assessed.config, assess=replace(assessed.config.assess, evidence=evidence)))
    assert freeze(other) == {"digest": freeze(other)["digest"], "look": 2, "looks": 2}
    assert freeze(assessed)["looks"] == 2
