"""What every stage works with: the run's folder, its tables, its record, and one Ray session when work needs it."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.faults import IncompleteTable
from cluster.session import ray_session
from cluster.storage import Commit, Store, private_folder
from operators.tables import Table
from pipeline.ledger import Ledger

if TYPE_CHECKING:
    from pipeline.config import AuditConfig


class Run:
    """One audit in its folder.

    As a context manager it makes the folder, and holds the Ray session that the first busy stage starts. Outside one it
    only reads.
    """

    def __init__(self, config: "AuditConfig") -> None:
        self.config = config
        self.folder = Path(config.out)
        self.store = Store(self.folder)
        self.embeddings = Store(config.store or self.folder / "store").child("embeddings")
        self.ledger = Ledger(self.folder / "run.json", config)
        self._held = ExitStack()
        self._ray = False

    def __enter__(self) -> "Run":
        os.umask(0o077)
        private_folder(self.folder)
        self._held.enter_context(logged_to(self.folder / "unveil.log"))
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def ray(self) -> None:
        """Make sure that a Ray session is there; it ends with the run."""
        if not self._ray:
            self._held.enter_context(ray_session(self.config.ray))
            self._ray = True

    def table(self, stage: str, name: str, contract: Table) -> pa.Table:
        """A committed table of this run; IncompleteTable names the stage to run if it is not there."""
        made = self.commit(stage, name)
        if made.contract != contract.contract:
            raise IncompleteTable(
                f"{stage}/{name} follows {made.contract}, needed is {contract.contract}. Run {stage} again."
            )
        return contract.check(self.store.child(stage).read(name))

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


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Append what the three packages log to a file, with times. Logs hold counts and places, never names or faces."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
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
