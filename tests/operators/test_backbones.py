"""Embedders: pinned files only, inputs as declared, and a face's embedding that depends on nothing but the face."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from operators.backbones import BackboneConfig, OnnxBackbone, open_model, pinned_bytes
from operators.errors import ModelError

OnnxFile = Callable[..., BackboneConfig]
MEANS = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)


@pytest.fixture(scope="module")
def sface(backbone_config: BackboneConfig) -> OnnxBackbone:
    return OnnxBackbone(backbone_config)


@pytest.fixture(scope="module")
def faces(portraits: list[np.ndarray]) -> np.ndarray:
    return np.stack([cv2.resize(portrait, (112, 112)) for portrait in portraits])


def colours(count: int = 5) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 112, 112, 3), np.uint8)


def external(name: str, file: Path) -> onnx.TensorProto:
    """Three ones that lie in another file."""
    file.write_bytes(np.ones(3, "<f4").tobytes())
    tensor = numpy_helper.from_array(np.ones(3, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file.name), ("offset", "0"), ("length", "12")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_embeddings_are_those_of_opencvs_recogniser(
    sface: OnnxBackbone, backbone_config: BackboneConfig, faces: np.ndarray
) -> None:
    recogniser = cv2.FaceRecognizerSF.create(backbone_config.path, "")
    theirs = np.stack([recogniser.feature(np.ascontiguousarray(face[:, :, ::-1])).ravel().copy() for face in faces])
    ours = sface(faces)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    "order", [np.arange(12)[::-1], np.random.default_rng(1).permutation(12)], ids=["back", "mixed"]
)
def test_an_embedding_does_not_depend_on_its_neighbours_or_its_place(
    sface: OnnxBackbone, faces: np.ndarray, order: np.ndarray
) -> None:
    np.testing.assert_array_equal(sface(faces[order]), sface(faces)[order])


@pytest.mark.parametrize("cuts", [[1], [5], [8], [3, 4, 11], list(range(1, 12))], ids=str)
def test_an_embedding_does_not_depend_on_how_a_unit_is_cut(
    sface: OnnxBackbone, faces: np.ndarray, cuts: list[int]
) -> None:
    parts = np.concatenate([sface(part) for part in np.split(faces, cuts)])
    np.testing.assert_array_equal(parts, sface(faces))


@pytest.mark.parametrize("batch", [1, 5, 32])
def test_another_batch_size_gives_the_same_embeddings_up_to_rounding(
    sface: OnnxBackbone, backbone_config: BackboneConfig, faces: np.ndarray, batch: int
) -> None:
    np.testing.assert_allclose(OnnxBackbone(replace(backbone_config, batch=batch))(faces), sface(faces), atol=1e-4)


def test_every_call_of_the_network_has_the_declared_batch(onnx_file: OnnxFile) -> None:
    """The network adds the number of faces that it was given."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["count"]),
        helper.make_node("Cast", ["count"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["means", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "number"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(np.array(0), "first"),
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
    ]
    backbone = OnnxBackbone(onnx_file(nodes, weights, batch=4))
    assert (backbone(colours(6)) == 4).all()
    assert backbone(colours(6)).shape == (6, 3)


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (127.5, 1 / 127.5), (127.5, 0.0078125), (-3.0, 2.0)])
def test_colours_arrive_in_the_declared_order_and_range(
    onnx_file: OnnxFile, channels: str, mean: float, scale: float
) -> None:
    backbone = OnnxBackbone(onnx_file([MEANS], channels=channels, mean=mean, scale=scale))
    expected = (colours().astype(np.float64).mean(axis=(1, 2)) - mean) * scale
    np.testing.assert_allclose(
        backbone(colours()), expected[:, ::-1] if channels == "bgr" else expected, rtol=1e-4, atol=1e-4
    )


def test_rows_and_columns_are_not_swapped(onnx_file: OnnxFile) -> None:
    """The network gives the mean of each row of the picture."""
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[1, 3], keepdims=0)]
    backbone = OnnxBackbone(onnx_file(nodes, gives=("N", 112), width=112))
    np.testing.assert_allclose(backbone(colours()), colours().astype(np.float64).mean(axis=(2, 3)), rtol=1e-4)


def test_no_faces_give_no_embeddings(sface: OnnxBackbone) -> None:
    found = sface(np.zeros((0, 112, 112, 3), np.uint8))
    assert found.shape == (0, 128)
    assert found.dtype == np.float32


def test_the_faces_are_left_as_they_were(onnx_file: OnnxFile) -> None:
    given = colours()
    given.setflags(write=False)
    OnnxBackbone(onnx_file([MEANS], channels="bgr", mean=9.0))(given)
    np.testing.assert_array_equal(given, colours())


def test_the_device_is_stated_and_its_choice_is_logged(onnx_file: OnnxFile, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="operators.backbones"):
        backbone = OnnxBackbone(onnx_file([MEANS]))
    assert backbone.device in ("CPUExecutionProvider", "CUDAExecutionProvider")
    assert backbone.device in caplog.text
    assert "installed build offers" in caplog.text


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.onnx: model file cannot be read \(No such file.*`make setup`"):
        OnnxBackbone(BackboneConfig(path=str(tmp_path / "nowhere.onnx")))


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model file cannot be read"):
        OnnxBackbone(BackboneConfig(path=str(tmp_path)))


def test_a_file_with_one_other_byte_is_refused_with_both_digests(onnx_file: OnnxFile, tmp_path: Path) -> None:
    config = onnx_file([MEANS])
    altered = tmp_path / "altered.onnx"
    altered.write_bytes(Path(config.path).read_bytes()[:-1] + b"\0")
    found = hashlib.sha256(altered.read_bytes()).hexdigest()
    with pytest.raises(ModelError) as caught:
        OnnxBackbone(replace(config, path=str(altered)))
    assert str(caught.value).startswith(f"{altered}: SHA-256 is {found}, pinned is {config.sha256}.")
    assert "Restore the file, or pin the one you trust" in str(caught.value)


def test_pinned_bytes_are_the_files(onnx_file: OnnxFile) -> None:
    config = onnx_file([MEANS])
    assert pinned_bytes(config.path, config.sha256) == Path(config.path).read_bytes()


@pytest.mark.parametrize(
    "data", [b"", b"hello\n", b"\xff\xd8\xff" * 100, b"<html></html>"], ids=["empty", "text", "jpeg", "html"]
)
def test_a_file_that_is_no_network_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.onnx: "):
        open_model(str(path), hashlib.sha256(data).hexdigest())


def test_a_network_with_unknown_operations_is_refused_by_name(onnx_file: OnnxFile) -> None:
    config = onnx_file([helper.make_node("Enchant", ["x"], ["y"])])
    with pytest.raises(ModelError, match=f"{Path(config.path).name}: ONNX Runtime cannot run this model"):
        open_model(config.path, config.sha256)


ADD = [
    helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0),
    helper.make_node("Add", ["m", "w"], ["y"]),
]


def test_weights_in_another_file_are_refused(onnx_file: OnnxFile, tmp_path: Path) -> None:
    config = onnx_file(ADD, [external("w", tmp_path / "w.bin")])
    with pytest.raises(ModelError, match="keeps weights in other files, which are not pinned"):
        open_model(config.path, config.sha256)


def test_weights_in_another_file_are_refused_in_branches_too(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime would read the file from the working folder, and whoever writes it decides the embeddings."""
    monkeypatch.chdir(tmp_path)
    weights = external("w", tmp_path / "w.bin")
    branches = [
        helper.make_graph(
            [helper.make_node("Identity", ["w"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, (3,))],
            [weights],
        )
        for name in ("yes", "no")
    ]
    nodes = [helper.make_node("If", ["always"], ["w2"], then_branch=branches[0], else_branch=branches[1])]
    nodes += [ADD[0], helper.make_node("Add", ["m", "w2"], ["y"])]
    config = onnx_file(nodes, [numpy_helper.from_array(np.array(True), "always")])
    with pytest.raises(ModelError, match="keeps weights in other files"):
        open_model(config.path, config.sha256)


def test_weights_in_another_file_are_refused_in_constants_too(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = onnx_file([helper.make_node("Constant", [], ["w"], value=external("w", tmp_path / "w.bin")), *ADD])
    with pytest.raises(ModelError, match=Path(config.path).name):
        open_model(config.path, config.sha256)


def test_another_width_than_declared_is_refused_with_both(onnx_file: OnnxFile) -> None:
    config = onnx_file([MEANS], width=4)
    with pytest.raises(ModelError, match=r"\(8, 3\), declared is \(8, 4\)\. Set embedder\.width"):
        OnnxBackbone(config)


def test_a_network_of_one_fixed_batch_works_with_that_batch(onnx_file: OnnxFile) -> None:
    backbone = OnnxBackbone(onnx_file([MEANS], takes=(2, 3, 112, 112), gives=(2, 3), batch=2))
    np.testing.assert_allclose(backbone(colours()), colours().astype(np.float64).mean(axis=(1, 2)), rtol=1e-4)


@pytest.mark.parametrize("takes", [(1, 3, 112, 112), ("N", 3, 96, 96), ("N", 112, 112, 3), ("N", 3)], ids=str)
def test_a_network_that_cannot_take_the_declared_batch_of_faces_is_refused_by_name(
    onnx_file: OnnxFile, takes: tuple[int | str, ...]
) -> None:
    node = MEANS if len(takes) == 4 else helper.make_node("Identity", ["x"], ["y"])
    config = onnx_file([node], takes=takes, gives=(takes[0], 3))
    with pytest.raises(ModelError, match=Path(config.path).name):
        OnnxBackbone(config)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"channels": "grb"}, "channels.*'grb'"), ({"batch": 0}, "at least 1"), ({"width": 0}, "at least 1")],
)
def test_impossible_configurations_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**wrong)


def test_two_sessions_give_the_same_bits(
    sface: OnnxBackbone, backbone_config: BackboneConfig, faces: np.ndarray
) -> None:
    np.testing.assert_array_equal(OnnxBackbone(backbone_config)(faces), sface(faces))
