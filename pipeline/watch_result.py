"""What a finished audit comes to, in aggregates: for the ledger, the trend page and whoever is told.

No key, identity or path of an image is in it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from operators.tables import FINDINGS
from pipeline.config import AuditConfig
from pipeline.previous import about, compare, previous, told
from pipeline.stage import Run, fingerprint


def result_of(config: AuditConfig, look_state: Mapping[str, Any]) -> dict[str, Any]:
    """The result of the audit as it stands in its folder; its `id` is another if anything in it may be."""
    run = Run(config, alone=False)
    record, summary = (json.loads((run.folder / name).read_bytes()) for name in ("run.json", "summary.json"))
    evidence = summary.get("evidence") or {}
    limit, findings = summary["limit"], summary["findings"]
    excess = next(iter(evidence.get("excess") or ()), None)
    made = {
        "sets": {role: {name: one[name] for name in ("images", "audited")} for role, one in summary["sets"].items()},
        "comparisons": sum(arm["comparisons"] for arm in summary["arms"].values()),
        "threshold": summary["calibration"]["threshold"],
        "findings": findings,
        "grade": evidence.get("grade"),
        "claim": evidence.get("claim"),
        "listed": evidence.get("listed") if evidence.get("claim") else None,
        "excess": None if excess is None else {name: excess[name] for name in EXCESS},
        "limit": limit,
        "over": limit is not None and findings > limit,
    }
    basis = {name: value for name, value in look_state["basis"].items() if name != "program"}
    identity = fingerprint(made, basis, look_state["units"], run.commit("assess", "findings").sha256)
    return {"id": identity, **made, "changes": _changes(run, record, summary), "work": work(run.folder)}


EXCESS = ("alpha", "delta", "delta_low", "delta_high")


def _changes(run: Run, record: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """How many people are new, gone, moved and as before among the findings; None for a first audit."""
    then = previous(run)
    if then is None:
        return None
    now = about(record, summary)
    found = told(compare(then.findings, run.table("assess", "findings", FINDINGS)), then.about, now)
    kinds = ("new", "gone", "moved", "unchanged")
    return {"comparable": found["comparable"], **{kind: found["counts"][kind] for kind in kinds}}


def work(folder: Path) -> dict[str, int]:
    """Images embedded and comparisons made by the last run of each stage, beside those that a full audit has."""
    stages = json.loads((folder / "run.json").read_bytes())["stages"]
    embed = stages["embed"]
    done = {
        "images": embed["images"],
        "images_now": embed["embedded_now"] - embed.get("copied_now", 0),
        "comparisons": 0,
        "comparisons_now": 0,
    }
    for path in (folder / "run.json", *sorted(folder.glob("models/*/run.json"))):
        for facts in _searches(json.loads(path.read_bytes())["stages"].get("search", {})):
            done["comparisons"] += sum(facts["comparisons"].values())
            done["comparisons_now"] += facts["comparisons_now"]
    return done


def _searches(facts: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What was said of every comparison of sets."""
    if "comparisons_now" in facts:
        yield facts
        yield from (own for own in facts.values() if isinstance(own, Mapping) and "comparisons_now" in own)
