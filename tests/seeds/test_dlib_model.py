"""dlib's network as ONNX computes what its layers do one by one, in PyTorch and without anything folded."""

import struct
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from operators.errors import ModelError
from seeds.dlib_format import Layer, Network, read_network
from seeds.dlib_model import network_graph
from seeds.face_models import OTHERS, shipped_file

(DLIB,) = OTHERS


@pytest.fixture(scope="module")
def content() -> bytes:
    return shipped_file(DLIB.shipped, DLIB.package).read_bytes()


@pytest.fixture(scope="module")
def network(content: bytes) -> Network:
    return read_network(content)


def run(network: Network, images: NDArray[np.float32]) -> NDArray[np.float32]:
    model = network_graph(network, name="test").SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(["embedding"], {"input": images})[0]


def residual(layers: Iterator[Layer], x: torch.Tensor, down: bool) -> torch.Tensor:
    """One block as dlib's example dnn_face_recognition_ex.cpp defines it, in fp64."""
    y = torch.relu(convolved(layers, x))
    next(layers)
    y = convolved(layers, y)
    if down:
        next(layers)
        x = functional.avg_pool2d(x, 2, 2)
    size = [max(a, b) for a, b in zip(x.shape, y.shape, strict=True)]
    total = torch.zeros(size, dtype=torch.float64)
    for part in (x, y):
        total[tuple(slice(n) for n in part.shape)] += part
    assert [next(layers).kind, next(layers).kind] == ["add_prev_", "relu_"]
    return torch.relu(total)


def convolved(layers: Iterator[Layer], x: torch.Tensor) -> torch.Tensor:
    layer, affine = next(layers), next(layers)
    assert (layer.kind, affine.kind) == ("con_4", "affine_")
    filters = int(np.prod(layer.windows[0]))
    parameters = torch.from_numpy(layer.parameters.astype(np.float64))
    weights = parameters[:filters].reshape(layer.windows[0])
    y = functional.conv2d(x, weights, parameters[filters:], stride=layer.numbers[3], padding=layer.numbers[5])
    gain, shift = torch.from_numpy(affine.parameters.astype(np.float64)).reshape(2, 1, -1, 1, 1)
    return y * gain + shift


def test_the_real_network_is_read_whole(network: Network) -> None:
    assert network.pixels == 150
    assert network.mean_rgb == pytest.approx((122.782, 117.001, 104.298), abs=1e-4)
    kinds = [layer.kind for layer in network.layers]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "con_4": 29,
        "affine_": 29,
        "relu_": 29,
        "add_prev_": 14,
        "avg_pool_2": 5,
        "max_pool_2": 1,
        "fc_2": 1,
    }


def test_the_graph_computes_what_the_layers_do(network: Network) -> None:
    images = np.random.default_rng(7).integers(0, 256, (3, 3, 150, 150)).astype(np.float32)
    layers = iter(network.layers)
    x = (torch.from_numpy(images).double() - torch.tensor(network.mean_rgb).double().reshape(3, 1, 1)) / 256
    x = torch.relu(convolved(layers, x))
    assert [next(layers).kind, next(layers).kind] == ["relu_", "max_pool_2"]
    x = functional.max_pool2d(x, 3, 2)
    for down in (0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1):
        x = residual(layers, x, bool(down))
    assert next(layers).kind == "avg_pool_2"
    expected = x.mean((2, 3)) @ torch.from_numpy(next(layers).parameters.reshape(256, 128)).double()
    assert list(layers) == []
    found = run(network, images)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)
    np.testing.assert_allclose(np.concatenate([run(network, image[None]) for image in images]), found, atol=1e-6)


def test_the_same_bytes_come_out_every_time(network: Network) -> None:
    made = [network_graph(network, name="test").SerializeToString(deterministic=True) for _ in range(2)]
    assert made[0] == made[1]


@pytest.mark.parametrize("end", [0, 1, 3, 20, 60, 310, 340, 400, 20_000, -1])
def test_a_file_that_ends_early_is_refused(content: bytes, end: int) -> None:
    with pytest.raises(ModelError, match="dlib network: ends at byte"):
        read_network(content[:end])


def test_bytes_left_over_are_refused(content: bytes) -> None:
    with pytest.raises(ModelError, match="dlib network"):
        read_network(content + b"\x00")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"loss_metric_2", b"loss_metric_3", "loss_metric_2 must stand where 'loss_metric_3' does"),
        (b"input_rgb_image_sized", b"input_rgb_image_sizes", "input_rgb_image_sized must stand where"),
        (b"con_4", b"con_9", r"layer 'con_9' at byte \d+ is not known; known are con_4, affine_"),
        (b"\x01\x96\x01\x96\x01\x05con_4", b"\x01\x96\x01\x95\x01\x05con_4", "150 x 149 pixels; only square inputs"),
        (b"con_4\x01\x02", b"con_4\x01\x07", r"no tensor of version 2 at byte \d+ \(7, "),
        (b"con_4\x01", b"con_4\x71", r"no integer at byte \d+ \(control byte 0x71\)"),
        (b"\x01\x05con_4", b"\x01\x7fcon_4", r"no layer name at byte \d+ \(length 127\)"),
        (b"\x03\x0a\xd7\xa3\x81\x1c", b"\x03\x0a\xd7\xa3\x02\x00\x7d", "is infinite or not a number"),
    ],
)
def test_other_files_are_refused(content: bytes, old: bytes, new: bytes, message: str) -> None:
    assert old in content
    with pytest.raises(ModelError, match=message):
        read_network(content.replace(old, new, 1))


def test_a_state_of_training_is_refused(content: bytes) -> None:
    empty = b"relu_110" + b"\x01\x02" + b"\x01\x00" * 4
    assert empty in content
    full = b"relu_110" + b"\x01\x02" + b"\x01\x01" * 4 + struct.pack("<f", 1.0)
    with pytest.raises(ModelError, match=r"layer 'relu_' at byte \d+ keeps a state of training"):
        read_network(content.replace(empty, full, 1))


def test_layers_that_do_not_follow_each_other_are_refused(network: Network) -> None:
    stem, affine, *rest = network.layers
    cases = {
        "must come in turn, found relu_": [stem, *rest],
        "must come in turn, found nothing": [stem],
        "must end in a fully connected layer": [stem, affine],
        "do not fit 3 channels": [replace(stem, windows=((32, 4, 7, 7),)), affine],
        "do not fit 32 channels": [stem, affine, stem, affine],
        "do not fit 3 x 128": [network.layers[-1]],
        "only square pooling": [Layer("max_pool_2", (3, 2, 2, 2, 0, 0))],
    }
    for message, layers in cases.items():
        with pytest.raises(ModelError, match=message):
            network_graph(replace(network, layers=tuple(layers)), name="test")
