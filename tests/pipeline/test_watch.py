"""A watched audit runs when something is new, changed or stale, costs what is new, and is told once."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cluster.faults import ClusterError
from cluster.run_lock import locked
from operators.errors import FormatError
from pipeline.audit import audit
from pipeline.stage import Run
from pipeline.watch import BUSY, DONE, FAILED, OVER, watch
from pipeline.watch_ledger import read_lines
from pipeline.watchlist import audit_config, read_watchlist

MONDAY = datetime(2030, 1, 7, 2, 0, tzinfo=UTC)
DAY = timedelta(days=1)
SIZES = {"release": 2000, "training": 900}
NEW = 20
"""One per cent of the release."""
OPTIONS = {
    "assess": {"controlled": False, "limit": 5, "blend_images": 0, "calibration_images": 300},
    "search": {"shards": {"workers": 1}, "block_images": 512, "shard_images": 512, "k": 5},
    "scan": {"unit_images": 64},
    "report": {"pairs": 0},
    "ray": {"cpus": 2, "object_store_mb": 256},
}


def name(role: str, at: int) -> str:
    """Keys that stand in no order, as releases with hashed names have them; eight images of a person."""
    return f"{hashlib.sha256(f'{role}{at}'.encode()).hexdigest()[:12]}/{at}.jpg"


def give(folder: Path, role: str, numbers: range, vectors: np.ndarray, file: str) -> None:
    folder = folder / "sets" / role
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{file}.npy", vectors)
    (folder / f"{file}.txt").write_text("\n".join(name(role, at) for at in numbers))


class World:
    """A watch folder with one audit of made-up vectors, some of the release near some of the training set."""

    def __init__(self, folder: Path, sizes: dict[str, int] = SIZES) -> None:
        self.folder, self.list, self.said = folder, folder / "watch.yaml", list[str]()
        rng = np.random.default_rng(0)
        made = {role: rng.standard_normal((size, 128)).astype(np.float32) for role, size in sizes.items()}
        near = made["training"][: sizes["release"] // 100]
        made["release"][::100] = near + 0.3 * rng.standard_normal(near.shape)
        self.new = made["release"][-NEW:]
        give(folder, "release", range(sizes["release"] - NEW), made["release"][:-NEW], "first")
        give(folder, "training", range(sizes["training"]), made["training"], "first")
        sets = {role: {"uri": f"{folder}/sets/{role}"} for role in sizes}
        (folder / "audit.yaml").write_text(yaml.safe_dump({"out": "-", "sets": sets, **OPTIONS}))
        told = [sys.executable, "-c", f"import sys; open({str(folder / 'told')!r}, 'a').write(sys.stdin.read())"]
        one = {"name": "made-up", "config": "audit.yaml", "overrides": []}
        self.given: dict[str, Any] = {"out": "watched", "audits": [one], "notify": {"command": told, "timeout_s": 60}}
        self.write()

    def write(self) -> None:
        self.list.write_text(yaml.safe_dump(self.given))

    def add(self) -> None:
        give(self.folder, "release", range(SIZES["release"] - NEW, SIZES["release"]), self.new, "second")

    def run(self, days: float = 0, *overrides: str) -> int:
        self.said.clear()
        return watch(str(self.list), overrides, self.said.append, MONDAY + days * DAY)

    def lines(self, *events: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.folder / "watched") if line["event"] in events]

    def told(self) -> list[dict[str, Any]]:
        path = self.folder / "told"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    settled(monkeypatch)
    return World(tmp_path)


def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are old enough to be trusted, and nobody works on the program."""
    monkeypatch.setattr("pipeline.known_files.YOUNG_NS", 0)
    monkeypatch.setattr("pipeline.watch_look.code_fingerprint", lambda: "as it is")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world of which only the listing is wanted."""
    settled(monkeypatch)
    return World(tmp_path, {"release": 100, "training": 50})


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, nothing may be audited, and no set listed by its content."""

    def stop() -> None:
        monkeypatch.setattr("pipeline.watch.audit", lambda *_: pytest.fail("nothing is to be audited"))
        monkeypatch.setattr("pipeline.watch_look.audit", lambda *_: pytest.fail("nothing is to be read"))

    return stop


def results(folder: Path) -> dict[str, bytes]:
    """Everything that an audit finds, but for what names the tiles that it was made from."""
    paths = [*folder.glob("assess/*.parquet"), *folder.glob("search/*.parquet"), folder / "summary.json"]
    aside = ("tile-", "layout", "coverage", "sample")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if not path.name.startswith(aside)}


@pytest.mark.ray
def test_one_per_cent_new_images_cost_three_per_cent_at_most_and_give_a_full_audit_byte_by_byte(
    session: None, world: World, idle: Callable[[], None], tmp_path: Path
) -> None:
    assert world.run(0) == OVER and world.said[0] == "made-up: new: it has no result yet"
    full = world.lines("result")[0]["work"]
    assert full["comparisons_now"] == full["comparisons"] == (SIZES["release"] - NEW) * SIZES["training"]
    world.add()
    assert world.run(1) == OVER
    assert "release, 1,980 images, now 2,000;" in world.said[0]
    first, second = world.lines("result")
    done = second["work"]
    assert done["comparisons_now"] == NEW * SIZES["training"] <= 0.03 * done["comparisons"]
    assert second["changes"]["comparable"] and second["changes"]["unchanged"] == first["findings"]
    assert second["changes"]["new"] == second["findings"] - first["findings"]
    config = audit_config(list_ := read_watchlist(str(world.list)), list_.audits[0])
    fresh = read_watchlist(str(world.list), [f"out={tmp_path}/fresh"])
    audit(audit_config(fresh, fresh.audits[0]))
    one, two = results(Path(config.out)), results(tmp_path / "fresh" / "made-up")
    assert two.items() <= one.items() and len(two) > 50
    for path in ("assess/findings.parquet", "assess/candidates.parquet", "summary.json"):
        assert path in two
    assert [line["id"] for line in world.told()] == [first["id"], second["id"]]
    told = json.dumps(world.told())
    assert not any(text in told for text in (name("release", 0), name("training", 0), str(tmp_path)))
    page = (tmp_path / "watched" / "trend.html").read_text()
    assert "Over the limit" in page and page.count("<polyline") == 2
    for path in ("ledger.jsonl", "state.json", "trend.html"):
        assert (tmp_path / "watched" / path).stat().st_mode & 0o777 == 0o600
    idle()
    assert world.run(1.5) == OVER and "not due" in world.said[0]
    assert world.run(2) == OVER and world.said == ["made-up: unchanged"]
    assert len(world.told()) == 2


def stages(monkeypatch: pytest.MonkeyPatch, *faults: Exception | None, ids: str = "1") -> list[tuple[str, ...]]:
    """Let audits only pretend; `faults` and `ids` come one after the other. Returns what was asked for."""
    asked: list[tuple[str, ...]] = []
    left, given = list(faults), list(ids)

    def pretend(config: Any, *names: str) -> None:
        asked.append(names)
        if left and (fault := left.pop(0)) is not None:
            raise fault

    result = {
        "findings": 3,
        "listed": None,
        "excess": None,
        "grade": None,
        "limit": 5,
        "over": False,
        "sets": {"release": {"images": 9, "audited": 8}},
        "changes": None,
        "work": {"images": 9, "images_now": 9, "comparisons": 1, "comparisons_now": 1},
    }
    monkeypatch.setattr("pipeline.watch.audit", pretend)
    made = lambda *_: {"id": "r" + (given.pop(0) if given[1:] else given[0]), **result}  # noqa: E731
    monkeypatch.setattr("pipeline.watch.result_of", made)
    return asked


def test_stale_audits_run_again_and_say_why(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stages(monkeypatch)
    assert small.run(0) == DONE and len(asked) == 1
    small.given["audits"][0]["overrides"].append("assess.seed=3")
    small.write()
    assert small.run(1) == DONE and small.said[0] == "made-up: stale: other options (assess.seed)"
    small.given["audits"][0]["overrides"].append(f"embedder.sha256={'ab' * 32}")
    small.write()
    assert small.run(2) == DONE and "stale: other weights of sface_2021dec" in small.said[0], small.said
    monkeypatch.setattr("pipeline.watch_look.__version__", "99.0")
    assert small.run(3) == DONE and small.said[0].endswith("this is 99.0")
    assert small.run(4) == DONE and small.said == ["made-up: unchanged"]
    assert small.run(5, "when=always") == DONE and "always" in small.said[0]
    assert len(asked) == 5 and len(small.lines("result")) == len(small.told()) == 1


def test_all_files_are_read_again_after_a_while(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stages(monkeypatch)
    monkeypatch.setattr("pipeline.known_files.stamp", lambda *_: "as before")  # a disk that changed bytes tells nobody
    small.run(0)
    path = small.folder / "sets" / "release" / "first.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert small.run(6) == DONE and small.said == ["made-up: unchanged"]
    assert small.run(7) == DONE and "changed: release" in small.said[0]
    path.write_bytes(data)
    assert small.run(400, "rehash_days=.inf") == DONE and small.said == ["made-up: unchanged"]


def test_a_failed_audit_stops_no_other_and_is_tried_again_by_the_next_run(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small.given["audits"][0]
    small.given["audits"].append({**first, "name": "second", "limit": 1})
    small.write()
    asked = stages(monkeypatch, FormatError("key 'secret.jpg' is wrong"), None, ClusterError("a disk is full"))
    assert small.run(0) == FAILED and len(asked) == 2 and "failed" in small.said[1]
    assert small.run(0) == FAILED and len(asked) == 3
    assert small.run(0) == DONE and len(asked) == 4
    assert [line["error"] for line in small.lines("failed")] == ["FormatError", "ClusterError"]
    assert "secret.jpg" not in json.dumps(small.told())
    assert [line["event"] for line in small.told() if line["audit"] == "made-up"] == ["failed", "failed", "result"]


def test_a_second_run_is_turned_away(small: World, tmp_path: Path) -> None:
    (tmp_path / "watched").mkdir()
    command = [sys.executable, "-c", "import sys, cluster.run_lock as r, pathlib; "]
    command[-1] += "c = r.locked(pathlib.Path(sys.argv[1])); c.__enter__(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([*command, str(tmp_path / "watched")], stdin=-1, stdout=-1, cwd=Path.cwd()) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert small.run(0) == BUSY and f"in use by process {holder.pid}" in small.said[0]
        holder.communicate()
    with locked(tmp_path / "watched"):
        assert not (tmp_path / "watched" / "ledger.jsonl").exists()


def test_what_could_not_be_told_is_told_by_the_next_run(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stages(monkeypatch)
    command = small.given["notify"]["command"]
    small.given["notify"]["command"] = ["false"]
    small.write()
    assert small.run(0) == FAILED and "false ended with exit code 1" in small.said[-1]
    small.given["notify"]["command"] = command
    small.write()
    assert small.run(0) == DONE and len(small.told()) == 1
    assert small.run(0) == DONE and len(small.told()) == 1
    assert [line["event"] for line in small.lines("telling", "told")] == ["telling", "telling", "told"]


def test_a_result_that_comes_back_is_told_again(small: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stages(monkeypatch, ids="1211221")
    assert [small.run(day, "when=always") for day in range(7)] == [DONE] * 7
    told = [line["id"] for line in small.told()]
    assert told == [line["id"] for line in small.lines("result")] == ["r1", "r2", "r1-2", "r2-2", "r1-3"]


def test_a_failure_does_not_stand_in_for_a_result_that_nobody_heard_of(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages(monkeypatch, None, ClusterError("the network is down"))
    deaf = ("when=always", "notify.command=[false-is-no-program]")
    assert [small.run(0, *deaf), small.run(1, *deaf), small.run(2)] == [FAILED, FAILED, DONE]
    assert [line["event"] for line in small.told()] == ["result", "failed"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(session: None, world: World, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "watch", str(world.list)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    killed = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=environment
    )
    embeddings, deadline = tmp_path / "watched" / "store" / "embeddings", time.monotonic() + 90
    while (
        not [path for path in embeddings.glob("*/*.commit.json") if path.parent.name != "listings"]
        and time.monotonic() < deadline
        and killed.poll() is None
    ):
        time.sleep(0.005)
    assert killed.poll() is None, "the run was to be killed in the middle of it"
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    done = [path for path in embeddings.glob("*/*.commit.json") if path.parent.name != "listings"]
    before = {path: path.stat().st_mtime_ns for path in done}
    assert before and not world.lines("result")
    assert world.run(0) == OVER
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(world.lines("result")) == len(world.told()) == 1
    with Run(audit_config(list_ := read_watchlist(str(world.list)), list_.audits[0]), alone=False) as run:
        assert run.ledger.record["stages"]["assess"]["findings"] == world.lines("result")[0]["findings"] >= 20
