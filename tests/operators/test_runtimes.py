"""Runtimes: whatever runs a network gives the same embeddings, or is refused."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from operators import runtimes
from operators.backbones import BackboneConfig, OnnxBackbone
from operators.errors import ModelError
from operators.runtimes import EQUIVALENT, RUNTIMES, Model, open_network

OnnxFile = Callable[..., BackboneConfig]
MEANS = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
every_runtime = pytest.mark.parametrize(
    "runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino), "auto"]
)


@pytest.fixture(scope="module")
def faces(portraits: list[np.ndarray]) -> np.ndarray:
    return np.stack([cv2.resize(portrait, (112, 112)) for portrait in portraits])


class Slow:
    """A network that takes its time, for a runtime under another's name."""

    def __init__(self, network: runtimes.Network, seconds: float = 0.0, factor: float = 1.0, turn: float = 0.0) -> None:
        self.network, self.seconds, self.factor, self.turn = network, seconds, factor, turn
        self.name, self.device, self.reason = "openvino", "openvino CPU", ""

    def __call__(self, planes_NCHW: np.ndarray) -> np.ndarray:
        clock.now += self.seconds
        raw = self.network(planes_NCHW)
        return (raw * self.factor + self.turn * np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


class Clock:
    now = 0.0

    def process_time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return 0.0


clock = Clock()


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes ONNX Runtime take 1 s per call and stands a made-up OpenVINO beside it."""
    plain = runtimes.OnnxRuntime

    def stand(seconds: float, **changes: float) -> None:
        class Timed(plain):
            def __call__(self, planes_NCHW: np.ndarray) -> np.ndarray:
                clock.now += 1.0
                return super().__call__(planes_NCHW)

        monkeypatch.setattr(runtimes, "time", clock)
        monkeypatch.setattr(runtimes, "OnnxRuntime", Timed)
        monkeypatch.setattr(runtimes, "OpenVino", lambda model: Slow(plain(model), seconds, **changes))

    return stand


@pytest.fixture
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)


def unit(raw: np.ndarray) -> np.ndarray:
    raw = raw.astype(np.float64)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


@every_runtime
@pytest.mark.parametrize("batch", [1, 8])
def test_every_runtime_gives_the_embeddings_of_opencvs_recogniser(
    backbone_config: BackboneConfig, faces: np.ndarray, runtime: str, batch: int
) -> None:
    recogniser = cv2.FaceRecognizerSF.create(backbone_config.path, "")
    theirs = np.stack([recogniser.feature(np.ascontiguousarray(face[:, :, ::-1])).ravel().copy() for face in faces])
    ours = OnnxBackbone(replace(backbone_config, runtime=runtime, batch=batch))(faces)
    assert ours.dtype == np.float32
    assert np.linalg.norm(unit(ours) - unit(theirs), axis=1).max() < EQUIVALENT
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@needs_openvino
def test_the_runtimes_agree_far_better_than_they_must(backbone_config: BackboneConfig, faces: np.ndarray) -> None:
    found = [unit(OnnxBackbone(replace(backbone_config, runtime=name))(faces)) for name in ("onnxruntime", "openvino")]
    assert np.linalg.norm(found[0] - found[1], axis=1).max() < EQUIVALENT / 10


@needs_openvino
def test_reduced_arithmetic_is_close_and_not_equivalent(backbone_config: BackboneConfig, faces: np.ndarray) -> None:
    exact = unit(OnnxBackbone(backbone_config)(faces))
    try:
        backbone = OnnxBackbone(replace(backbone_config, dtype="bfloat16"))
    except ModelError as error:
        pytest.skip(str(error))
    apart = np.linalg.norm(unit(backbone(faces)) - exact, axis=1)
    assert EQUIVALENT < apart.max() < 0.1
    assert backbone.device == "openvino CPU bfloat16"
    assert "the only runtime for bfloat16" in backbone.reason


@every_runtime
def test_an_embedding_does_not_depend_on_its_neighbours_its_place_or_the_padding(
    backbone_config: BackboneConfig, faces: np.ndarray, runtime: str
) -> None:
    backbone = OnnxBackbone(replace(backbone_config, runtime=runtime))
    whole = backbone(faces)
    np.testing.assert_array_equal(backbone(faces[::-1])[::-1], whole)
    np.testing.assert_array_equal(np.concatenate([backbone(part) for part in np.split(faces, [1, 5, 9])]), whole)


@every_runtime
@pytest.mark.parametrize("fixed", [1, 3])
def test_every_runtime_keeps_to_a_fixed_batch(onnx_file: OnnxFile, runtime: str, fixed: int) -> None:
    config = onnx_file([MEANS], takes=(fixed, 3, 112, 112), gives=(fixed, 3), runtime=runtime)
    given = np.random.default_rng(3).integers(0, 256, (7, 112, 112, 3), np.uint8)
    np.testing.assert_allclose(OnnxBackbone(config)(given), given.astype(np.float64).mean(axis=(1, 2)), rtol=1e-4)


@every_runtime
def test_every_runtime_refuses_weights_in_other_files(onnx_file: OnnxFile, tmp_path: Path, runtime: str) -> None:
    (tmp_path / "w.bin").write_bytes(np.ones(3, "<f4").tobytes())
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", "12")):
        tensor.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("Add", ["m", "w"], ["y"]),
    ]
    with pytest.raises(ModelError, match="keeps weights in other files, which are not pinned"):
        OnnxBackbone(onnx_file(nodes, [tensor], runtime=runtime))


@every_runtime
def test_every_runtime_refuses_another_width_than_declared(onnx_file: OnnxFile, runtime: str) -> None:
    with pytest.raises(ModelError, match=r"\(8, 3\), declared is \(8, 4\)\. Set embedder\.width"):
        OnnxBackbone(onnx_file([MEANS], width=4, runtime=runtime))


@every_runtime
@pytest.mark.parametrize("takes", [("N", 3, 96, 96), ("N", 112, 112, 3)], ids=str)
def test_every_runtime_refuses_a_network_for_other_pictures(
    onnx_file: OnnxFile, runtime: str, takes: tuple[int | str, ...]
) -> None:
    """OpenVINO alone would bend the graph to any size."""
    config = onnx_file([MEANS], takes=takes, runtime=runtime)
    with pytest.raises(ModelError, match=Path(config.path).name):
        OnnxBackbone(config)


@every_runtime
def test_every_runtime_refuses_unknown_operations_by_name(onnx_file: OnnxFile, runtime: str) -> None:
    config = onnx_file([helper.make_node("Enchant", ["x"], ["y"])], runtime=runtime)
    with pytest.raises(ModelError, match=f"{Path(config.path).name}: .*cannot run this model"):
        OnnxBackbone(config)


@pytest.mark.usefixtures("no_openvino")
def test_openvino_by_name_must_be_installed(onnx_file: OnnxFile) -> None:
    with pytest.raises(
        ModelError, match=r"embedder\.runtime: OpenVINO cannot be imported.*Install `unveil\[openvino\]`"
    ):
        OnnxBackbone(onnx_file([MEANS], runtime="openvino"))


@pytest.mark.usefixtures("no_openvino")
def test_without_openvino_auto_is_onnx_runtime_and_says_why(onnx_file: OnnxFile) -> None:
    backbone = OnnxBackbone(onnx_file([MEANS]))
    assert backbone.device.startswith("onnxruntime ")
    assert "OpenVINO cannot be imported" in backbone.reason or "a GPU is there" in backbone.reason


@needs_openvino
def test_openvino_does_not_report_its_use(onnx_file: OnnxFile) -> None:
    OnnxBackbone(onnx_file([MEANS], runtime="openvino"))
    assert sys.modules["openvino_telemetry"] is None
    assert "openvino.tools.ovc.telemetry_stub" in sys.modules


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_onnx_runtime_has_no_reduced_arithmetic(onnx_file: OnnxFile, dtype: str) -> None:
    with pytest.raises(ModelError, match=r"runs it in float32 only\. Set embedder\.dtype to float32"):
        OnnxBackbone(onnx_file([MEANS], dtype=dtype, runtime="onnxruntime"))


@pytest.mark.usefixtures("no_openvino")
def test_reduced_arithmetic_without_openvino_is_an_error_and_never_fp32(onnx_file: OnnxFile) -> None:
    with pytest.raises(ModelError, match="OpenVINO cannot be imported"):
        OnnxBackbone(onnx_file([MEANS], dtype="bfloat16"))


@needs_openvino
def test_a_cpu_without_the_arithmetic_is_an_error_and_never_fp32(onnx_file: OnnxFile) -> None:
    import openvino

    if "FP16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has float16")
    with pytest.raises(ModelError, match=r"OpenVINO has no float16 on this CPU\. Set embedder\.dtype"):
        OnnxBackbone(onnx_file([MEANS], dtype="float16"))


@pytest.mark.parametrize(
    ("seconds", "device"),
    [(0.5, "openvino CPU"), (0.86, "openvino CPU"), (0.88, "onnxruntime"), (1.0, "onnxruntime"), (3.0, "onnxruntime")],
)
def test_auto_takes_another_runtime_only_where_it_is_clearly_faster(
    onnx_file: OnnxFile, two: Callable[..., None], seconds: float, device: str
) -> None:
    two(seconds, factor=2.0)
    backbone = OnnxBackbone(onnx_file([MEANS], batch=4))
    assert backbone.device.startswith(device)
    assert f"onnxruntime 1 s, openvino {seconds:.3g} s per batch of 4" in backbone.reason
    assert "unit vectors" in backbone.reason
    assert backbone.config.runtime == device.split()[0]


@pytest.mark.parametrize(("turn", "device"), [(2e-5, "openvino CPU"), (1e-3, "onnxruntime")])
def test_auto_takes_no_faster_runtime_that_is_not_equivalent(
    onnx_file: OnnxFile, two: Callable[..., None], turn: float, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    two(0.1, turn=turn)
    with caplog.at_level(logging.INFO, logger="operators.runtimes"):
        backbone = OnnxBackbone(onnx_file([MEANS]))
    assert backbone.device.startswith(device)
    assert ("gives other embeddings than ONNX Runtime" in backbone.reason) == (device == "onnxruntime")
    assert backbone.reason in caplog.text


def test_a_runtime_by_name_that_is_not_equivalent_is_refused(
    onnx_file: OnnxFile, two: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    two(0.1, turn=1e-3)
    monkeypatch.setattr(runtimes, "RUNTIMES", {"openvino": runtimes.OpenVino})
    with pytest.raises(ModelError, match=r"openvino gives other embeddings.*at most 0\.0001 is allowed in float32"):
        OnnxBackbone(onnx_file([MEANS], runtime="openvino"))


def test_a_gpu_is_taken_without_a_race_and_a_large_distance_is_logged(
    onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = runtimes.OnnxRuntime

    class Gpu(plain):
        def __init__(self, model: Model, *, cuda: bool = True) -> None:
            super().__init__(model, cuda=cuda)
            self.turn = 1e-3 if cuda else 0.0
            if cuda:
                self.provider = "CUDAExecutionProvider"
                self.device = f"onnxruntime {self.provider}"

        def __call__(self, planes_NCHW: np.ndarray) -> np.ndarray:
            raw = super().__call__(planes_NCHW)
            return raw + np.float32(self.turn) * raw[:, ::-1]

    monkeypatch.setattr(runtimes, "OnnxRuntime", Gpu)
    backbone = OnnxBackbone(onnx_file([MEANS]))
    assert backbone.device == "onnxruntime CUDAExecutionProvider"
    assert backbone.reason.startswith("a GPU is there, unit vectors ")
    assert "from the CPU, more than 0.0001" in caplog.text


def test_rows_that_are_not_usable_must_be_so_everywhere() -> None:
    one, other = np.array([[[3, 4], [np.nan, 1], [0, 0]], [[3, 4], [1, 1], [0, 0]]], np.float32)
    assert runtimes.distance(one, one * 2) == 0
    assert runtimes.distance(one, other) == pytest.approx(1)


def test_the_runtimes_are_a_closed_set() -> None:
    assert set(RUNTIMES) == {"onnxruntime", "openvino", "tensorrt"}
    with pytest.raises(ValueError, match="runtime must be one of auto, onnxruntime, openvino, tensorrt"):
        BackboneConfig(runtime="ncnn")
    with pytest.raises(KeyError):
        open_network(Model(path="", data=b"", batch=1, fixed=False, pixels=4, width=1), np.zeros(0), "ncnn")


def test_every_call_has_one_thread(backbone_config: BackboneConfig) -> None:
    data = Path(backbone_config.path).read_bytes()
    model = Model(path="sface", data=data, batch=1, fixed=False, pixels=112, width=128)
    assert runtimes.OnnxRuntime(model).session.get_session_options().intra_op_num_threads == 1
    if find_spec("openvino"):
        assert runtimes.OpenVino(model).request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == 1
