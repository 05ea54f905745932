"""The audit before this one: who is new among the findings, who is gone, and whether the two may be compared at all.

The run folder keeps the findings of the last two assessments that were reported (`report/latest`, `report/earlier`), so
that a report that is made again is compared with the assessment before, never with itself. `report.previous` names
another run folder instead.

    compare(then.findings, now.findings) -> one row per person (CHANGES)
    reasons(then.about, now.about)       -> why counts of the two do not show a change of the release
    told(changes, then, now)             -> what the report's page and `unveil watch` say
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cluster.faults import IncompleteTable
from cluster.storage import Commit
from operators.errors import ConfigError
from operators.leakage import LISTED, person
from operators.tables import FINDINGS, Table
from pipeline.stage import Run, fingerprint

log = logging.getLogger(__name__)

ROWS_TOLD = 200
"""New, gone and moved persons that `told` gives; `changes.csv` has all."""
LATEST, EARLIER = "latest", "earlier"
NAMES = ("training_identity", "training_key", "release_identity", "release_key")
COMPARED = ("rank", "cosine", "q", "tier", "listed", "decision")
"""What of a finding stands beside its earlier value."""
SEEN = ("new", "moved", "gone", "unchanged")
OTHERWISE = frozenset(("path", "url", "licence", "training_data", "self_test", "batch", "runtime", "compile", "name"))
"""Options of a face model that its vectors do not depend on."""
ASIDE = frozenset(("detector", "isolate", "limits"))
"""Options of face preparation that do not change what an audited face is."""
ROLES = ("training", "control", "anchor", "placebo")

_TYPES: Mapping[str, pa.DataType] = {
    "rank": pa.int64(), "cosine": pa.float64(), "q": pa.float64(), "tier": pa.string(), "listed": pa.bool_(),
    "decision": pa.string(),
}  # fmt: skip
CHANGES = Table(
    name="changes",
    version=1,
    schema=pa.schema(
        [
            pa.field("change", pa.string()),  # new, moved (tier, decision or the list), gone, unchanged
            *(pa.field(name, pa.string()) for name in NAMES),  # now; of the earlier finding where it is gone
            *(pa.field(name, kind) for name, kind in _TYPES.items()),  # now; null where it is gone
            *(pa.field(f"previous_{name}", kind) for name, kind in _TYPES.items()),  # null where it is new
        ]
    ),
)


class Audit(NamedTuple):
    """What is compared of an audit."""

    findings: pa.Table
    """Rows of the FINDINGS contract."""
    about: Mapping[str, Any]
    """Of `about`."""


def compare(previous: pa.Table, findings: pa.Table) -> pa.Table:
    """One row per training person of either list under CHANGES: new, moved, gone, unchanged, each best first.

    A person is the training identity, or the training image where the set has no labels. Where one person has several
    labels, or several images and no label, the best of them names the finding: if another one is best the next time,
    the person counts as gone and new. A finding moved if its tier, its decision, or its place on or off the list is
    another; cosines, q-values and ranks may differ without that. The share q that a list allows is no move.

    Parameters
    ----------
    previous, findings
        Rows of the FINDINGS contract, best first.
    """
    then, now = _by_person(previous), _by_person(findings)
    rows = [_row(then.get(who), one) for who, one in now.items()]
    rows += [_row(one, None) for who, one in then.items() if who not in now]
    return CHANGES.from_rows(sorted(rows, key=lambda row: SEEN.index(row["change"])))


def reasons(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why findings of the two audits may differ although the release does not; empty where they are comparable."""
    found = []
    if _differ(then["model"], now["model"]) or then["models"] != now["models"]:
        found.append(f"the face models differ: {_named(then['models'])} then, {_named(now['models'])} now")
    if _differ(then["faces"], now["faces"]):
        found.append("faces were prepared in another way")
    for role in ROLES:
        if then["datasets"].get(role) != now["datasets"].get(role):
            found.append(f"the {role} set is another")
    if then["threshold"] != now["threshold"]:
        found.append(f"the threshold was cosine {then['threshold']:.4f} and is {now['threshold']:.4f}")
    if _differ(then["protocol"], now["protocol"]):
        found.append("options of the evidence for persons differ")
    if then["claim"] != now["claim"]:
        found.append("only one of the two may claim a list" if then["claim"] or now["claim"] else "the grade differs")
    return found


def _named(models: Sequence[str]) -> str:
    """Models as pages may name them: one can be the path of its file, and folders tell who works where."""
    return ", ".join(name.rpartition("/")[2] for name in models)


def told(changes: pa.Table, then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What the report says of the audit before.

    Returns
    -------
    `previous` (title, created, look: the digest of what was fixed beforehand), `comparable` with its `reasons`,
    `release` (`same`, `another` or `not known`), `counts` by kind of change, `unchanged` and `moved` as numbers, and
    at most `ROWS_TOLD` rows each of `new`, `gone` and `moves`; a row of `gone` has the values that the finding had.
    """
    why = reasons(then, now)
    counts = {kind: pc.sum(pc.equal(changes["change"], kind)).as_py() or 0 for kind in SEEN}
    listed = {
        name: pc.sum(changes[column]).as_py() or 0
        for name, column in (("listed", "listed"), ("listed_before", "previous_listed"))
    }
    releases = then["datasets"].get("release"), now["datasets"].get("release")
    release = "not known" if None in releases else "same" if releases[0] == releases[1] else "another"
    return {
        "previous": {name: then[name] for name in ("title", "created", "look")},
        "comparable": not why,
        "reasons": why,
        "release": release,
        "new": [_plain(row, "") for row in _first(changes, "new")],
        "gone": [_plain(row, "previous_") for row in _first(changes, "gone")],
        "moves": _first(changes, "moved"),
        "unchanged": counts["unchanged"],
        "moved": counts["moved"],
        "counts": counts | listed,
    }


def about(record: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """What decides whether two audits are comparable, from `run.json` and `summary.json`."""
    config, evidence = record["config"], summary.get("evidence")
    options, named = config["assess"], config.get("embedders") or []
    protocol = {name: options.get(name) for name in ("fmr", "controlled", "evidence", "calibration_images", "seed")}
    return {
        "title": summary["title"],
        "created": record["created"],
        "look": "" if evidence is None else evidence["frozen"]["digest"],
        "datasets": dict(record["datasets"]),
        "model": {name: value for name, value in config["embedder"].items() if name not in OTHERWISE},
        "models": [config["embedder"]["name"], *named[1:]],
        "faces": {name: value for name, value in config["faces"].items() if name not in ASIDE},
        "protocol": protocol,
        "threshold": summary["calibration"]["threshold"],
        "claim": evidence is not None and bool(evidence["claim"]),
    }


def keep(run: Run, key: str, now: Audit) -> None:
    """Keep the findings that are reported now, and those before them; `key` names the assessment.

    A kill between the two commits is healed by the next report: what was the latest is then still there.
    """
    store = run.store.child("report")
    made = store.find(LATEST)
    marker = fingerprint(key, run.commit("assess", "findings").sha256)
    if made is not None and made.key == marker:
        return
    if made is not None:
        store.commit(EARLIER, store.read(LATEST), contract=made.contract, key=made.key, facts=made.facts)
    store.commit(LATEST, now.findings, contract=FINDINGS.contract, key=marker, facts=dict(now.about))


def previous(run: Run) -> Audit | None:
    """The audit of `report.previous`, or the one that this folder held before; None for a first one.

    Raises
    ------
    ConfigError
        If `report.previous` names no audit.
    IncompleteTable
        If that audit is not finished, or its findings are of another version of Unveil.
    """
    named = run.config.report.previous
    folder = Path(named).expanduser()
    if named and folder.resolve() != run.folder.resolve():
        return _elsewhere(run, folder)
    store = run.store.child("report")
    made = store.find(EARLIER)
    if made is None or not _readable(made):
        return None
    return Audit(store.read(EARLIER), made.facts)


def _elsewhere(run: Run, folder: Path) -> Audit:
    """The audit in another run folder, as it was assessed last."""
    try:
        record, summary = (json.loads((folder / name).read_bytes()) for name in ("run.json", "summary.json"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"report.previous: {folder} holds no finished audit. Give the folder that an earlier `unveil run` had as "
            f"`out`."
        ) from error
    other = Run(replace(run.config, out=str(folder)))
    findings, made = other.table("assess", "findings", FINDINGS), other.commit("assess", "findings")
    kept = other.store.child("report").find(LATEST)
    if kept is not None and kept.sha256 == made.sha256:  # `run.json` may be of a later verb with other options
        return Audit(findings, kept.facts)
    try:
        return Audit(findings, about(record, summary))
    except (KeyError, TypeError, AttributeError) as error:
        raise IncompleteTable(
            f"{folder}: run.json or summary.json is of another version of Unveil. Run `unveil report` on it first."
        ) from error


def _readable(made: Commit) -> bool:
    if made.contract == FINDINGS.contract:
        return True
    log.info("report: the findings before follow %s and are not compared", made.contract)
    return False


def _by_person(findings: pa.Table) -> dict[str, dict[str, Any]]:
    """The first finding of every person."""
    rows = findings.select([*NAMES, *(name for name in COMPARED if name != "listed")]).to_pylist()
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        listed = str(row["decision"] or "").startswith(LISTED.partition(":")[0])
        found.setdefault(person(row["training_identity"], row["training_key"]), row | {"listed": listed})
    return found


def _row(then: dict[str, Any] | None, now: dict[str, Any] | None) -> dict[str, Any]:
    change = "new" if then is None else "gone" if now is None else "moved" if _moved(then, now) else "unchanged"
    names = {name: (now or then or {})[name] for name in NAMES}
    values = {name: None if now is None else now[name] for name in COMPARED}
    before = {f"previous_{name}": None if then is None else then[name] for name in COMPARED}
    return {"change": change, **names, **values, **before}


def _moved(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if (then["tier"], then["listed"]) != (now["tier"], now["listed"]):
        return True
    return not now["listed"] and then["decision"] != now["decision"]


def _first(changes: pa.Table, kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = changes.filter(pc.equal(changes["change"], kind)).slice(0, ROWS_TOLD).to_pylist()
    return rows


def _plain(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A row as a finding: its names, and its values of the audit that has it."""
    return {name: row[name] for name in NAMES} | {name: row[prefix + name] for name in COMPARED}


def _differ(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an option that both know has another value; one that a version added or dropped says nothing."""
    return any(then[name] != now[name] for name in then.keys() & now.keys())
