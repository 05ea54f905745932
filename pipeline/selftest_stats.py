"""Proof of the statistics in a world where the truth is known: `unveil selftest stats` (QUICK=1: under a minute).

Every scenario is simulated many times and goes through the audit's own code (`operators.simulation.audit`). A share of
false entries or a rate of false alarms may exceed its nominal level only by what chance allows: three standard errors
of the replicates. `raw` columns show what the best match alone, without an anchor set, would have done.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from time import perf_counter
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from operators.simulation import QS, Mix, Outcome, WorldConfig, audit, draw

SEED = 20_251
LEVEL = 0.05
"""Level of the excess test."""
ERRORS = 3.0
"""Standard errors by which a simulated rate may miss its limit."""
CLEAN = "clean audit finds nothing"
COPIES = 40
CLEAN_SHARE = 0.95
"""Part of the clean repeats that must end without any discovery at q = .05."""
FOUND_SHARE = 0.90
"""Part of the planted near copies that each repeat must find."""
SPARSE: Mix = (0.40, 0.30, 0.20, 0.10)
DENSE: Mix = (0.10, 0.20, 0.30, 0.40)


class Size(NamedTuple):
    """How much is simulated."""

    persons: int
    replicates: int
    clean: int
    """Repeats of the clean audit."""


FULL = Size(1500, 200, 100)
QUICK = Size(800, 10, 15)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A simulated situation, and what must hold in it."""

    name: str
    world: Mapping[str, Any] = field(default_factory=dict)
    """Changes to `WorldConfig`."""
    valid: bool = True
    """Whether the list's share of false entries, and without a leak the excess test's false alarms, are held to their
    levels. A violation that the statistic does not repair is shown as it is: what the gate lets pass of it is in
    the column `behind`."""
    excess: float = LEVEL
    """Greatest rate of false alarms of the excess test; more than its level where the protocol says so."""
    power: float = 0.0
    """Least power of the list at q = .10 at full size."""
    cap: int | None = None
    match: bool = False

    def config(self, persons: int) -> WorldConfig:
        """The world, with numbers of persons in proportion to `persons`."""
        part = persons / FULL.persons
        changes = {"controls": FULL.persons, "identities": 500} | dict(self.world)
        scaled = {name: round(changes[name] * part) for name in ("controls", "identities")}
        return WorldConfig(members=persons, **(changes | scaled))

    @property
    def null(self) -> bool:
        """Whether nobody leaked."""
        return not self.world.get("leak") and not self.world.get("copies")


SHIFTED = {"mixes": (DENSE, SPARSE, DENSE, DENSE)}
SHIFTED_ANCHOR = {"mixes": (DENSE, SPARSE, DENSE, SPARSE)}
SCENARIOS = (
    Scenario(name="nobody leaked"),
    Scenario(name="leak 1 %", world={"leak": 0.01}),
    Scenario(name="leak 3 %", world={"leak": 0.03}, power=0.15),
    Scenario(name="leak 10 %", world={"leak": 0.10}, power=0.25),
    Scenario(name="50 identities x 40 images", world={"identities": 50, "per_identity": 40}),
    Scenario(
        name="60 identities x 30, leak 3 %",
        world={"identities": 60, "per_identity": 30, "leak": 0.03},
        power=0.20,
    ),
    Scenario(name="5 % under two labels, leak 3 %", world={"label_noise": 0.05, "leak": 0.03}, power=0.10),
    Scenario(name="3 % of controls seen, leak 3 %", world={"contaminated": 0.03, "leak": 0.03}, power=0.10),
    Scenario(name="3 % of controls are members, 3 %", world={"shared": 0.03, "leak": 0.03}, power=0.10),
    Scenario(name="a quarter of controls, leak 10 %", world={"controls": 375, "leak": 0.10}, power=0.20),
    Scenario(name="4 images against 2", world={"images": (4, 2)}),
    Scenario(name="4 images against 2, capped at 2", world={"images": (4, 2)}, cap=2),
    Scenario(name="groups shifted", world=SHIFTED),
    Scenario(name="members' images poorer", world={"blur": (1.4, 1.0)}, excess=0.13),
    Scenario(name="... three times as poor", world={"blur": (3.0, 1.0)}, valid=False),
    Scenario(name="model trained on controls", world={"trained": "controls"}),
    Scenario(name="model trained on members", world={"trained": "members"}),
    Scenario(name="... and leak 3 %", world={"trained": "members", "leak": 0.03}, power=0.10),
    Scenario(name="groups and anchor shifted", world=SHIFTED_ANCHOR, valid=False),
    Scenario(name="... groups matched", world=SHIFTED_ANCHOR, match=True),
    Scenario(name="leak 40 %", world={"leak": 0.40, "identities": 900}, power=0.25),
)


class Trial(NamedTuple):
    """One replicate: which scenario, which repeat, at which size."""

    scenario: Scenario
    replicate: int
    persons: int


def run_selftest(quick: bool, out: Callable[[str], object] = print) -> dict[str, Any]:
    """Simulate all scenarios, write the table through `out`, a JSON line last, and return what it says.

    Keys: `passed`, `scenarios` (figures by scenario), `quick`, `seconds`. The environment variable QUICK=1 selects the
    quick run too. The full one uses two processes.
    """
    start = perf_counter()
    quick = quick or os.environ.get("QUICK") == "1"
    size = QUICK if quick else FULL
    out(
        f"{size.persons:,} members and as many controls unless said; {size.replicates} replicates; T = best cosine "
        f"with the release - with the anchor set, raw = without; excess: rejected at {LEVEL:g}; behind: and gate passed"
    )
    out(HEADER)
    figures: dict[str, dict[str, Any]] = {}
    trials = [Trial(one, number, size.persons) for one in SCENARIOS for number in range(size.replicates)]
    with _mapping(1 if quick else 2) as results:
        pairs = results(_both, trials)
        for scenario in SCENARIOS:
            made = [next(pairs) for _ in range(size.replicates)]
            figures[scenario.name] = _judge(scenario, [one for one, _ in made], [raw for _, raw in made], quick)
            out(_row(scenario.name, figures[scenario.name]))
        clean = Scenario(name=CLEAN)
        figures[CLEAN] = _judge_clean(results(_planted, [Trial(clean, n, size.persons) for n in range(size.clean)]))
    out(_clean_row(figures[CLEAN]))
    passed = all(one["ok"] for one in figures.values())
    report = {
        "selftest": "stats",
        "passed": passed,
        "quick": quick,
        "seconds": round(perf_counter() - start, 1),
        "scenarios": figures,
    }
    out(json.dumps(report))
    return report


@contextmanager
def _mapping(processes: int) -> Iterator[Callable[[Callable[[Trial], Any], Sequence[Trial]], Iterator[Any]]]:
    """`map`, in this process or in several; results come in the order of the trials."""
    if processes == 1:
        yield map
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"))
    try:
        yield lambda work, trials: pool.map(work, trials, chunksize=5)
    finally:
        pool.shutdown(cancel_futures=True)


def _seed(trial: Trial) -> tuple[int, int, int]:
    return (SEED, crc32(trial.scenario.name.encode()), trial.replicate)


def _both(trial: Trial) -> tuple[Outcome, Outcome]:
    """The audit of one world, and what it would have been without an anchor set."""
    scenario = trial.scenario
    world = draw(scenario.config(trial.persons), _seed(trial))
    shown, raw = (audit(world, raw=raw, cap=scenario.cap, match=scenario.match) for raw in (False, True))
    return shown, raw


def _planted(trial: Trial) -> tuple[float, int]:
    """Part of the planted near copies that are found at q = .05, and discoveries in the same world without them."""
    config = trial.scenario.config(trial.persons)
    planted = audit(draw(replace(config, copies=COPIES), _seed(trial)))
    return planted.power[0], audit(draw(config, _seed(trial))).discoveries[0]


def _judge(scenario: Scenario, made: Sequence[Outcome], raw: Sequence[Outcome], quick: bool) -> dict[str, Any]:
    """The figures of one scenario, and whether they keep its limits."""
    shares = np.array([one.false_share for one in made])
    power = np.array([one.power[-1] for one in made])
    rejects = np.array([one.excess_p <= LEVEL for one in made], float)
    fired = np.array([not one.gated.passed for one in made])
    tests = [_under(share, q) for share, q in zip(shares.T, QS, strict=True)] if scenario.valid else []
    limits = [f"FDR {LEVEL:g} and {QS[-1]:g}"] if scenario.valid else ["none: not repaired"]
    if scenario.null and scenario.valid:
        tests.append(_under(rejects, scenario.excess))
        limits.append(f"excess {scenario.excess:g}")
    if scenario.power and not quick:  # short lists are impossible with few persons, so power depends on their number
        tests.append(_under(-power, -scenario.power))
        limits.append(f"power >= {scenario.power:g}")
    return {
        "fdr_05": _mean(shares[:, 0]),
        "fdr_10": _mean(shares[:, 1]),
        "fdr_05_se": _error(shares[:, 0]),
        "fdr_10_se": _error(shares[:, 1]),
        "power_10": _mean(power),
        "excess": _mean(rejects),
        "gate_fires": _mean(fired),
        "excess_behind_gate": _mean(rejects * ~fired),
        "auc": _mean([one.auc for one in made]),
        "straddlers": _mean([one.straddlers for one in made]),
        "several_labels": _mean([one.several_labels for one in made]),
        "raw_fdr_10": _mean([one.false_share[-1] for one in raw]),
        "raw_power_10": _mean([one.power[-1] for one in raw]),
        "raw_excess": _mean([one.excess_p <= LEVEL for one in raw]),
        "replicates": len(made),
        "limits": ", ".join(limits),
        "ok": all(tests),
    }


def _judge_clean(results: Iterable[tuple[float, int]]) -> dict[str, Any]:
    """Whether near copies are found, and nothing is where they are taken out."""
    found, discoveries = zip(*results, strict=True)
    empty = sum(count == 0 for count in discoveries)
    return {
        "repeats": len(found),
        "found_mean": _mean(found),
        "found_least": round(min(found), 4),
        "clean_without_discovery": empty,
        "limits": f"found >= {FOUND_SHARE:g} in each, none in {CLEAN_SHARE:.0%} of the clean",
        "ok": min(found) >= FOUND_SHARE and empty >= CLEAN_SHARE * len(found) - 1e-9,
    }


def _under(values: Iterable[float], limit: float) -> bool:
    """Whether the mean is under `limit` but for `ERRORS` standard errors of the replicates."""
    known = np.asarray(list(values), float)
    return bool(known.mean() <= limit + ERRORS * _error(known) + 1e-12)


def _error(values: Iterable[float]) -> float:
    known = np.asarray(list(values), float)
    return round(float(known.std(ddof=1) / np.sqrt(len(known))), 5) if len(known) > 1 else 0.0


def _mean(values: Iterable[float]) -> float | None:
    """The mean to four digits; None (null in JSON) where nothing leaked, so that there is no power."""
    mean = float(np.mean(list(values)))
    return None if np.isnan(mean) else round(mean, 4)


COLUMNS = (
    ("FDR@.05", "fdr_05"),
    ("FDR@.10", "fdr_10"),
    ("power@.10", "power_10"),
    ("excess", "excess"),
    ("gate", "gate_fires"),
    ("behind", "excess_behind_gate"),
    ("raw FDR", "raw_fdr_10"),
    ("power", "raw_power_10"),
    ("excess", "raw_excess"),
)
HEADER = f"{'scenario':33}" + " ".join(f"{title:>9}" for title, _ in COLUMNS) + "  limits"


def _row(name: str, figures: Mapping[str, Any]) -> str:
    cells = " ".join("        -" if figures[key] is None else f"{figures[key]:9.3f}" for _, key in COLUMNS)
    return f"{name:33}{cells}  {'ok  ' if figures['ok'] else 'FAIL'} {figures['limits']}"


def _clean_row(figures: Mapping[str, Any]) -> str:
    return (
        f"{CLEAN:33}near copies found {figures['found_mean']:.3f} (least {figures['found_least']:.3f}); without them "
        f"no discovery in {figures['clean_without_discovery']} of {figures['repeats']}  "
        f"{'ok  ' if figures['ok'] else 'FAIL'} {figures['limits']}"
    )
