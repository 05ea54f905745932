"""Faults in real processes, many times: every audit ends with the tables of an undisturbed one, or refuses and resumes.

    make chaos SEEDS=60          rounds with the seeds 0 to 59
    make chaos SEEDS=7,19        these rounds only, to repeat a failure
    SCENES=workers,damage        only these scenes

A round is one small audit in a fresh folder. Its seed chooses the scene (`scenes.py`), the faults and their moments.
Only faults that really struck are counted: a process that was alive and was killed, a request that was spoiled. After
every fault no committed part may have other bytes than its marker promises; then the same command is run again, without
a fault, at most twice. All tables must then have the SHA-256 of the undisturbed audit's.
"""

import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import invariants  # noqa: E402
import scenes  # noqa: E402
from machines import ENVIRONMENT, Machines  # noqa: E402
from object_store import BUCKET, object_store  # noqa: E402
from scenes import Stage  # noqa: E402
from small_audit import make_audit  # noqa: E402

CYCLE = (
    "workers", "drivers", "workers", "damage", "object_storage", "workers", "nodes", "workers", "disk_full",
    "damage", "drivers", "full_object_store", "workers", "object_storage", "workers", "shared_store", "nodes",
    "damage", "workers", "head",
)  # fmt: skip
"""The scene of seed n is the n-th, in a circle."""
RESUMES = 2


class Round(NamedTuple):
    """What came of one seed."""

    seed: int
    scene: str
    hits: Counter[str]
    outcome: str
    """`at once`, `resumed` after a kill, `refused` and then identical, `different`, or `failed`."""
    causes: list[str]
    problems: list[str]
    seconds: float


@dataclass
class Theatre:
    """What rounds share: the audit, its reference, an object store, and one cluster at a time."""

    folder: Path
    audit: Path
    server: Any
    held: dict[str, Machines] = field(default_factory=dict)
    reference: invariants.Digests = field(default_factory=dict)
    needed_bytes: int = 0
    mounts: bool = False

    def machines(self, scene: str) -> Machines:
        """The cluster for a scene; only one is kept at a time."""
        kind = {"nodes": "three", "full_object_store": "small"}.get(scene, "one")
        if kind not in self.held or not self.held[kind].well():
            self.close()
            self.held[kind] = self._made(kind)
        return self.held[kind]

    def _made(self, kind: str) -> Machines:
        if kind == "three":
            return Machines({"num_cpus": 1}, nodes=2)
        if kind == "small":
            spill = self.folder / "spill"
            if self.mounts:
                scenes.mount(spill, f"size={24 << 20}")
            return Machines({"object_store_memory": 80 << 20, "object_spilling_directory": str(spill)})
        return Machines({})

    def close(self) -> None:
        for machines in self.held.values():
            machines.close()
        if "small" in self.held:
            scenes.unmount(self.folder / "spill")
        self.held.clear()


def main() -> int:
    """Play all rounds; 0 if none failed."""
    logging.disable(logging.WARNING)
    os.environ.update(ENVIRONMENT)
    chosen = os.environ.get("SCENES", "").split(",") if os.environ.get("SCENES") else None
    seeds = [seed for seed in _seeds(os.environ.get("SEEDS", "20")) if chosen is None or scene_of(seed) in chosen]
    began, rounds, skipped = time.monotonic(), [], Counter[str]()
    with theatre() as stage:
        for seed in sorted(seeds, key=lambda seed: ("nodes", "full_object_store").count(scene_of(seed)) * 1000 + seed):
            if scene_of(seed) == "disk_full" and not stage.mounts:
                skipped["disk_full: no tmpfs can be mounted here"] += 1
                continue
            rounds.append(play(stage, seed))
            say(_line(rounds[-1]))
    say("\n".join(["", *_table(rounds), *(f"skipped {count} x {why}" for why, count in skipped.items())]))
    say(json.dumps(_summary(rounds, time.monotonic() - began)))
    return int(any(one.problems for one in rounds))


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _seeds(text: str) -> list[int]:
    return [int(one) for one in text.split(",") if one] if "," in text else list(range(int(text)))


def scene_of(seed: int) -> str:
    return CYCLE[seed % len(CYCLE)]


@contextmanager
def theatre() -> Iterator[Theatre]:
    """The audit, with its tables when nothing disturbs it."""
    with ExitStack() as held:
        folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=os.environ.get("CHAOS_FOLDER")))
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        server = held.enter_context(object_store())
        os.environ.update(server.environment)  # for the workers, who have it from their machine
        stage = Theatre(folder, make_audit(folder), server)
        held.callback(stage.close)
        stage.mounts = _can_mount(folder / "try")
        round_ = _stage(stage, 0, "workers", folder / "undisturbed")
        ending = round_.driver().ended()
        if ending.verdict != "done":
            raise SystemExit(f"the undisturbed audit failed:\n{ending.text}")
        stage.reference = invariants.digests(round_.out)
        files = [path for path in round_.out.rglob("*") if path.is_file()]
        stage.needed_bytes = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
        yield stage


def _can_mount(folder: Path) -> bool:
    try:
        scenes.mount(folder, "size=4096")
    except (OSError, scenes.subprocess.CalledProcessError):
        return False
    scenes.unmount(folder)
    return True


def _stage(stage: Theatre, seed: int, scene: str, out: Path) -> Stage:
    overrides = (f"store=s3://{BUCKET}/store",) if scene == "object_storage" else ()
    machines = stage.machines(scene)
    return Stage(ROOT, stage.audit, out, np.random.default_rng(seed), machines, stage.server.environment, overrides)


def play(stage: Theatre, seed: int) -> Round:
    """One audit with faults, and what came of it."""
    scene, began, out = scene_of(seed), time.monotonic(), stage.folder / f"round-{seed}"
    stage.server.clear()
    round_ = _stage(stage, seed, scene, out)
    try:
        _acts(stage)[scene](round_)
        problems = [f"half-written: {path}" for path in invariants.torn(out) if Path(path) not in round_.damaged]
        faulted = list(round_.endings)
        problems += _unnamed(round_)
        resumed = 0
        while (left := _wrong(stage, round_)) and resumed < RESUMES:
            scenes.mend(round_)
            round_.machines = stage.machines(scene)
            round_.end(round_.driver())
            resumed += 1
        problems += [f"{scene}: {one}" for one in left]
        problems += [f"ended with {one.code}: {one.text[-3000:]}" for one in round_.endings if one.verdict == "failed"]
        verdicts = {one.verdict for one in faulted}
        causes = [
            one.cause or one.text.strip().splitlines()[-1] for one in faulted if one.verdict in ("refused", "lost")
        ]
        outcome = "different" if left else "failed" if problems else "refused" if causes else "at once"
        if outcome == "at once" and ("killed" in verdicts or resumed):
            outcome = "resumed"
        return Round(seed, scene, round_.hits, outcome, causes, problems, time.monotonic() - began)
    finally:
        scenes.unmount(out) if scene == "disk_full" else None
        if not os.environ.get("CHAOS_FOLDER"):
            shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(f"{out.name}-other"), ignore_errors=True)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _acts(stage: Theatre) -> dict[str, Callable[[Stage], None]]:
    return {
        "workers": scenes.workers,
        "drivers": scenes.drivers,
        "shared_store": scenes.shared_store,
        "damage": scenes.damage,
        "nodes": scenes.nodes,
        "head": scenes.head,
        "disk_full": lambda one: scenes.disk_full(one, stage.needed_bytes),
        "full_object_store": scenes.full_object_store,
        "object_storage": lambda one: scenes.object_storage(one, stage.server),
    }


def _unnamed(round_: Stage) -> list[str]:
    """A refusal after damage must name the damaged part."""
    if not round_.damaged or round_.endings[-1].verdict != "refused":
        return []
    cause = round_.endings[-1].cause
    return [f"not named: {one} in {cause}" for one in round_.damaged if one.name.removesuffix(".parquet") not in cause]


def _wrong(stage: Theatre, round_: Stage) -> list[str]:
    """What differs from the undisturbed audit in the last state of a round."""
    if round_.endings[-1].verdict != "done":
        return [f"the last run ended as {round_.endings[-1].verdict}: {round_.endings[-1].text[-2000:]}"]
    reference = dict(stage.reference)
    found = invariants.digests(round_.out)
    if round_.overrides:
        found |= invariants.remote_digests(stage.server, BUCKET)
    if round_.damaged:  # a tile that is not needed any more is not made again
        reference, found = ({n: d for n, d in one.items() if "/tile-" not in n} for one in (reference, found))
    wrong = invariants.differences(found, reference) + invariants.torn(round_.out)
    other = round_.out.with_name(f"{round_.out.name}-other")
    if other.exists():
        found = invariants.digests(other) | {n: d for n, d in found.items() if n.startswith("store/")}
        wrong += invariants.differences(found, reference)
    spoiled = {one.name.removesuffix(".parquet").removeprefix("tile-") for one in round_.damaged}
    return wrong or [one for one in invariants.uncovered(round_.out) if one.split()[0] not in spoiled]


def _line(one: Round) -> str:
    hits = ", ".join(f"{count} {kind}" for kind, count in one.hits.items()) or "nothing"
    text = f"seed {one.seed:3d} {one.scene:17s} {one.seconds:5.1f} s  {one.outcome:9s} {hits}"
    return "\n    ".join([text, *(f"cause: {cause}" for cause in one.causes), *(f"PROBLEM: {p}" for p in one.problems)])


def _table(rounds: list[Round]) -> Iterator[str]:
    """Faults by kind, and what came of the rounds that they were in."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for one in rounds:
        for kind, count in one.hits.items():
            kinds[kind]["faults"] += count
            kinds[kind]["rounds"] += 1
            kinds[kind][one.outcome] += 1
    outcomes = ("at once", "resumed", "refused", "failed", "different")
    yield "| fault | injected | rounds | identical at once | identical after a kill and the same command | refused, then identical | failed | different |"  # noqa: E501
    yield "|---|" + "--:|" * 7
    for kind in sorted(kinds):
        own = kinds[kind]
        yield f"| {kind} | {own['faults']} | {own['rounds']} | " + " | ".join(str(own[o]) for o in outcomes) + " |"


def _summary(rounds: list[Round], seconds: float) -> dict[str, Any]:
    outcomes = Counter(one.outcome for one in rounds)
    return {
        "bench": "chaos",
        "rounds": len(rounds),
        "faults": sum(sum(one.hits.values()) for one in rounds),
        "kinds": len({kind for one in rounds for kind in one.hits}),
        "identical": outcomes["at once"],
        "resumed_then_identical": outcomes["resumed"],
        "refused_then_identical": outcomes["refused"],
        "failed": outcomes["failed"],
        "different": outcomes["different"],
        "seconds": round(seconds),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


if __name__ == "__main__":
    sys.exit(main())
