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

from operators.backbones import (
    NO_ADDRESS,
    BackboneConfig,
    Mirrored,
    OnnxBackbone,
    address,
    open_backbone,
    open_model,
    pinned_bytes,
)
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
    with caplog.at_level(logging.INFO, logger="operators"):
        backbone = OnnxBackbone(onnx_file([MEANS], runtime="onnxruntime"))
    assert backbone.device in ("onnxruntime CPUExecutionProvider", "onnxruntime CUDAExecutionProvider")
    assert backbone.device in caplog.text
    assert backbone.reason in caplog.text
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


@pytest.mark.parametrize("fixed", [1, 2, 5])
def test_a_fixed_batch_is_used_whatever_is_configured(
    onnx_file: OnnxFile, fixed: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="operators.backbones"):
        backbone = OnnxBackbone(onnx_file([MEANS], takes=(fixed, 3, 112, 112), gives=(fixed, 3), batch=8))
    assert f"takes {fixed} faces per call, embedder.batch 8 is not used" in caplog.text
    assert backbone.batch == fixed
    np.testing.assert_allclose(backbone(colours(7)), colours(7).astype(np.float64).mean(axis=(1, 2)), rtol=1e-4)


def test_a_free_batch_is_the_configured_one(onnx_file: OnnxFile, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="operators.backbones"):
        assert OnnxBackbone(onnx_file([MEANS], batch=3)).batch == 3
    assert "is not used" not in caplog.text


def test_a_network_that_mixes_up_the_faces_of_a_batch_is_refused(onnx_file: OnnxFile) -> None:
    """It takes each face less the mean of its batch."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMean", ["means"], ["all"], axes=[0], keepdims=1),
        helper.make_node("Mul", ["all", "some"], ["part"]),
        helper.make_node("Sub", ["means", "part"], ["y"]),
    ]
    some = [numpy_helper.from_array(np.array(0.1, np.float32), "some")]
    with pytest.raises(ModelError, match=r"depends on the other faces of its batch.*Set embedder\.batch to 1"):
        OnnxBackbone(onnx_file(nodes, some))
    OnnxBackbone(onnx_file(nodes, some, batch=1))


@pytest.mark.parametrize("takes", [("N", 3, 96, 96), ("N", 112, 112, 3), ("N", 3)], ids=str)
def test_a_network_that_cannot_take_the_declared_batch_of_faces_is_refused_by_name(
    onnx_file: OnnxFile, takes: tuple[int | str, ...]
) -> None:
    node = MEANS if len(takes) == 4 else helper.make_node("Identity", ["x"], ["y"])
    config = onnx_file([node], takes=takes, gives=(takes[0], 3))
    with pytest.raises(ModelError, match=Path(config.path).name):
        OnnxBackbone(config)


def test_the_crop_has_the_size_of_the_alignment(onnx_file: OnnxFile) -> None:
    backbone = OnnxBackbone(onnx_file([MEANS], takes=("N", 3, 150, 150), alignment="dlib150"))
    given = np.random.default_rng(2).integers(0, 256, (3, 150, 150, 3), np.uint8)
    np.testing.assert_allclose(backbone(given), given.astype(np.float64).mean(axis=(1, 2)), rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"channels": "grb"}, "channels.*'grb'"), ({"batch": 0}, "at least 1"), ({"width": 0}, "at least 1")],
)
def test_impossible_configurations_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**wrong)


def test_two_sessions_give_the_same_bits(sface: OnnxBackbone, faces: np.ndarray) -> None:
    """The configuration of an open embedder names the runtime that was chosen."""
    assert sface.config.runtime != "auto"
    np.testing.assert_array_equal(OnnxBackbone(sface.config)(faces), sface(faces))


def unit(raw: np.ndarray) -> np.ndarray:
    raw = raw.astype(np.float64)
    return raw / np.linalg.norm(raw, axis=-1, keepdims=True)


SIDE = [
    helper.make_node("Slice", ["x", "start", "end", "axis"], ["left"]),
    helper.make_node("ReduceMean", ["left"], ["y"], axes=[2, 3], keepdims=0),
]
LEFT_HALF = [numpy_helper.from_array(np.array([v]), n) for n, v in (("start", 0), ("end", 56), ("axis", 3))]


def test_flip_gives_the_direction_of_the_sum_and_the_mean_of_the_lengths(onnx_file: OnnxFile) -> None:
    """The network gives the mean colours of the left half, so the mirrored face gives those of the right one."""
    found = open_backbone(onnx_file(SIDE, LEFT_HALF, flip=True, batch=2))(colours())
    halves = [colours()[:, :, part].astype(np.float64).mean(axis=(1, 2)) for part in (slice(56), slice(56, None))]
    np.testing.assert_allclose(unit(found), unit(unit(halves[0]) + unit(halves[1])), atol=1e-6)
    lengths = np.linalg.norm(halves, axis=2).mean(axis=0)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), lengths, rtol=1e-5)
    assert found.dtype == np.float32


def test_flip_of_the_real_network_does_not_tell_a_face_from_its_mirror_image(
    backbone_config: BackboneConfig, faces: np.ndarray
) -> None:
    flipped = open_backbone(replace(backbone_config, flip=True))
    np.testing.assert_allclose(flipped(faces), flipped(faces[:, :, ::-1]), atol=1e-5)
    assert flipped(faces[:0]).shape == (0, 128)


def test_flip_of_an_output_that_is_not_finite_is_not_finite(onnx_file: OnnxFile) -> None:
    nodes = [SIDE[0], helper.make_node("ReduceMean", ["left"], ["m"], axes=[2, 3], keepdims=0)]
    backbone = open_backbone(onnx_file([*nodes, helper.make_node("Div", ["m", "m"], ["y"])], LEFT_HALF, flip=True))
    given = np.full((1, 112, 112, 3), 9, np.uint8)
    given[:, :, 56:] = 0
    assert not np.isfinite(backbone(given)).any()


def test_flip_is_never_left_out_in_silence(onnx_file: OnnxFile) -> None:
    config = onnx_file([MEANS], flip=True)
    with pytest.raises(ValueError, match="open_backbone"):
        OnnxBackbone(config)
    backbone = open_backbone(config)
    assert isinstance(backbone, Mirrored)
    assert backbone.config == replace(config, runtime=backbone.plain.config.runtime)
    assert backbone.device
    assert backbone.reason


def test_the_address_has_what_an_embedding_depends_on_and_nothing_else() -> None:
    base = BackboneConfig()
    unrelated = {
        "path": "elsewhere.onnx",
        "name": "alias",
        "runtime": "onnxruntime",
        "self_test": (0.1,),
        "url": "somewhere",
        "licence": "some",
        "training_data": "some",
    }
    assert set(unrelated) == set(NO_ADDRESS)
    assert address(replace(base, **unrelated)) == address(base)
    assert address(replace(base, batch=32)) == address(base)
    changes = (
        {"sha256": "0"},
        {"backend": "torch"},
        {"architecture": "iresnet50"},
        {"width": 512},
        {"alignment": "dlib150"},
        {"channels": "bgr"},
        {"mean": 1.0},
        {"scale": 0.5},
        {"flip": True},
        {"dtype": "bfloat16"},
    )
    assert {name for change in changes for name in change} == set(address(base))
    for change in changes:
        assert address(replace(base, **change)) != address(base)
    torch = replace(base, backend="torch")
    assert address(replace(torch, compile=True)) == address(torch) | {"compile": True}


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"backend": "torch"}], ids=["bfloat16", "torch"])
def test_the_batch_is_part_of_the_address_where_it_is_not_known_to_change_nothing(other: dict) -> None:
    base = BackboneConfig(**other)
    assert address(replace(base, batch=32)) != address(base)
