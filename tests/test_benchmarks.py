"""Benchmarks that need a device which tests do not have: here they only show that they still run."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parent / "benchmarks" / "search_gpu.py"


class NumpyFaiss:
    """Stands in for faiss on a device."""

    dtypes = ("float16", "bfloat16")

    def hold(self, low_ND: np.ndarray, dtype: str) -> np.ndarray:
        return low_ND

    def search(self, held: np.ndarray, queries_QD: np.ndarray, k: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        scores = queries_QD @ held.T
        index = np.argsort(-scores, axis=1)[:, :k]
        return np.take_along_axis(scores, index, axis=1), index


def test_without_a_device_the_search_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TINY", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.startswith("no CUDA device: nothing is measured")


def test_the_search_benchmark_runs_in_a_tiny_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINY", "1")
    monkeypatch.setattr("operators.faiss_gpu.faiss_device", NumpyFaiss)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    ways = [tuple(line.split()[:2]) for line in lines]
    assert all((str(k), way) in ways for k in (1, 10, 100) for way in ("mixed", "both", "topk", "faiss"))
    figures = json.loads(lines[-1])
    assert figures["missed"] == 0 and figures["tiny"] and figures["device"] == "cpu"
    assert figures["tflops"] >= 0 and figures["fraction_of_matmul"] > 0
    assert figures["ratio_vs_faiss"] > 0 and figures["ratio_vs_topk"] > 0


def test_the_search_benchmark_needs_neither_ray_nor_arrow_nor_faiss() -> None:
    """It is to run on whatever machine has a device."""
    code = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(['ray', 'pyarrow', 'faiss', 'omegaconf', 'scipy'])); "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    environment = os.environ | {"TINY": "1", "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "faiss: not measured" in ran.stdout
    assert json.loads(ran.stdout.splitlines()[-1])["ratio_vs_faiss"] is None
