"""The self-test: a network that is fed otherwise than it was trained is found out, and the message names the mend."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from onnx import helper

from operators.backbones import BackboneConfig, OnnxBackbone, open_backbone
from operators.errors import ModelError
from operators.selftest import COMPONENTS, drawn_face, self_test_vector

OnnxFile = Callable[..., BackboneConfig]
MEANS = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)


def test_the_drawn_face_is_the_same_bits_everywhere_and_like_no_turned_or_swapped_one() -> None:
    face = drawn_face()
    assert (
        hashlib.sha256(face.tobytes()).hexdigest() == "7ad22fd4e5f62235af9e01b70dbc62df850a97f9f1273c0c103e1aeb9f364671"
    )
    assert drawn_face(150).shape == (150, 150, 3)
    for other in (face[:, ::-1], face[::-1], face[..., ::-1], face[..., [1, 0, 2]], face.transpose(1, 0, 2)):
        assert np.abs(face.astype(int) - other).mean() > 5


STATED = (0.096763, 0.064542, 0.10695, 0.03006, 0.213714, 0.095931, 0.085059, -0.093152)
"""Of SFace."""


@pytest.mark.parametrize("flip", [False, True])
def test_the_self_test_of_the_real_network_passes(backbone_config: BackboneConfig, flip: bool) -> None:
    backbone = open_backbone(replace(backbone_config, self_test=STATED, flip=flip, runtime="onnxruntime"))
    if not flip:
        np.testing.assert_allclose(self_test_vector(backbone), STATED, atol=5e-6)
    else:
        with pytest.raises(ValueError, match="without `flip`"):
            self_test_vector(backbone)


def test_the_self_test_vector_is_that_of_the_drawn_face(onnx_file: OnnxFile) -> None:
    found = self_test_vector(OnnxBackbone(onnx_file([MEANS])))
    means = drawn_face().astype(np.float64).mean(axis=(0, 1))
    expected = means / np.linalg.norm(means)
    assert found == pytest.approx(tuple(expected), abs=1e-6)
    assert all(type(value) is float and round(value, 6) == value for value in found)
    assert len(STATED) == COMPONENTS


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"channels": "bgr"}, r"Set embedder: channels to 'rgb'\.$"),
        ({"scale": 1 / 255}, r"Set embedder: scale to 1\.0\.$"),
        ({"mean": 127.5, "scale": 1 / 128}, r"Set embedder: mean to 0\.0 and scale to 1\.0\.$"),
        ({"channels": "bgr", "mean": 127.5, "scale": 1 / 127.5}, r"channels to 'rgb' and mean to 0\.0 and scale"),
    ],
    ids=["channels", "scale", "range", "both"],
)
def test_the_self_test_catches_wrong_input_and_names_the_remedy(
    backbone_config: BackboneConfig, wrong: dict, remedy: str
) -> None:
    config = replace(backbone_config, self_test=STATED, runtime="onnxruntime", **wrong)
    with pytest.raises(ModelError, match=remedy) as caught:
        open_backbone(config)
    assert str(caught.value).startswith(f"{config.path}: fails its self-test")


def test_a_self_test_of_another_model_names_the_file(backbone_config: BackboneConfig) -> None:
    config = replace(backbone_config, self_test=STATED[::-1], runtime="onnxruntime")
    with pytest.raises(ModelError, match="Give the file, sha256 and self_test of one and the same model"):
        open_backbone(config)


def test_a_self_test_that_is_not_finite_is_a_fault(onnx_file: OnnxFile) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("Sqrt", ["m"], ["y"]),
    ]
    negative = {"mean": 255.0, "self_test": (1.0,)}
    with pytest.raises(ModelError, match="the drawn face is not finite or is zero on onnxruntime"):
        open_backbone(onnx_file(nodes, runtime="onnxruntime", **negative))


def test_a_self_test_longer_than_the_embedding_is_refused(onnx_file: OnnxFile) -> None:
    with pytest.raises(ModelError, match="more components than the width 3"):
        open_backbone(onnx_file([MEANS], self_test=(0.5, 0.5, 0.5, 0.5)))
