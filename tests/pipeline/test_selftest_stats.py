import json
from typing import Any

import numpy as np
import pytest

from operators import simulation
from operators.comparability import Comparison
from operators.simulation import Outcome
from pipeline import selftest_stats
from pipeline.selftest_stats import CLEAN, FULL, QUICK, SCENARIOS, Scenario, Size, run_selftest

GATED = Comparison(0.01, 0.5, 100, 100, True, False, "p")


def outcome(false: float = 0.0, power: float = 0.5, p: float = 0.5, gated: Comparison = GATED) -> Outcome:
    return Outcome((1, 1), (false, false), (power, power), p, 0.5, gated, 0, 0)


def judged(scenario: Scenario, made: list[Outcome], quick: bool = False) -> dict[str, Any]:
    return selftest_stats._judge(scenario, made, made, quick)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick run of seconds."""
    monkeypatch.setattr(selftest_stats, "QUICK", Size(400, 2, 2))
    monkeypatch.setattr(selftest_stats, "SCENARIOS", SCENARIOS[:4:3])


def test_the_run_prints_a_table_and_a_last_line_of_json(tiny: None) -> None:
    lines: list[str] = []
    report = run_selftest(True, lines.append)
    last = json.loads(lines[-1])
    assert last == json.loads(json.dumps(report))
    assert last["passed"] is True
    assert set(last["scenarios"]) == {"nobody leaked", "leak 10 %", CLEAN}
    assert last["scenarios"]["nobody leaked"]["power_10"] is None
    for name in last["scenarios"]:
        assert any(line.startswith(name) for line in lines)
    assert last["scenarios"][CLEAN]["clean_without_discovery"] == 2


def test_the_environment_selects_the_quick_run(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.setattr(selftest_stats, "SCENARIOS", SCENARIOS[:1])
    assert run_selftest(False, lambda line: None)["quick"] is True


def test_broken_statistics_fail_the_run(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """P-values that forget the controls' best, as a fixed threshold would, give false entries."""
    monkeypatch.setattr(
        simulation, "p_values", lambda member, control: np.where(member > np.median(control), 1e-9, 1.0)
    )
    report = run_selftest(True, lambda line: None)
    assert report["passed"] is False
    assert not any(one["ok"] for one in report["scenarios"].values())


def test_a_list_with_too_many_false_entries_fails() -> None:
    leaky = Scenario(name="leak", world={"leak": 0.1})
    assert judged(leaky, [outcome(false=0.04), outcome(false=0.05)])["ok"]
    assert not judged(leaky, [outcome(false=0.2)] * 20)["ok"]
    shown = judged(leaky, [outcome(false=0.0)] * 50 + [outcome(false=0.4)] * 10)  # mean .067, standard error .019
    assert shown["ok"]
    assert shown["fdr_05"] == pytest.approx(4 / 60, abs=1e-4)
    assert shown["fdr_05_se"] == pytest.approx(np.std([0] * 50 + [0.4] * 10, ddof=1) / np.sqrt(60), abs=1e-5)


def test_false_alarms_are_held_to_the_level_without_a_leak_only() -> None:
    alarms = [outcome(p=0.01)] * 30
    assert not judged(Scenario(name="null"), alarms)["ok"]
    assert judged(Scenario(name="leak", world={"leak": 0.1}), alarms)["ok"]
    assert judged(Scenario(name="violation", valid=False), alarms)["ok"]


def test_power_is_asked_for_at_full_size() -> None:
    scenario = Scenario(name="leak", world={"leak": 0.1}, power=0.3)
    weak = [outcome(power=0.2)] * 10
    assert not judged(scenario, weak)["ok"]
    assert judged(scenario, weak, quick=True)["ok"]


def test_the_gate_is_counted() -> None:
    closed = GATED._replace(passed=False)
    shown = judged(Scenario(name="x"), [outcome(p=0.01, gated=closed)] + [outcome()] * 3)
    assert (shown["gate_fires"], shown["excess"], shown["excess_behind_gate"]) == (0.25, 0.25, 0.0)


@pytest.mark.parametrize(
    ("results", "ok"),
    [
        ([(1.0, 0)] * 95 + [(1.0, 1)] * 5, True),
        ([(1.0, 0)] * 94 + [(1.0, 1)] * 6, False),
        ([(1.0, 0)] * 99 + [(0.8, 0)], False),
    ],
)
def test_clean_audits_find_nothing_in_95_of_100(results: list[tuple[float, int]], ok: bool) -> None:
    assert selftest_stats._judge_clean(iter(results))["ok"] is ok


def test_scenarios_scale_with_the_number_of_persons() -> None:
    assert len({one.name for one in SCENARIOS}) == len(SCENARIOS)
    for size in (FULL, QUICK):
        quarter = next(one for one in SCENARIOS if one.world.get("controls") == 375).config(size.persons)
        assert (quarter.members, quarter.controls) == (size.persons, size.persons // 4)
