"""The IResNet of ArcFace and AdaFace: the published network, other programs' numbers, and weights that fit or not.

No published weights are at hand: weights are random, with statistics that leave no normalisation neutral.
"""

import hashlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from operators import iresnet
from operators.backbones import BackboneConfig, open_backbone
from operators.checkpoints import ADAFACE, ARCFACE
from operators.errors import ModelError
from operators.iresnet import UNITS, TorchBackbone, build, filled

State = dict[str, torch.Tensor]
Saved = Callable[..., BackboneConfig]
WIDTH = 64
UNIT_PARTS = ("bn1", "conv1", "bn2", "prelu", "conv2", "bn3")
CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gpu" not in request.keywords:
        monkeypatch.setattr(iresnet, "usable_device", lambda: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A function that writes a state dict and gives the configuration of an embedder that has its weights."""
    folder = tmp_path_factory.mktemp("weights")

    def write(state: object, **fields: object) -> BackboneConfig:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        (folder / digest).write_bytes(buffer.getvalue())
        declared = {"architecture": "iresnet18", "width": WIDTH, "mean": 127.5, "scale": 1 / 127.5, "batch": 4} | fields
        return BackboneConfig(name="test", path=str(folder / digest), sha256=digest, backend="torch", **declared)

    return write


def randomised(architecture: str, layout: str, seed: int) -> State:
    """Weights by our names, such that signals neither vanish nor explode."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build(architecture, WIDTH, layout).state_dict().items()}
    draw = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1000)
            continue
        if len(shape) > 1:
            values = draw.standard_normal(shape, np.float32) * np.sqrt(1.5 / np.prod(shape[1:]))
        elif "prelu" in name:
            values = draw.uniform(-0.1, 0.5, shape)
        elif name.endswith(("running_var", "weight")):
            values = draw.uniform(0.5, 1.5, shape)
        else:
            values = draw.normal(0, 0.3, shape)
        state[name] = torch.from_numpy(np.asarray(values, np.float32))
    return state


@pytest.fixture(scope="module")
def arcface() -> State:
    return randomised("iresnet18", ARCFACE, 1)


@pytest.fixture(scope="module")
def adaface() -> State:
    """By AdaFace's names, whose last normalisation has no gain and no offset."""
    return adaface_named(randomised("iresnet18", ADAFACE, 2), UNITS["iresnet18"])


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (6, 112, 112, 3), np.uint8)


def adaface_named(state: State, counts: tuple[int, ...]) -> State:
    places = [f"layer{stage + 1}.{unit}" for stage, count in enumerate(counts) for unit in range(count)]
    names = {"conv1": "input_layer.0", "bn1": "input_layer.1", "prelu": "input_layer.2"}
    names |= {"bn2": "output_layer.0", "fc": "output_layer.3", "features": "output_layer.4"}
    for number, place in enumerate(places):
        names |= {f"{place}.{part}": f"body.{number}.res_layer.{at}" for at, part in enumerate(UNIT_PARTS)}
        names |= {f"{place}.downsample.{at}": f"body.{number}.shortcut_layer.{at}" for at in range(2)}
    renamed = {".".join((names[n.rpartition(".")[0]], n.rpartition(".")[2])): t for n, t in state.items()}
    return {n: t for n, t in renamed.items() if n not in ("output_layer.4.weight", "output_layer.4.bias")}


def published(state: State, planes_NCHW: np.ndarray, layout: str) -> np.ndarray:
    """Embeddings of an IResNet-18 in fp64, written from the papers with the names of their files."""
    s = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        gain, offset = s.get(f"{name}.weight"), s.get(f"{name}.bias")
        return F.batch_norm(x, s[f"{name}.running_mean"], s[f"{name}.running_var"], gain, offset, eps=1e-5)

    def unit(x: torch.Tensor, names: list[str], shortcut: str, stride: int) -> torch.Tensor:
        bn1, conv1, bn2, prelu, conv2, bn3 = names
        y = F.conv2d(norm(x, bn1), s[f"{conv1}.weight"], padding=1)
        y = F.prelu(norm(y, bn2), s[f"{prelu}.weight"])
        y = norm(F.conv2d(y, s[f"{conv2}.weight"], stride=stride, padding=1), bn3)
        if f"{shortcut}.0.weight" in s:
            return y + norm(F.conv2d(x, s[f"{shortcut}.0.weight"], stride=stride), f"{shortcut}.1")
        return y + x[:, :, ::stride, ::stride]

    ours = layout == ARCFACE
    stem = ("conv1", "bn1", "prelu") if ours else ("input_layer.0", "input_layer.1", "input_layer.2")
    x = F.conv2d(torch.from_numpy(planes_NCHW).double(), s[f"{stem[0]}.weight"], padding=1)
    x = F.prelu(norm(x, stem[1]), s[f"{stem[2]}.weight"])
    for number in range(8):
        place = f"layer{number // 2 + 1}.{number % 2}" if ours else f"body.{number}"
        names = [f"{place}.{part if ours else f'res_layer.{at}'}" for at, part in enumerate(UNIT_PARTS)]
        x = unit(x, names, f"{place}.downsample" if ours else f"{place}.shortcut_layer", 2 - number % 2)
    head, fc, features = ("bn2", "fc", "features") if ours else [f"output_layer.{at}" for at in (0, 3, 4)]
    return norm(F.linear(norm(x, head).flatten(1), s[f"{fc}.weight"], s[f"{fc}.bias"]), features).numpy()


def planes(faces_NHWC: np.ndarray, channels: str = "rgb") -> np.ndarray:
    ordered = faces_NHWC[..., ::-1] if channels == "bgr" else faces_NHWC
    return ((ordered.transpose(0, 3, 1, 2).astype(np.float64) - 127.5) / 127.5).astype(np.float32)


def cosines(left_ND: np.ndarray, right_ND: np.ndarray) -> np.ndarray:
    left_ND, right_ND = left_ND.astype(np.float64), right_ND.astype(np.float64)
    return (left_ND * right_ND).sum(1) / np.linalg.norm(left_ND, axis=1) / np.linalg.norm(right_ND, axis=1)


@pytest.mark.parametrize(
    ("architecture", "parameters_m", "multiplications_g"),
    [("iresnet18", 24.0, 2.6), ("iresnet34", 34.1, 4.5), ("iresnet50", 43.6, 6.3), ("iresnet100", 65.2, 12.1)],
)
def test_size_and_work_are_the_published_ones(architecture: str, parameters_m: float, multiplications_g: float) -> None:
    """Figures of InsightFace's model tables, for 112 x 112 pixels and 512 components."""
    with torch.device("meta"):
        network = build(architecture, 512).eval()
        with FlopCounterMode(display=False) as counter:
            shape = network(torch.empty(1, 3, 112, 112)).shape
    assert shape == (1, 512)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == parameters_m
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiplications_g, abs=0.06)


def test_names_and_shapes_are_those_of_insightfaces_files() -> None:
    with torch.device("meta"):
        state = build("iresnet100", 512).state_dict()
    expected = {
        "conv1.weight": (64, 3, 3, 3),
        "prelu.weight": (64,),
        "layer1.0.downsample.0.weight": (64, 64, 1, 1),
        "layer1.2.bn3.running_var": (64,),
        "layer2.0.bn1.weight": (64,),
        "layer2.0.bn2.weight": (128,),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer2.0.downsample.1.running_mean": (128,),
        "layer3.29.prelu.weight": (256,),
        "layer4.2.conv1.weight": (512, 512, 3, 3),
        "bn2.bias": (512,),
        "fc.weight": (512, 25088),
        "features.running_mean": (512,),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert "layer3.30.bn1.weight" not in state
    assert "layer1.1.downsample.0.weight" not in state


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("layout", [ARCFACE, ADAFACE])
def test_embeddings_are_those_of_the_published_network(
    request: pytest.FixtureRequest, saved: Saved, faces: np.ndarray, layout: str, channels: str
) -> None:
    state = request.getfixturevalue(layout)
    found = TorchBackbone(saved(state, channels=channels))(faces)
    expected = published(state, planes(faces, channels), layout)
    assert found.dtype == np.float32
    assert found.shape == (6, WIDTH)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert cosines(found, expected).min() > 1 - 1e-9


def test_onnx_runtime_gives_the_same_embeddings(saved: Saved, arcface: State, faces: np.ndarray) -> None:
    config = saved(arcface)
    buffer = io.BytesIO()
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "N"}, "y": {0: "N"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is old, but the new one needs another package
        torch.onnx.export(filled(config), (torch.zeros(1, 3, 112, 112),), buffer, dynamo=False, **names)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"x": planes(faces)})[0]
    ours = TorchBackbone(config)(faces)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
    assert cosines(ours, theirs).min() > 1 - 1e-9


def test_both_layouts_agree_where_their_networks_coincide(saved: Saved, arcface: State, faces: np.ndarray) -> None:
    """A 1 x 1 convolution with the identity matrix and stride 2 drops every other pixel, as AdaFace does."""
    channels = torch.ones(64)
    neutral = {"0.weight": torch.eye(64)[:, :, None, None], "1.weight": channels, "1.bias": 0 * channels}
    neutral |= {"1.running_mean": 0 * channels, "1.running_var": (1 - 1e-5) * channels}
    ours = arcface | {f"layer1.0.downsample.{name}": tensor for name, tensor in neutral.items()}
    ours |= {"features.weight": torch.ones(WIDTH), "features.bias": torch.zeros(WIDTH)}
    kept = {name: tensor for name, tensor in ours.items() if not name.startswith("layer1.0.downsample")}
    theirs = {f"model.{name}": tensor for name, tensor in adaface_named(kept, UNITS["iresnet18"]).items()}
    lightning = {"epoch": 3, "state_dict": theirs | {"head.kernel": torch.ones(WIDTH, 7)}}
    left, right = TorchBackbone(saved(ours))(faces), TorchBackbone(saved(lightning))(faces)
    np.testing.assert_allclose(left, right, atol=1e-5 * np.abs(left).max())


def test_an_embedding_depends_on_the_face_alone(saved: Saved, arcface: State, faces: np.ndarray) -> None:
    """Not on its neighbours, its place in a call or the padding; bit by bit."""
    backbone = TorchBackbone(saved(arcface))
    whole = backbone(faces)
    np.testing.assert_array_equal(backbone(faces[::-1]), whole[::-1])
    for cuts in ([1], [3, 4], [5]):
        parts = np.concatenate([backbone(part) for part in np.split(faces, cuts)])
        np.testing.assert_array_equal(parts, whole)
    np.testing.assert_array_equal(TorchBackbone(backbone.config)(faces), whole)


def test_another_batch_size_gives_the_same_embeddings_up_to_rounding(
    saved: Saved, arcface: State, faces: np.ndarray
) -> None:
    config = saved(arcface)
    one, many = TorchBackbone(replace(config, batch=1))(faces), TorchBackbone(replace(config, batch=5))(faces)
    np.testing.assert_allclose(one, many, atol=1e-5 * np.abs(one).max())


def test_no_faces_give_no_embeddings(saved: Saved, arcface: State) -> None:
    found = TorchBackbone(saved(arcface))(np.zeros((0, 112, 112, 3), np.uint8))
    assert found.shape == (0, WIDTH)
    assert found.dtype == np.float32


def test_the_faces_are_left_as_they_were(saved: Saved, arcface: State, faces: np.ndarray) -> None:
    given = faces.copy()
    given.setflags(write=False)
    TorchBackbone(saved(arcface, channels="bgr"))(given)
    np.testing.assert_array_equal(given, faces)


def test_bfloat16_gives_nearly_the_same_directions(saved: Saved, arcface: State, faces: np.ndarray) -> None:
    config = saved(arcface)
    exact = TorchBackbone(config)(faces)
    rough = TorchBackbone(replace(config, dtype="bfloat16"))(faces)
    assert rough.dtype == np.float32
    assert 0.999 < cosines(rough, exact).min() < cosines(rough, exact).max() < 1 - 1e-7


def test_statistics_and_head_stay_in_fp32(saved: Saved, arcface: State) -> None:
    network = TorchBackbone(saved(arcface, dtype="bfloat16")).network
    low = {name for name, tensor in network.state_dict().items() if tensor.dtype == torch.bfloat16}
    assert low == {
        n for n in network.state_dict() if ("conv" in n or "prelu" in n or n.endswith("downsample.0.weight"))
    }
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_float16_without_a_cuda_device_is_refused(saved: Saved, arcface: State) -> None:
    with pytest.raises(ModelError, match=r"float16 needs a CUDA device.*Set float32 or bfloat16"):
        TorchBackbone(saved(arcface, dtype="float16"))


def test_the_device_and_its_arithmetic_are_stated_and_logged(
    saved: Saved, arcface: State, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="operators.iresnet"):
        backbone = TorchBackbone(saved(arcface))
    assert backbone.device == "cpu float32"
    assert "iresnet18 on cpu float32 (torch sees no CUDA device)" in caplog.text


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (
            {"architecture": "iresnet50"},
            r"missing: layer1\.2\.bn1\.weight, .*looks like iresnet18 with embeddings of 64",
        ),
        ({"width": 512}, r"fc\.weight is float32 \(64, 25088\), .*\(512, 25088\).*embedder\.width to 64"),
        ({"architecture": "resnet"}, r"embedder\.architecture must be one of iresnet18, .*Got 'resnet'"),
        ({"architecture": ""}, r"embedder\.architecture must be one of"),
    ],
)
def test_weights_of_another_network_than_declared_are_refused_with_the_remedy(
    saved: Saved, arcface: State, declared: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        TorchBackbone(saved(arcface, **declared))


def test_a_declared_network_that_is_too_small_is_refused(saved: Saved) -> None:
    """Shapes alone, so that the file stays small."""
    with torch.device("meta"):
        large = {name: tensor.shape for name, tensor in build("iresnet100", 512).state_dict().items()}
    state = {name: torch.zeros(()).expand(shape) for name, shape in large.items()}
    with pytest.raises(ModelError, match=r"unknown: layer1\.2\.bn1\.weight.*set embedder\.architecture to iresnet100"):
        filled(saved(state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer3.1.bn2.running_var": None}, r"1 missing: layer3\.1\.bn2\.running_var"),
        ({"layer1.0.se.fc.weight": torch.zeros(4)}, r"1 unknown: layer1\.0\.se\.fc\.weight"),
        ({"bn2.bias": torch.zeros(512, dtype=torch.int32)}, r"bn2\.bias is int32 \(512,\), needed are floats"),
        ({"fc.weight": torch.zeros(WIDTH, 512 * 14 * 14)}, r"fc\.weight is float32 \(64, 100352\)"),
        ({f"layer1.0.downsample.{end}": None for end in ("0.weight", "1.bias")}, "2 missing: layer1"),
    ],
    ids=["missing", "extra", "integers", "large input", "no shortcut"],
)
def test_a_variant_of_the_declared_network_is_refused(
    saved: Saved, arcface: State, change: dict[str, torch.Tensor | None], message: str
) -> None:
    altered = {name: tensor for name, tensor in (arcface | change).items() if tensor is not None}
    with pytest.raises(ModelError, match=f"{message}.*Export it as ONNX") as caught:
        TorchBackbone(saved(altered))
    assert "its weights do not fit" in str(caught.value)


def test_a_crop_of_another_size_is_refused(saved: Saved, arcface: State) -> None:
    with pytest.raises(ModelError, match=r"iresnet18 takes crops of 112 pixels.*dlib150, which has 150"):
        TorchBackbone(saved(arcface, alignment="dlib150"))


def test_mirroring_is_left_to_open_backbone(saved: Saved, arcface: State, faces: np.ndarray) -> None:
    config = saved(arcface, flip=True)
    with pytest.raises(ValueError, match="open_backbone"):
        TorchBackbone(config)
    plain = TorchBackbone(replace(config, flip=False))
    ways = np.stack([plain(faces), plain(faces[:, :, ::-1])]).astype(np.float64)
    expected = (ways / np.linalg.norm(ways, axis=2, keepdims=True)).sum(0)
    assert cosines(open_backbone(config)(faces), expected).min() > 1 - 1e-9


def test_a_file_with_another_digest_is_refused(saved: Saved, arcface: State) -> None:
    config = saved(arcface)
    Path(config.path).write_bytes(Path(config.path).read_bytes() + b"\0")
    with pytest.raises(ModelError, match=r"SHA-256 is .*, pinned is"):
        TorchBackbone(config)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "least"), [("float32", 1 - 1e-9), ("float16", 0.9999), ("bfloat16", 0.999)])
def test_a_cuda_device_gives_the_published_embeddings(
    saved: Saved, arcface: State, faces: np.ndarray, dtype: str, least: float
) -> None:
    backbone = TorchBackbone(saved(arcface, dtype=dtype))
    found = backbone(faces)
    assert backbone.device == f"{torch.cuda.get_device_name()} {dtype}"
    assert cosines(found, published(arcface, planes(faces), ARCFACE)).min() > least
    np.testing.assert_array_equal(backbone(faces[::-1]), found[::-1])


def test_what_cannot_be_compiled_is_an_error_that_says_what_to_do(
    saved: Saved, arcface: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: fails)
    with pytest.raises(ModelError, match=r"torch\.compile failed \(no compiler\).*set embedder\.compile to false"):
        open_backbone(saved(arcface, compile=True))


def test_a_compiled_network_must_give_the_same_embeddings_and_says_that_it_is_compiled(
    saved: Saved, arcface: State, faces: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = open_backbone(saved(arcface))
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: network)
    compiled = open_backbone(saved(arcface, compile=True))
    assert np.array_equal(compiled(faces), plain(faces))
    assert compiled.device == f"{plain.device} compiled"
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: lambda planes: network(planes).flip(1))
    with pytest.raises(ModelError, match="compiled it gives other embeddings"):
        open_backbone(saved(arcface, compile=True))
