"""SIGKILLs of embed's workers: the tables are the same bytes, and a unit that ends every worker ends the run in words.

A worker that Ray's memory monitor, or the kernel, ends because memory ran out dies by the same signal.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml

from cluster.faults import ClusterError
from cluster.storage import ASIDE, MARKER
from operators.tables import UNITS
from pipeline.config import AuditConfig, load
from pipeline.embed import embed, unit_store
from pipeline.scan import scan
from pipeline.stage import Run
from pipeline.workers import MOST_ATTEMPTS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Stamps = dict[str, tuple[int, int]]
"""Inode and time of committed files by name."""


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Callable[..., AuditConfig]:
    """The configuration of an audit of noise, which `aligned` mode takes for faces; overrides are `key=value` texts."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for role, count in (("release", 72), ("training", 24)):
        (folder / role).mkdir()
        for at in range(count):
            pixels = rng.integers(0, 256, (112, 112, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(folder / role / f"{at:02d}.png", compress_level=0)
    values = {
        "sets": {role: {"uri": str(folder / role)} for role in ("release", "training")},
        "faces": {"mode": "aligned", "isolate": False},
        "embedder": {"path": str(root / "models" / "sface_2021dec.onnx"), "runtime": "onnxruntime"},
        "scan": {"unit_images": 8},
        "ray": {"cpus": 2, "object_store_mb": 256},
    }
    (folder / "audit.yaml").write_text(yaml.safe_dump(values))
    return lambda *overrides: load(str(folder / "audit.yaml"), overrides)


@pytest.fixture(scope="module")
def undisturbed(
    session: None, configured: Callable[..., AuditConfig], tmp_path_factory: pytest.TempPathFactory
) -> dict:
    with Run(configured(f"out={tmp_path_factory.mktemp('undisturbed')}/run")) as run:
        scan(run)
        embed(run)
        return tables(run)


def tables(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in unit_store(run).root.glob("*.parquet")}


def committed(run: Run) -> Stamps:
    """Of all units whose marker is there."""
    root, found = unit_store(run).root, {}
    for marker in root.glob(f"*{MARKER}"):
        about = (root / marker.name.replace(MARKER, ".parquet")).stat()
        found[marker.name] = (about.st_ino, about.st_mtime_ns)
    return found


def workers() -> dict[int, str]:
    """Processes and titles of the actors that Ray Data runs in the local session of this process."""
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        title = about(pid, "cmdline").split(b"\0")[0].decode()
        if title.startswith("ray::MapWorker") and parent(parent(pid)) == os.getpid():
            found[pid] = title
    return found


def about(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def parent(pid: int) -> int:
    found = re.search(rb"^PPid:\s+(\d+)$", about(pid, "status"), re.MULTILINE)
    return int(found[1]) if found else 0


@contextmanager
def beside(work: Callable[[Callable[[], bool]], None]) -> Iterator[None]:
    """Run `work` in a thread until the body ends, of which it is told; raise what it raises."""
    ended: list[bool] = []
    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(work, lambda: bool(ended))
        try:
            yield
        finally:
            ended.append(True)
            working.result()


def test_killed_workers_of_every_step_are_replaced(
    configured: Callable[..., AuditConfig], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Each worker that is there after the first commits is killed, those of both steps among them."""
    killed: list[int] = []
    before: Stamps = {}

    with Run(configured(f"out={tmp_path}/run", "embed.chain=steps")) as run:

        def kill(ended: Callable[[], bool]) -> None:
            while not ended() and len(committed(run)) < 2:
                time.sleep(0.005)
            before.update(committed(run))
            for pid in workers():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

        scan(run)
        with beside(kill):
            embed(run)
        assert len(killed) >= 3, "at least one worker that prepares, one that embeds, and one that commits"
        assert len(before) < len(undisturbed), "the kills must fall into the middle of the work"
        assert tables(run) == undisturbed
        assert committed(run).items() >= before.items(), "what was committed is left alone"
        assert not list(unit_store(run).root.glob(f"{ASIDE}*"))


def test_a_unit_that_ends_every_worker_ends_the_run_and_the_same_command_goes_on(
    configured: Callable[..., AuditConfig], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    deaths = 0
    with Run(configured(f"out={tmp_path}/run", "embed.encode.workers=1")) as run:
        scan(run)
        deadly = run.table("scan", "release", UNITS)["unit"][4].as_py()

        def kill(ended: Callable[[], bool]) -> None:
            nonlocal deaths
            trace = unit_store(run).root / f"{ASIDE}{deadly}-embed"
            while not ended():
                if trace.exists() and trace.stat().st_size > deaths:
                    (pid,) = workers()
                    os.kill(pid, signal.SIGKILL)
                    deaths += 1
                time.sleep(0.001)

        remedy = (
            rf"{MOST_ATTEMPTS} workers died .* unit {deadly}, .*memory.*scan\.unit_images.*run `unveil embed` again"
        )
        with beside(kill), pytest.raises(ClusterError, match=remedy):
            embed(run)
        assert deaths == MOST_ATTEMPTS
        kept = committed(run)
        assert f"{deadly}{MARKER}" not in kept and 0 < len(kept) < len(undisturbed)
        embed(run)
        assert tables(run) == undisturbed
        assert committed(run).items() >= kept.items()
