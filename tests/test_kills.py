"""Real SIGKILLs at random moments of a search: it ends with the same bytes, and no committed tile is searched again.

Killed are search actors, tasks that read, check and merge, and the process that drives the search. The moments are
drawn from fixed seeds, and counted in tiles or parts already committed plus a short delay.
"""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pytest
import yaml

from cluster.faults import ClusterError
from operators.records import embeddings
from operators.tables import REJECTS, UNITS
from operators.units import Member, unit_digest
from operators.vectors import normalise, to_arrow
from pipeline.config import AuditConfig, load
from pipeline.embed import closing_key, unit_store
from pipeline.search import search
from pipeline.stage import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
log = logging.getLogger(__name__)
T = TypeVar("T")

WIDTH, UNIT = 128, 16
SIZES = {"release": 192, "training": 192, "control": 96, "anchor": 32}
TILES = 12 * (12 + 6 + 2)
"""Every unit is a block or a shard of its own."""
ACTORS = 2
RESTARTS = 3
"""How often Ray starts a killed actor again: `cluster.resources.Resources.actor_options`."""
LONGEST_S = 0.02
"""Delay of a kill at most. A search makes a tile in a millisecond or two."""

Tables = dict[str, bytes]
"""Committed tables by file name."""
Stamps = dict[str, tuple[int, int]]
"""Inode and time of the files of every committed tile, by name."""


class Audit(NamedTuple):
    """A run with planted embeddings and no search yet, as a configuration file and its overrides."""

    file: Path
    overrides: tuple[str, ...]

    def config(self, *overrides: str) -> AuditConfig:
        return load(str(self.file), [*self.overrides, *overrides])

    @property
    def folder(self) -> Path:
        return Path(self.config().out) / "search"

    def search(self, actors: int = ACTORS) -> int:
        """Search in this process; return how many tiles it did."""
        with Run(self.config(f"search.shards.workers={actors}")) as run:
            search(run)
            done: int = run.ledger.record["stages"]["search"]["tiles_now"]
            return done

    def check(self, kills: list["Kill"], reference: Tables) -> None:
        """All tables are those of an undisturbed run, and what was committed before a kill was left alone."""
        assert tables(self.folder) == reference
        left = stamps(self.folder)
        for kill in kills:
            again = [name for name, stamp in kill.committed.items() if left[name] != stamp]
            assert not again, f"{len(again)} files of tiles were written again after a kill of {kill.title}"


class Kill(NamedTuple):
    """A SIGKILL that was sent."""

    title: str
    committed: Stamps


def plant(run: Run) -> None:
    """Commit made-up embeddings, a tenth of them failed, as if scan and embed had run."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((8, WIDTH))
    for role, count in SIZES.items():
        stored = normalise(centres[rng.integers(8, size=count)] + 0.4 * rng.standard_normal((count, WIDTH)))[0]
        ok = rng.random(count) >= 0.1
        rows = []
        for first in range(0, count, UNIT):
            span = slice(first, first + UNIT)
            unit = [Member(key=f"{i:03d}", identity=None, bytes=1, digest=f"{role}{i}") for i in range(count)[span]]
            plant_unit(run, unit, stored[span], ok[span])
            listed = [{"key": one.key, "bytes": one.bytes, "digest": one.digest} for one in unit]
            about = {"set": role, "uri": "-", "format": "folder", "unit": unit_digest(unit), "first_row": first}
            rows.append({**about, "members": listed})
        units = UNITS.from_rows(rows)
        run.save("scan", role, UNITS, units, key="test")
        run.save(
            "embed", role, REJECTS, REJECTS.from_rows([]), key=closing_key(run, units), status={"ok": int(ok.sum())}
        )


def plant_unit(run: Run, unit: list[Member], stored: np.ndarray, ok: np.ndarray) -> None:
    contract, name, keys = embeddings(WIDTH), unit_digest(unit), [one.key for one in unit]
    columns = {"key": pa.array(keys), "status": pa.array(np.where(ok, "ok", "no_face")), "vector": to_arrow(stored, ok)}
    empty = {field.name: pa.nulls(len(keys), field.type) for field in contract.schema}
    table = pa.table({**empty, **columns}).select(contract.schema.names).cast(contract.schema)
    facts = {"status": {"ok": int(ok.sum()), "no_face": int((~ok).sum())}, "device": "test"}
    unit_store(run).commit(name, table, contract=contract.contract, key=name, facts=facts)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    folder = tmp_path_factory.mktemp("planted")
    values = {
        "sets": {role: {"uri": str(folder / "sets" / role)} for role in SIZES},
        "store": str(folder / "store"),
        "embedder": {"width": WIDTH},
        "assess": {"controlled": False},  # one search, whose tiles are counted
        "search": {
            "floor": 0.4,
            "k": 9,
            "columns": 2,
            "engine": "faiss",
            "shard_images": UNIT,
            "block_images": UNIT,
            "certify": {"tiles": 80},
        },
        "ray": {"cpus": 2, "object_store_mb": 256},
    }
    (folder / "audit.yaml").write_text(yaml.safe_dump(values))
    audit = Audit(folder / "audit.yaml", (f"out={folder}/run",))
    with Run(audit.config()) as run:
        plant(run)
    return audit


@pytest.fixture(scope="module")
def reference(session: None, planted: Audit) -> Tables:
    """The tables of an undisturbed search."""
    audit = fresh(planted, planted.file.parent / "undisturbed")
    assert audit.search(actors=1) == TILES
    return tables(audit.folder)


@pytest.fixture
def audit(planted: Audit, tmp_path: Path) -> Audit:
    return fresh(planted, tmp_path / "run")


def fresh(planted: Audit, out: Path) -> Audit:
    for stage in ("scan", "embed"):
        shutil.copytree(planted.folder.parent / stage, out / stage)
    return Audit(planted.file, (f"out={out}",))


def tables(folder: Path) -> Tables:
    """All that a search commits but `sample`: which tiles are searched again depends on which are new."""
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet") if path.name != "sample.parquet"}


def markers(folder: Path) -> int:
    """How many tables are committed."""
    return sum(name.endswith(".commit.json") for name in os.listdir(folder)) if folder.exists() else 0


def stamps(folder: Path) -> Stamps:
    found = {}
    for marker in folder.glob("tile-*.commit.json"):
        for name in (marker.name, marker.name.replace(".commit.json", ".parquet")):
            about = (folder / name).stat()
            found[name] = (about.st_ino, about.st_mtime_ns)
    return found


def ray_workers(driver: int, title: str) -> list[int]:
    """The Ray processes of the local session of process `driver` whose title begins like this."""
    return [
        pid
        for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
        if about(pid, "cmdline").startswith(title.encode()) and parent(parent(pid)) == driver
    ]


def about(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def parent(pid: int) -> int:
    found = re.search(rb"^PPid:\s+(\d+)$", about(pid, "status"), re.MULTILINE)
    return int(found[1]) if found else 0


class Killer:
    """Kills Ray processes of this session while a search is under way in the same process."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.kills: list[Kill] = []
        self.ended = threading.Event()

    def during(self, work: Callable[[], T], kill: Callable[[], None]) -> T:
        """Run `kill` in a thread while `work` runs; raise what either raises."""
        with ThreadPoolExecutor(1) as thread:
            killing = thread.submit(kill)
            try:
                return work()
            finally:
                self.ended.set()
                killing.result()

    def wait(self, ready: Callable[[], T]) -> T:
        while not (found := ready()):
            assert not self.ended.is_set(), f"the search ended after {len(self.kills)} kills, before all were sent"
            time.sleep(0.001)
        return found

    def pause(self) -> None:
        time.sleep(self.rng.uniform(0, LONGEST_S))

    def kill(self, pid: int) -> None:
        kill = Kill(about(pid, "cmdline").split(b"\0")[0].decode(), stamps(self.folder))
        os.kill(pid, signal.SIGKILL)
        self.kills.append(kill)
        log.warning("killed %s after %d tiles", kill.title, len(kill.committed) // 2)

    def all_actors(self, waves: int, actors: int) -> None:
        """Kill every actor once in each wave, a little one after the other."""
        gone: set[int] = set()

        def alive() -> list[int]:
            return sorted(set(ray_workers(os.getpid(), "ray::ShardActor")) - gone)

        for wave in range(waves):
            least = self.rng.integers(wave * TILES, (wave + 1) * TILES) // (waves + 1)
            self.wait(lambda least=least: markers(self.folder) > least and len(alive()) == actors)
            for pid in self.rng.permutation(alive()).tolist():
                self.pause()
                self.kill(pid)
                gone.add(pid)

    def tasks(self, *titles: str) -> None:
        """Kill a process that works on each of these tasks."""
        for title in titles:
            self.pause()
            while True:
                (pid, *_) = self.wait(lambda title=title: ray_workers(os.getpid(), title))
                if about(pid, "cmdline").startswith(title.encode()):
                    break
            self.kill(pid)


@pytest.mark.parametrize("seed", [1])
def test_killed_actors_are_replaced(audit: Audit, reference: Tables, seed: int) -> None:
    """Every actor is killed as often as Ray starts it again."""
    killer = Killer(audit.folder, seed)
    assert killer.during(audit.search, lambda: killer.all_actors(RESTARTS, ACTORS)) == TILES
    assert len(killer.kills) == RESTARTS * ACTORS
    audit.check(killer.kills, reference)


@pytest.mark.parametrize("seed", [3])
def test_killed_tasks_are_done_again(audit: Audit, reference: Tables, seed: int) -> None:
    killer = Killer(audit.folder, seed)
    titles = ["ray::read_piece"] * 2 + ["ray::check_tile"] + ["ray::_merge"] * 2
    assert killer.during(audit.search, lambda: killer.tasks(*titles)) == TILES
    assert [kill.title for kill in killer.kills] == titles
    audit.check(killer.kills, reference)


@pytest.mark.parametrize("seed", [4])
def test_an_actor_that_dies_too_often_ends_the_search_and_the_same_command_goes_on(
    audit: Audit, reference: Tables, seed: int
) -> None:
    killer = Killer(audit.folder, seed)
    with pytest.raises(ClusterError, match=r"a worker process \(ShardActor\) died .* run the same command again"):
        killer.during(lambda: audit.search(actors=1), lambda: killer.all_actors(RESTARTS + 1, 1))
    committed = len(stamps(audit.folder)) // 2
    assert 0 < committed < TILES
    assert audit.search(actors=1) == TILES - committed
    audit.check(killer.kills, reference)


WAYS = [(True, False), (False, False), (False, True)]
"""Of each driver: whether it joins the session of the tests, and whether its whole process group is killed."""


class Driver:
    """`unveil search` in a process of its own, in a Ray session of its own or in that of the tests."""

    def __init__(self, audit: Audit, mark: str, *, joined: bool) -> None:
        import ray

        options = ["search.shards.workers=1"]
        options += [f"ray.address={ray.get_runtime_context().gcs_address}"] if joined else []
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "search", str(audit.file), *audit.overrides, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**environment, "UNVEIL_TEST": mark},
        )

    def wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not ready():
            assert self.process.poll() is None, f"the driver ended with {self.process.returncode} before its kill"
            assert time.monotonic() < deadline, "the driver does not get on"
            time.sleep(0.002)

    def kill(self, *, group: bool) -> None:
        """Kill the driver, and with `group` whatever it started that is still in its group."""
        (os.killpg if group else os.kill)(self.process.pid, signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """A mark in the environment of processes started with it; those are killed in the end."""
    yield str(tmp_path)
    for pid in marked(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    text = f"UNVEIL_TEST={mark}".encode()
    return [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if text in about(p, "environ").split(b"\0")]


@pytest.mark.parametrize("seed", [5])
def test_a_killed_driver_is_resumed_by_the_same_command(audit: Audit, reference: Tables, mark: str, seed: int) -> None:
    """Each is resumed at once, while actors of the killed one may still be at work."""
    rng = np.random.default_rng(seed)
    kills: list[Kill] = []
    others = set(ray_workers(os.getpid(), "ray::ShardActor"))
    for at, (joined, group) in enumerate(WAYS):
        before = markers(audit.folder)
        least = before + rng.integers(1, (len(reference) - before) // (len(WAYS) - at) + 1)
        driver = Driver(audit, mark, joined=joined)
        driver.wait(lambda least=least: markers(audit.folder) >= least)
        time.sleep(rng.uniform(0, LONGEST_S))
        kills.append(Kill(f"driver {at}", stamps(audit.folder)))
        driver.kill(group=group)
        log.warning("killed %s after %d tiles", kills[-1].title, len(kills[-1].committed) // 2)
    wait_for_orphans(mark, others)
    committed = len(stamps(audit.folder)) // 2
    assert audit.search() == TILES - committed
    audit.check(kills, reference)


def wait_for_orphans(mark: str, others: set[int]) -> None:
    """Workers of killed drivers end by themselves or have nothing left to do; those in `others` are not theirs."""
    deadline = time.monotonic() + 60
    while left := {pid: title for pid in marked(mark) if (title := busy(pid))}:
        assert time.monotonic() < deadline, f"workers of a killed driver are still at work: {sorted(left.values())}"
        time.sleep(0.05)
    while left := set(ray_workers(os.getpid(), "ray::ShardActor")) - others:
        assert time.monotonic() < deadline, f"{len(left)} actors of a killed driver live on in the session of the tests"
        time.sleep(0.05)


def busy(pid: int) -> str:
    """What a Ray worker process works on, or nothing if it waits or is something else."""
    title = about(pid, "cmdline").split(b"\0")[0].decode()
    return (
        title if title.startswith(("ray::ShardActor.tile", "ray::_merge", "ray::check_tile", "ray::read_piece")) else ""
    )
