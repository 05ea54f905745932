"""Files of weights: nothing in them runs, wrappers are taken off, and what is not plain weights is refused."""

import argparse
import collections
import hashlib
import io
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from operators import checkpoints
from operators.checkpoints import ADAFACE, ARCFACE, Checkpoint, load, require, units
from operators.errors import ModelError
from operators.iresnet import UNITS, build

State = dict[str, torch.Tensor]
Read = Callable[[bytes], Checkpoint]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """A function that writes a model file and loads it with its digest."""

    def write(data: bytes) -> Checkpoint:
        path = tmp_path / "model.bin"
        path.write_bytes(data)
        return load(str(path), hashlib.sha256(data).hexdigest())

    return write


def torch_file(held: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def weights() -> State:
    draw = torch.Generator().manual_seed(1)
    shapes = {"conv1.weight": (64, 3, 3, 3), "layer1.0.bn1.running_var": (64,), "fc.bias": (8,)}
    return {name: torch.rand(shape, generator=draw) for name, shape in shapes.items()}


def assert_same(found: Checkpoint, expected: State, layout: str = ARCFACE) -> None:
    assert found.layout == layout
    assert sorted(found.weights) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found.weights[name].numpy(), tensor.numpy())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older form"])
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_a_state_dict_is_read_as_it_is(read: Read, kind: Callable[..., Any], zipped: bool) -> None:
    assert_same(read(torch_file(kind(weights()), zipped)), weights())


def test_safetensors_are_read_as_they_are(read: Read) -> None:
    torch_form = pytest.importorskip("safetensors.torch")
    assert_same(read(torch_form.save(weights())), weights())
    half = {name: tensor.half() for name, tensor in weights().items()}
    assert_same(read(torch_form.save(half)), half)


def test_the_content_tells_the_form_and_the_name_does_not(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.onnx", "model"):
        data = torch_file(weights())
        (tmp_path / name).write_bytes(data)
        assert_same(load(str(tmp_path / name), hashlib.sha256(data).hexdigest()), weights())


@pytest.mark.parametrize("wrapper", ["module.", "model.", "backbone.", "model.net.", "module._orig_mod.model."])
def test_what_wrappers_put_in_front_of_names_is_taken_off(read: Read, wrapper: str) -> None:
    assert_same(read(torch_file({wrapper + name: tensor for name, tensor in weights().items()})), weights())


def test_lightnings_checkpoints_are_opened_and_what_training_alone_needs_is_left(read: Read) -> None:
    state = {f"model.{name}": tensor for name, tensor in weights().items()}
    state |= {"head.kernel": torch.ones(8, 5), "head.t": torch.zeros(1), "kernel": torch.ones(8, 5)}
    state |= {"model.bn1.num_batches_tracked": torch.tensor(9), "num_batches_tracked": torch.tensor(9)}
    whole = {"epoch": 25, "hyper_parameters": {"lr": 0.1}, "optimizer_states": [{"state": {}}], "state_dict": state}
    assert_same(read(torch_file(whole)), weights())


def test_a_name_that_only_begins_like_a_wrapper_is_kept(read: Read) -> None:
    odd = {"models.weight": torch.ones(1), "header.weight": torch.ones(1), "kernel_size": torch.ones(1)}
    assert_same(read(torch_file(odd)), odd)


def test_two_networks_in_one_file_are_refused(read: Read) -> None:
    both = {"model.fc.bias": torch.ones(2), "module.fc.bias": torch.zeros(2)}
    with pytest.raises(ModelError, match=r"two of its tensors are fc\.bias, one of them module\.fc\.bias"):
        read(torch_file(both))


class Attack:
    """Touches a file when it is unpickled without limits."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["zip", "older form", "bare pickle", "old bare pickle"])
def test_code_in_a_file_is_refused_and_does_not_run(read: Read, tmp_path: Path, form: str) -> None:
    target = tmp_path / "ran"
    attack = Attack(target)
    data = {
        "zip": lambda: torch_file(weights() | {"payload": attack}),
        "older form": lambda: torch_file(weights() | {"payload": attack}, zipped=False),
        "bare pickle": lambda: pickle.dumps(attack),
        "old bare pickle": lambda: pickle.dumps(attack, protocol=2),
    }[form]()
    with pytest.raises(ModelError, match="needs pickle, which can run code, so it is refused") as caught:
        read(data)
    assert "save_file(torch.load(FILE" in str(caught.value)
    assert "pin the new file" in str(caught.value)
    assert not target.exists()
    if "bare" in form:
        pickle.loads(data)
        assert target.exists(), "the attack would have worked"


def test_the_environment_cannot_lift_the_restriction(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ModelError, match="needs pickle"):
        read(torch_file({"payload": Attack(tmp_path / "ran")}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("held", "asked"),
    [
        ({"hyper_parameters": argparse.Namespace(lr=0.1), "state_dict": {}}, "argparse.Namespace"),
        (torch.nn.PReLU(3), "torch.nn.modules.activation.PReLU"),
    ],
    ids=["training settings", "whole module"],
)
def test_a_file_that_needs_pickle_is_refused_with_what_it_asks_for(read: Read, held: object, asked: str) -> None:
    with pytest.raises(ModelError, match=rf"it asks for {asked}\)\. Convert it once, where running code"):
        read(torch_file(held))


def test_the_advice_for_such_a_file_works(read: Read, tmp_path: Path) -> None:
    """The same calls as in the message."""
    torch_form = pytest.importorskip("safetensors.torch")
    held = {"hyper_parameters": argparse.Namespace(lr=0.1), "state_dict": weights()}
    assert "save_file(torch.load(FILE, map_location='cpu', weights_only=False)['state_dict'], NEW)" in (
        checkpoints.CONVERT
    )
    state = torch.load(io.BytesIO(torch_file(held)), map_location="cpu", weights_only=False)["state_dict"]
    torch_form.save_file(state, tmp_path / "new.safetensors")
    assert_same(read((tmp_path / "new.safetensors").read_bytes()), weights())


def test_a_program_of_torchscript_is_refused(read: Read) -> None:
    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        torch.jit.save(torch.jit.trace(Double(), torch.ones(1)), buffer)
    with pytest.raises(ModelError, match=r"model\.bin: PyTorch cannot read it \(.*TorchScript"):
        read(buffer.getvalue())


GOOD = torch_file(weights())
OLD = torch_file(weights(), zipped=False)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello\n",
        b"\xff\xd8\xff" * 100,
        b"<html></html>",
        b"PK\x03\x04",
        b"\x80",
        b"\x80\x02.",
        b"\x80\x02K\x01.",
        b"\x80\x02}q\x00X\x05\x00",
        GOOD[:200],
        GOOD[:-60],
        GOOD[: len(GOOD) // 2],
        OLD[:200],
        OLD[:-60],
    ],
)
def test_a_damaged_file_is_refused_by_name(read: Read, data: bytes) -> None:
    with pytest.raises(ModelError, match=r"model\.bin: "):
        read(data)


def test_files_with_some_wrong_bytes_are_refused_by_name_or_read(read: Read) -> None:
    draw = np.random.default_rng(2)
    refused = 0
    for good in (GOOD, OLD):
        for _ in range(150):
            data = bytearray(good)
            for at in draw.integers(0, min(len(data), 1500), 4):
                data[at] = draw.integers(256)
            try:
                read(bytes(data))
            except ModelError as error:
                refused += 1
                assert "model.bin: " in str(error)
    assert refused > 100


def test_a_damaged_safetensors_file_is_refused_by_name(read: Read) -> None:
    good = pytest.importorskip("safetensors.torch").save(weights())
    for data in (good[:-1], good[:40], good + b"\0", b"\x05\0\0\0\0\0\0\0{abc}", b"\xff" * 8 + b"{}"):
        with pytest.raises(ModelError, match=r"model\.bin: damaged safetensors file"):
            read(data)


def test_a_safetensors_file_without_the_package_names_it(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModelError, match=r"which is not installed.*pip install 'unveil\[safetensors\]'"):
        read(b"\x02\0\0\0\0\0\0\0{}")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({}, "holds no state dict but dict"),
        ({"state_dict": {}}, "holds no state dict"),
        (torch.ones(3), "holds no state dict but Tensor"),
        ([torch.ones(3)], "holds no state dict but list"),
        ({"fc.bias": [1.0, 2.0]}, r"'fc\.bias' is list, not a tensor of plain numbers"),
        ({"fc.bias": torch.ones(3).to_sparse()}, "not a tensor of plain numbers"),
        ({"fc.bias": torch.empty(3, device="meta")}, "not a tensor of plain numbers"),
        ({3: torch.ones(3)}, "3 is Tensor, not a tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused(read: Read, held: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(torch_file(held))


def test_a_missing_and_an_altered_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.pt: model file cannot be read"):
        load(str(tmp_path / "nowhere.pt"), "0" * 64)
    (tmp_path / "model.pt").write_bytes(GOOD)
    with pytest.raises(ModelError, match="SHA-256 is"):
        load(str(tmp_path / "model.pt"), "0" * 64)


def shapes_of(architecture: str, layout: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = build(architecture, 512, layout).state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if not name.endswith("num_batches_tracked")}


def adaface_shapes(counts: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of AdaFace's files, from its published layout."""
    shapes: dict[str, tuple[int, ...]] = {"input_layer.0.weight": (64, 3, 3, 3), "input_layer.2.weight": (64,)}
    norms = {"input_layer.1": 64, "output_layer.0": 512}
    number, inputs = 0, 64
    for channels, count in zip((64, 128, 256, 512), counts, strict=True):
        for _ in range(count):
            unit = f"body.{number}"
            norms |= {f"{unit}.res_layer.0": inputs, f"{unit}.res_layer.2": channels, f"{unit}.res_layer.5": channels}
            shapes |= {
                f"{unit}.res_layer.1.weight": (channels, inputs, 3, 3),
                f"{unit}.res_layer.3.weight": (channels,),
            }
            shapes |= {f"{unit}.res_layer.4.weight": (channels, channels, 3, 3)}
            if inputs != channels:
                shapes |= {f"{unit}.shortcut_layer.0.weight": (channels, inputs, 1, 1)}
                norms |= {f"{unit}.shortcut_layer.1": channels}
            number, inputs = number + 1, channels
    for name, channels in norms.items():
        shapes |= {f"{name}.{end}": (channels,) for end in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {"output_layer.3.weight": (512, 512 * 7 * 7), "output_layer.3.bias": (512,)}
    return shapes | {f"output_layer.4.{end}": (512,) for end in ("running_mean", "running_var")}


@pytest.mark.parametrize("architecture", UNITS)
def test_every_adaface_file_fits_its_network(read: Read, architecture: str) -> None:
    """Tensors of one repeated number keep the file small."""
    shapes = adaface_shapes(UNITS[architecture])
    state = {f"model.{name}": torch.full((), 0.5).expand(shape) for name, shape in shapes.items()}
    found = read(torch_file({"state_dict": state}))
    assert found.layout == ADAFACE
    assert units(found.weights) == UNITS[architecture]
    require("model.bin", found.weights, shapes_of(architecture, ADAFACE), "")
    assert (found.weights["features.weight"] == 1).all()
    assert (found.weights["features.bias"] == 0).all()
    with pytest.raises(ModelError, match=r"5 missing: layer1\.0\.downsample"):
        require("model.bin", found.weights, shapes_of(architecture, ARCFACE), "")


@pytest.mark.parametrize(
    ("extra", "unknown"),
    [
        ("body.1.res_layer.se_block.fc1.weight", "body.1.res_layer.se_block.fc1.weight"),
        ("body.8.res_layer.0.weight", "body.8.res_layer.0.weight"),
        ("body.1.res_layer.6.weight", "body.1.res_layer.6.weight"),
        ("output_layer.5.weight", "output_layer.5.weight"),
    ],
)
def test_adaface_names_without_a_place_stay_unknown(read: Read, extra: str, unknown: str) -> None:
    state = {name: torch.zeros(()).expand(shape) for name, shape in adaface_shapes((2, 2, 2, 2)).items()}
    found = read(torch_file(state | {extra: torch.ones(64)}))
    with pytest.raises(ModelError, match=f"1 unknown: {unknown}"):
        require("model.bin", found.weights, shapes_of("iresnet18", ADAFACE), "")


def test_adaface_units_after_a_gap_are_not_renumbered(read: Read) -> None:
    state = {name: torch.zeros(()).expand(shape) for name, shape in adaface_shapes((2, 2, 2, 2)).items()}
    found = read(torch_file({name: tensor for name, tensor in state.items() if not name.startswith("body.1.")}))
    assert units(found.weights) == (1, 0, 0, 0)
    assert "body.2.res_layer.1.weight" in found.weights


def test_weights_that_do_not_fit_are_listed_with_the_hint() -> None:
    given = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int8)} | {f"x{n}": torch.ones(1) for n in range(5)}
    with pytest.raises(ModelError) as caught:
        require("f.pt", given, {"a": (3,), "b": (2,), "c": (1,)}, "Do this.")
    assert str(caught.value) == (
        "f.pt: its weights do not fit. 1 missing: c; 5 unknown: x0, x1, x2, ...; "
        "2 of another kind: a is float32 (2,), needed are floats (3,), b is int8 (2,), needed are floats (2,). Do this."
    )


def test_weights_that_fit_pass() -> None:
    require("f.pt", {"a": torch.ones(3, dtype=torch.float16)}, {"a": (3,)}, "")


@pytest.mark.parametrize("architecture", UNITS)
def test_units_are_counted_from_names(architecture: str) -> None:
    assert units(shapes_of(architecture, ARCFACE)) == UNITS[architecture]
    assert units({"layer5.0.bn1.weight": 0, "fc.bias": 0}) == (0, 0, 0, 0)
