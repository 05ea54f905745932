"""What every stage works with: the run's folder, its tables, its record, and one Ray session when work needs it."""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.faults import IncompleteTable
from cluster.head_watch import head_watched
from cluster.nodes import Needed, check_nodes, head_address, spread
from cluster.run_lock import locked
from cluster.session import ray_session
from cluster.storage import Commit, private_folder
from operators.addresses import holds_secret
from operators.sources import absolute
from operators.tables import Table
from pipeline.ledger import Ledger, code_fingerprint
from pipeline.protection import protect, stores

if TYPE_CHECKING:
    from pipeline.config import AuditConfig


log = logging.getLogger(__name__)


class Run:
    """One audit in its folder.

    As a context manager it makes the folder, and holds the Ray session that the first busy stage starts. Outside one it
    only reads. With `alone`, the rule for all that commits tables, it also holds the folder against other processes.
    """

    def __init__(self, config: "AuditConfig", *, alone: bool = True) -> None:
        self.config, self._alone = config, alone
        self.folder = Path(config.out)
        self.store, self.embeddings = stores(config)
        self.ledger = Ledger(self.folder / "run.json", config)
        self._held = ExitStack()
        self._ray = False

    def __enter__(self) -> "Run":
        os.umask(0o077)
        private_folder(self.folder)
        with ExitStack() as held:  # lets go of what it holds if one of these refuses
            if self._alone:
                held.enter_context(locked(self.folder))
                self.ledger = Ledger(self.ledger.path, self.config)  # as the last holder left it
                self.store.sweep()
            held.enter_context(logged_to(self.folder / "unveil.log"))
            protect(self.store, self.embeddings)
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def ray(self) -> None:
        """Make sure that a Ray session is there, whose machines all see what they need; it ends with the run."""
        if not self._ray:
            self._held.enter_context(ray_session(self.config.ray))
            self._ray = True
            if self.config.ray.address:
                self._held.enter_context(head_watched(head_address(), _end))
            if self.config.ray.address or spread():
                check_nodes(self._needed())

    def _needed(self) -> Needed:
        """What the machines of a cluster must have in common with this one."""
        config = self.config
        files = {f"sets.{role}.uri": one.uri for role, one in config.sets.listed().items()}
        files |= {f"the model {one.name}": one.path for one in config.models()}
        if config.faces.mode == "detect":
            files["faces.detector"] = config.faces.detector
        local = {option: os.path.abspath(path) for option, path in files.items() if os.path.exists(path)}
        return Needed(code_fingerprint, {"out": self.store, "store": self.embeddings}, local)

    def table(self, stage: str, name: str, contract: Table) -> pa.Table:
        """A committed table of this run; IncompleteTable names the stage to run if it is not there."""
        made = self.commit(stage, name)
        if made.contract != contract.contract:
            raise IncompleteTable(
                f"{stage}/{name} follows {made.contract}, needed is {contract.contract}. Run {stage} again."
            )
        return contract.check(self.store.child(stage).read(name))

    def readable(self, units: pa.Table) -> pa.Table:
        """`units` (UNITS) for reading their images: with the addresses that are stored without their secrets whole.

        Such a table stays in memory and is never committed.
        """
        whole = {absolute(one.uri): one.uri for one in self.config.sets.listed().values() if holds_secret(one.uri)}
        if not whole:
            return units
        column = [whole.get(uri, uri) for uri in units["uri"].to_pylist()]
        return units.set_column(units.schema.get_field_index("uri"), "uri", pa.array(column, pa.string()))

    def commit(self, stage: str, name: str) -> Commit:
        """The marker of a table of this run."""
        made = self.store.child(stage).find(name)
        if made is None:
            raise IncompleteTable(
                f"{self.folder}: no {stage}/{name} table yet. Run `unveil {stage}` first, or `unveil run`."
            )
        return made

    def save(self, stage: str, name: str, contract: Table, table: pa.Table, *, key: str, **facts: Any) -> Commit:
        """Commit a table of this run under its contract."""
        return self.store.child(stage).commit(
            name, contract.check(table), contract=contract.contract, key=key, facts=facts
        )

    @contextmanager
    def timed(self, stage: str) -> Iterator[dict[str, Any]]:
        """Record a stage in the ledger: the facts put into the yielded dict, and its seconds."""
        facts: dict[str, Any] = {}
        start = time.monotonic()
        yield facts
        self.ledger.stage(stage, {**facts, "seconds": round(time.monotonic() - start, 2)})


def _end(why: str) -> None:
    """End the process as a refusal does: Ray, which cannot be shut down without its head, is about to do it in silence.

    Commits are whole at any moment, and the lock of the folder goes with the process.
    """
    log.critical("unveil: %s", why)
    logging.shutdown()
    os._exit(1)


class _LogFile(logging.FileHandler):
    """A log that loses lines where the disk is full, and neither ends the run nor writes tracebacks to the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Report an error of the program, as the base class does, and pass over one of the disk."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close without the lines that cannot be written."""
        with suppress(OSError):
            super().close()


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Append what the three packages log to a file, with times. Logs hold counts and places, never names or faces."""
    handler = _LogFile(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    loggers = [logging.getLogger(package) for package in ("operators", "cluster", "pipeline")]
    for one in loggers:
        one.addHandler(handler)
    try:
        yield
    finally:
        for one in loggers:
            one.removeHandler(handler)
        handler.close()


def fingerprint(*values: Any) -> str:
    """Digest of JSON-like values, 32 hex digits: the same values give the same digest on every machine."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
