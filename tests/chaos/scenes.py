"""What goes wrong in a round: each scene runs an audit, injects its faults, and says which were really injected."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from drivers import Driver, Ending
from invariants import MARKER, committed
from machines import ENVIRONMENT, Machines, kill, stop

POLL_S = 0.02


@dataclass
class Stage:
    """Where a round plays: the audit, its folder, the machines, and what was injected."""

    root: Path
    audit: Path
    out: Path
    rng: np.random.Generator
    machines: Machines
    environment: dict[str, str]
    overrides: tuple[str, ...] = ()
    hits: Counter[str] = field(default_factory=Counter)
    endings: list[Ending] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
    """Parts that this round itself damaged."""

    def driver(self, *more: str, out: Path | None = None) -> Driver:
        """Start an audit that joins the machines."""
        places = (f"out={out or self.out}", f"ray.address={self.machines.address}")
        return Driver(self.root, self.audit, (*self.overrides, *places, *more), {**ENVIRONMENT, **self.environment})

    def end(self, driver: Driver) -> Ending:
        """Wait for the driver, and note how it ended."""
        self.endings.append(driver.ended())
        return self.endings[-1]

    def moment(self, longest_s: float) -> float:
        return float(self.rng.uniform(0, longest_s))


WINDOWS = {
    "embedding worker": 1.5, "decoder": 1.5, "search actor": 2.0, "task": 0.03, "opening of models": 1.0, "worker": 6.0
}  # fmt: skip
"""Seconds after its first sight within which a process of a kind is hit."""


class Nemesis:
    """Hits processes of a running audit, each at a moment drawn beforehand."""

    def __init__(self, stage: Stage, driver: Driver, kinds: list[str]) -> None:
        self.stage, self.driver = stage, driver
        self.armed = [(kind, stage.moment(WINDOWS[kind.removeprefix("slow ")]), stage.moment(2.0)) for kind in kinds]
        self.threads: list[threading.Thread] = []
        self.last_decoder = 0.0

    def play(self) -> None:
        """Watch until the driver ends or all is done."""
        seen: dict[str, float] = {}
        while self.armed and not self.driver.over():
            for one in list(self.armed):
                kind, wait_s, pause_s = one
                targets = self.stage.machines.of(kind.removeprefix("slow "))
                if not targets:
                    continue
                begun = seen.setdefault(kind, time.monotonic())
                if time.monotonic() < begun + wait_s:
                    continue
                if self._hit(kind, int(self.stage.rng.choice(targets)), pause_s):
                    self.armed.remove(one)
                    seen.pop(kind)
            time.sleep(POLL_S)
        for thread in self.threads:
            thread.join()

    def _hit(self, kind: str, pid: int, pause_s: float) -> bool:
        if kind.startswith("slow "):
            thread = threading.Thread(target=self._slow, args=(kind, pid, 0.3 + pause_s))
            thread.start()
            self.threads.append(thread)
            return True
        if kind == "decoder":  # an image whose second child is ended from outside too becomes a row, by design
            if time.monotonic() < self.last_decoder + 1.5:
                return False
            self.last_decoder = time.monotonic()
        if kill(pid):
            self.stage.hits[kind] += 1
            return True
        return False

    def _slow(self, kind: str, pid: int, seconds: float) -> None:
        if stop(pid, seconds):
            self.stage.hits[kind] += 1


def workers(stage: Stage) -> None:
    """Several processes of one audit are killed or stand still for a while, and files of killed writers lie about."""
    pool = ["embedding worker", "decoder", "decoder", "search actor", "search actor", "task", "task", "slow worker"]
    count = int(stage.rng.integers(8, 14))
    kinds = ["opening of models", *(str(stage.rng.choice(pool)) for _ in range(count))]
    driver = stage.driver()
    litter = threading.Thread(target=_litter, args=(stage, driver, stage.moment(5.0)))
    litter.start()
    Nemesis(stage, driver, kinds).play()
    stage.end(driver)
    litter.join()


def _litter(stage: Stage, driver: Driver, after_s: float) -> None:
    """Leave what a writer leaves that is killed in the middle."""
    time.sleep(after_s)
    for folder in [stage.out / "search", *(stage.out / "store" / "embeddings").glob("*")]:
        if folder.is_dir() and not driver.over():
            (folder / f".aside-{os.urandom(8).hex()}").write_bytes(b"PAR1 and not more")
            stage.hits["torn aside file"] += 1


def drivers(stage: Stage) -> None:
    """The driver is killed several times; another one comes while it runs."""
    for _ in range(int(stage.rng.integers(3, 6))):
        driver = stage.driver()
        time.sleep(0.8 + stage.moment(8.0))
        if driver.kill():
            stage.hits["driver"] += 1
        stage.end(driver)
    driver = stage.driver()
    time.sleep(1.0 + stage.moment(4.0))
    if not driver.over():
        second = stage.driver()
        ending = second.ended()
        if ending.verdict == "refused" and f"in use by process {driver.pid} on " in ending.cause:
            stage.hits["second driver"] += 1
        elif ending.verdict != "done" or not driver.over():
            stage.endings.append(Ending(125, f"the second driver was not refused: {ending}"))
    stage.end(driver)


def shared_store(stage: Stage) -> None:
    """Two audits of the same sets in two folders, with one store, at the same time."""
    store = f"store={stage.out / 'store'}"
    other = stage.out.with_name(f"{stage.out.name}-other")
    both = [stage.driver(store), stage.driver(store, out=other)]
    for driver in both:
        stage.end(driver)
    stage.hits["second driver on the same store"] += 1


def damage(stage: Stage) -> None:
    """A committed part is damaged: a bit is flipped, its end is cut off, it is gone, or its marker is torn."""
    driver = stage.driver()
    if stage.rng.random() < 0.6:
        time.sleep(4.0 + stage.moment(6.0))
        stage.hits["driver"] += driver.kill()
    stage.end(driver)
    parts = [(marker, data) for marker, data, _ in committed(stage.out) if data.name != "sample.parquet"]
    if not parts:
        return
    folders = sorted({data.parent.name for _, data in parts})
    chosen = str(stage.rng.choice(folders))  # else tiles would be most of all
    parts = [one for one in parts if one[1].parent.name == chosen]
    marker, data = parts[int(stage.rng.integers(len(parts)))]
    way = str(stage.rng.choice(["flipped bit", "cut off", "part gone", "torn marker"]))
    _spoil(data if way != "torn marker" else marker, way, stage.rng)
    stage.damaged.append(data)
    stage.hits[way] += 1
    stage.end(stage.driver())


def _spoil(path: Path, way: str, rng: np.random.Generator) -> None:
    found = bytearray(path.read_bytes())
    if way == "part gone":
        path.unlink()
        return
    if way == "flipped bit":
        at = int(rng.integers(len(found)))
        found[at] ^= 1 << int(rng.integers(8))
    else:
        del found[int(rng.integers(len(found))) :]
    path.write_bytes(found)


def mend(stage: Stage) -> None:
    """Do what the refusal asks for: delete the damaged part."""
    for data in stage.damaged:
        data.unlink(missing_ok=True)
        data.with_name(data.name.removesuffix(".parquet") + MARKER).unlink(missing_ok=True)


def nodes(stage: Stage) -> None:
    """Whole machines with all their workers die; others join."""
    driver = stage.driver("embed.encode.workers=4", "search.shards.workers=4")
    first = 2.0 + stage.moment(6.0)
    time.sleep(first)
    for _ in range(2):
        left = stage.machines.nodes
        if driver.over() or not left:
            break
        node = left[int(stage.rng.integers(len(left)))]
        if stage.rng.random() < 0.3:
            if stop(stage.machines.pid(node), 1.0 + stage.moment(6.0)):
                stage.hits["slow machine"] += 1
        elif stage.machines.kill_node(node):
            stage.hits["machine"] += 1
            stage.machines.add()
        time.sleep(stage.moment(2.0))
    stage.end(driver)
    while len(stage.machines.nodes) < 2:
        stage.machines.add()


def head(stage: Stage) -> None:
    """The machine that the driver has joined dies, or the process that knows all machines."""
    driver = stage.driver()
    while not driver.over() and "joined the cluster" not in _log(stage):
        time.sleep(0.1)
    time.sleep(stage.moment(8.0))
    if not driver.over():
        stage.machines.kill_head()
        stage.hits["head"] += 1
    stage.end(driver)


def _log(stage: Stage) -> str:
    path = stage.out / "unveil.log"
    return path.read_text() if path.exists() else ""


def object_storage(stage: Stage, server: Any) -> None:
    """Requests to the object store fail, hang, or are answered in part."""
    driver = stage.driver()
    time.sleep(stage.moment(5.0))
    faults = []
    for _ in range(int(stage.rng.integers(5, 9))):
        time.sleep(stage.moment(1.0))
        if driver.over():
            break
        faults.append(_spoiled_request(stage, server))
    stage.end(driver)
    for fault, asked in faults:
        if fault.times < asked:
            kind = f"answer {fault.kind}" if isinstance(fault.kind, int) else f"connection: {fault.kind}"
            stage.hits[f"object storage, {kind}"] += 1
    server.proxy.faults.clear()
    server.proxy.asked.clear()
    server.proxy.headers.clear()


def _spoiled_request(stage: Stage, server: Any) -> tuple[Any, int]:
    from object_store import Fault

    kinds: list[int | str] = [500, 503, "drop", "cut", "short"]
    kind = 403 if stage.rng.random() < 0.06 else kinds[int(stage.rng.integers(len(kinds)))]
    method = "GET" if kind in ("cut", "short") else str(stage.rng.choice(["GET", "PUT", ""]))
    times = 1 if kind == 403 else int(stage.rng.choice([1, 2, 4, 10, 20]))
    fault = Fault(kind, method=method, path="/store", times=times, code="AccessDenied" if kind == 403 else "SlowDown")
    server.proxy.faults.append(fault)
    return fault, times


def disk_full(stage: Stage, needed_bytes: int) -> None:
    """The file system of the run folder is too small; it is enlarged afterwards."""
    size = int(needed_bytes * stage.rng.uniform(0.05, 0.9)) // 4096 * 4096
    mount(stage.out, f"size={size}")
    ending = stage.end(stage.driver())
    if ending.verdict != "done":
        stage.hits["disk full"] += 1
    mount(stage.out, f"remount,size={20 * needed_bytes}")


def mount(folder: Path, options: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"{options},mode=0700", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


HOG = """
import sys, time
import numpy as np
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
held = []
try:
    while True:
        held.append(ray.put(np.random.default_rng(len(held)).bytes(4 << 20)))
        print(len(held), flush=True)
except Exception as error:
    print("full", flush=True)
time.sleep(600)
"""


@contextmanager
def hog(stage: Stage) -> Iterator[Callable[[], int]]:
    """Another driver that fills the object store, and then the disk that it spills to."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOG, stage.machines.address],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        lines.extend(process.stdout)

    threading.Thread(target=read, daemon=True).start()
    try:
        yield lambda: len(lines)
    finally:
        process.kill()
        process.wait()


def full_object_store(stage: Stage) -> None:
    """Somebody else fills the shared memory of the machines, and the disk behind it, while the audit runs."""
    with hog(stage) as puts:
        while puts() < 15 + int(stage.moment(12)):
            time.sleep(0.05)
        driver = stage.driver()
        before = puts()
        stage.end(driver)
        if before >= 15:
            stage.hits["object store full"] += 1
