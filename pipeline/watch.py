"""watch: keep a list of audits current. Made to be started by a timer, often, and to do nothing most of the time.

    watchlist -> who is due -> look (new, changed, stale?) -> embed, search, assess, report -> ledger, trend, hooks

One process at a time works in a watch folder. A result is written down first, and told then; what was not told is told
by the next run. A killed run is repeated from where it was: stages find what is committed, the ledger what is written.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.faults import ClusterError, FolderInUse
from cluster.notices import NotifyConfig, deliver
from cluster.run_lock import locked
from cluster.schedules import due, interval, utc
from cluster.storage import private_folder
from operators.errors import AuditError
from pipeline.audit import audit
from pipeline.stage import fingerprint
from pipeline.trend import write_trend
from pipeline.watch_ledger import WatchLedger
from pipeline.watch_look import look
from pipeline.watch_result import result_of
from pipeline.watchlist import WatchConfig, WatchedAudit, audit_config, read_watchlist

log = logging.getLogger(__name__)

DONE, FAILED, OVER, BUSY = 0, 1, 2, 3
"""Exit codes: all is well; an audit failed or somebody could not be told; a limit is exceeded; another run is at it."""
REST = ("embed", "search", "assess", "report")
"""What follows the look, which has listed the sets."""
TRIES = 5
"""Runs that try to tell one result; a newer one ends it."""

AGAIN = "-"
"""Stands between the id of a result and its turn, where an earlier result was the same."""

Tell = Callable[[str], None]


def watch(path: str, overrides: Sequence[str], tell: Tell, now: datetime | None = None) -> int:
    """Audit what is due and not covered any more; return the exit code.

    Parameters
    ----------
    path, overrides
        The watchlist and changes to it.
    tell
        Takes one line of text for each thing that is done.
    now
        The time of this run; empty: the clock's.

    Raises
    ------
    ConfigError
        If the watchlist is wrong. What is wrong with one audit is that audit's failure.
    StorageError
        If the watch folder cannot be written.
    """
    config = read_watchlist(path, overrides)
    os.umask(0o077)
    folder = private_folder(Path(config.out))
    begun = now or datetime.now(UTC)
    try:
        with locked(folder):
            ledger = WatchLedger(folder)
            for one in config.audits:
                _keep_current(config, one, ledger, begun, tell)
            untold = [one.name for one in config.audits if not _told(config, one, ledger, tell)]
            write_trend(folder, config, ledger)
    except FolderInUse as error:
        tell(f"watch: {error}")
        return BUSY
    states = [ledger.state(one.name) for one in config.audits]
    if untold or any(state.get("failed") for state in states):
        return FAILED
    return OVER if any(state.get("over") for state in states) else DONE


def _keep_current(config: WatchConfig, one: WatchedAudit, ledger: WatchLedger, begun: datetime, tell: Tell) -> None:
    """Look at one audit if it is due, and run it if it must be; a failure becomes a line of the ledger."""
    state = ledger.state(one.name)
    every = interval(one.every or config.every)
    if not state.get("failed") and not due(state.get("looked"), every, begun):
        tell(f"{one.name}: looked at {state['looked']}, not due")
        return
    try:
        made = _audited(config, one, ledger, begun, tell)
    except (AuditError, ClusterError, OSError) as error:
        tell(f"{one.name}: failed: {error}")
        kind = type(error).__name__
        if state.get("failed") != kind:
            ledger.add("failed", utc(), one.name, {"error": kind, "message": str(error)})
        made = {**state, "failed": kind}
    ledger.keep(one.name, {**made, "looked": utc(begun)})


def _audited(
    config: WatchConfig, one: WatchedAudit, ledger: WatchLedger, begun: datetime, tell: Tell
) -> dict[str, Any]:
    """The state of an audit that is current now."""
    options, state = audit_config(config, one), ledger.state(one.name)
    seen = look(options, state.get("seen", {}), begun)
    reasons = seen.reasons or (["always: the watchlist says so"] if (one.when or config.when) == "always" else [])
    if not reasons:
        tell(f"{one.name}: unchanged")
        return {**state, "seen": seen.state, "failed": None}
    tell(f"{one.name}: {'; '.join(reasons)}")
    audit(options, *REST)
    made = result_of(options, seen.state)
    results = ledger.of(one.name, "result")
    if not results or results[-1]["id"].partition(AGAIN)[0] != made["id"]:
        made["id"] = turn(made["id"], results)
        ledger.add("result", utc(), one.name, {**made, "reasons": reasons})
    done = made["work"]
    tell(
        f"{one.name}: {done['images_now']:,} of {done['images']:,} images embedded, {done['comparisons_now']:,} of "
        f"{done['comparisons']:,} comparisons made; {made['findings']:,} people over the threshold"
        + (f", limit {made['limit']:,}" if made["limit"] is not None else "")
    )
    return {"seen": seen.state, "failed": None, "over": made["over"], "result": made["id"]}


def turn(made: str, results: Sequence[Mapping[str, Any]]) -> str:
    """The id of a result among the audit's `results`: one that comes back after others is news, and told as such."""
    before = sum(line["id"].partition(AGAIN)[0] == made for line in results)
    return f"{made}{AGAIN}{before + 1}" if before else made


def _told(config: WatchConfig, one: WatchedAudit, ledger: WatchLedger, tell: Tell) -> bool:
    """Tell of the newest result, and of a failure after it, that were not told yet; whether nothing is left to tell.

    A failure does not stand in for a result that nobody could be told: what comes after it may be the same result.
    """
    newest = ledger.of(one.name, "result", "failed")[-1:]
    failed = [line for line in newest if line["event"] == "failed"]
    options = one.notify or config.notify
    lines = [*ledger.of(one.name, "result")[-1:], *failed] if options else []
    told = [_line_told(options, line, ledger, one, tell) for line in lines]
    return all(told)


def _line_told(options: NotifyConfig, line: dict[str, Any], ledger: WatchLedger, one: WatchedAudit, tell: Tell) -> bool:
    """Tell of one line of the ledger unless it was told; whether it is told now."""
    payload = notice(line)
    tries = [line["event"] for line in ledger.of(one.name, "telling", "told") if line["id"] == payload["id"]]
    if "told" in tries:
        return True
    if len(tries) >= TRIES:
        tell(f"{one.name}: nobody could be told in {TRIES} runs; correct `notify`")
        return False
    ledger.add("telling", utc(), one.name, {"id": payload["id"]})
    return _delivered(options, payload, ledger, one.name, tell)


def _delivered(options: NotifyConfig, payload: dict[str, Any], ledger: WatchLedger, name: str, tell: Tell) -> bool:
    try:
        deliver(options, payload)
    except ClusterError as error:
        tell(f"{name}: {error}")
        return False
    ledger.add("told", utc(), name, {"id": payload["id"]})
    return True


def notice(line: dict[str, Any]) -> dict[str, Any]:
    """What a hook gets of a line of the ledger: aggregates only, and of a failure its kind."""
    kept = {name: value for name, value in line.items() if name != "message"}
    if line["event"] == "failed":
        kept["id"] = fingerprint(line)
    result: dict[str, Any] = json.loads(json.dumps(kept))
    return result
