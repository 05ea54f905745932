"""The sizing lines of `plan`, against arithmetic by hand."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import AuditConfig
from pipeline.plan import plan

pytestmark = pytest.mark.usefixtures("short_trial")
Configured = Callable[..., AuditConfig]


@pytest.fixture(autouse=True)
def moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.plan.TRIAL_S", 0.0)


def lines(config: AuditConfig) -> dict[str, str]:
    shown = plan(config).split("# What would run\n")[1].splitlines()
    return {line[:20].strip(): line[20:].strip() for line in shown}


def numbers(text: str) -> list[float]:
    return [float(one.replace(",", "")) for one in re.findall(r"\d[\d,]*\.?\d*", text)]


def test_rate_workers_memory_and_time_of_the_embedding(configured: Configured, root: Path, corpus: Path) -> None:
    told = lines(configured("ray.cpus=4"))
    rate, prepare_ms, _, _, model_ms, models = numbers(told["embed rate"].replace("one core", ""))
    assert models == 1 and rate == pytest.approx(1000 / (prepare_ms + model_ms), rel=0.02)
    assert numbers(told["cores for a GPU"])[0] == pytest.approx(prepare_ms, abs=0.06)
    images = sum(len(list((corpus / role).rglob("*.jpg"))) for role in ("release", "training", "control", "anchor"))
    assert numbers(told["embed time"])[0] == pytest.approx(8 + images / (4 * rate), abs=1)
    size = os.path.getsize(root / "models" / "sface_2021dec.onnx") / 2**20
    workers, cores, allowed, cpus, gpus, memory = numbers(told["embed workers"])
    assert (workers, cores, allowed, cpus, gpus) == (5, 4, 64, 0.8, 0)  # 5 x 0.8 CPUs
    assert memory == pytest.approx(650 + 16 * 38 / 1024 + size, abs=1)
    assert "object store" not in told


def test_steps_of_their_own_are_sized_by_themselves(configured: Configured) -> None:
    told = lines(configured("embed.chain=steps", "embed.encode.workers=3", "ray.cpus=2", "scan.unit_images=1024"))
    assert numbers(told["prepare workers"])[:4] == [5, 2, 64, 0.4]
    assert numbers(told["embed workers"])[:4] == [3, 2, 3, 0.4]
    assert numbers(told["object store"]) == [2 * 3 * 38]  # units of 1,024 faces of 38 KiB


def test_what_cannot_be_tried_is_said_and_nothing_is_fetched(configured: Configured) -> None:
    told = lines(configured("embedder.path=gone.onnx", "embedder.url=https://nowhere.invalid/gone.onnx"))
    assert "gone.onnx" in told["embed rate"] and told["embed rate"].startswith("not known")
    assert "embed time" not in told and "search time" in told


def test_ready_embeddings_need_no_workers(configured: Configured, tmp_path: Path) -> None:
    for role in ("release", "training"):
        (tmp_path / role).mkdir()
        np.save(tmp_path / role / "embeddings.npy", np.ones((4, 128), np.float32))
    roles = [f"sets.{role}.uri={tmp_path}/{role}" for role in ("release", "training")]
    told = lines(configured(*roles, "sets.control=null", "sets.anchor=null"))
    assert not [name for name in told if name.startswith("embed ")] and "search memory" in told
