"""TensorRT is not run here: that it is asked for as documented, and that its absence is a clear error."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from operators.backbones import BackboneConfig, OnnxBackbone
from operators.errors import ModelError
from operators.runtimes import RUNTIMES, Model, Network

OnnxFile = Callable[..., BackboneConfig]
MEANS = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)


def test_tensorrt_where_there_is_none_is_an_error_that_says_what_to_do(onnx_file: OnnxFile) -> None:
    with pytest.raises(ModelError, match=r"no TensorRT \(it offers .*\)\. Install onnxruntime-gpu .* to auto"):
        OnnxBackbone(onnx_file([MEANS], runtime="tensorrt"))


@pytest.mark.parametrize(("dtype", "fp16"), [("float32", "False"), ("float16", "True")])
def test_tensorrt_is_asked_for_with_cuda_behind_it_and_must_be_what_is_used(
    onnx_file: OnnxFile, monkeypatch: pytest.MonkeyPatch, dtype: str, fp16: str
) -> None:
    """The provider itself is not run here."""
    asked: list[tuple[str, dict[str, str]]] = []
    used = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    plain = onnxruntime.InferenceSession

    class Session:
        def __init__(self, data: bytes, options: object, providers: list[tuple[str, dict[str, str]]]) -> None:
            asked.extend(providers)
            self.session = plain(data, providers=["CPUExecutionProvider"])
            self.get_inputs = self.session.get_inputs

        def get_providers(self) -> list[str]:
            return used

        def run(self, *arguments: object) -> list[np.ndarray]:
            return self.session.run(*arguments)

    def open_it() -> Network:
        file = onnx_file([MEANS])
        model = Model(
            path="m", data=Path(file.path).read_bytes(), batch=file.batch, fixed=False, pixels=112, width=3, dtype=dtype
        )
        return RUNTIMES["tensorrt"](model)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: used)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    opened = open_it()
    assert opened.name == "tensorrt" and "TensorrtExecutionProvider" in opened.device
    assert [name for name, _ in asked] == used[:2]
    assert asked[0][1]["trt_fp16_enable"] == fp16 and asked[1][1]["use_tf32"] == "0"
    used.pop(0)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider", *used])
    with pytest.raises(ModelError, match="TensorRT cannot be loaded, ONNX Runtime would use CUDAExecutionProvider"):
        open_it()
