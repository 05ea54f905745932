"""ONNX Runtime's TensorRT provider, for NVIDIA GPUs. Not run where this project is tested.

TensorRT builds an engine for the GPU when a model is opened, which takes a minute or more for a large one, and is not
kept: what it would be kept as is not pinned by a digest. It is never chosen by `auto`.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from operators.errors import ModelError
from operators.sessions import runtime_faults

if TYPE_CHECKING:
    from operators.runtimes import Model

PROVIDER = "TensorrtExecutionProvider"


class TensorRt:
    """A network run by TensorRT through ONNX Runtime; what TensorRT cannot run goes to CUDA."""

    def __init__(self, model: "Model") -> None:
        """ModelError if the installed ONNX Runtime or this machine has no TensorRT, or it cannot run the model."""
        import onnxruntime

        offered = onnxruntime.get_available_providers()
        if PROVIDER not in offered:
            raise ModelError(
                f"embedder.runtime: the installed ONNX Runtime has no TensorRT (it offers {', '.join(offered)}). "
                f"Install onnxruntime-gpu and TensorRT's libraries, or set embedder.runtime to auto."
            )
        if model.dtype == "bfloat16":
            raise ModelError(
                f"{model.path}: TensorRT runs it in float32 or float16. Set embedder.dtype to one of them."
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        asked = [
            (PROVIDER, {"trt_fp16_enable": str(model.dtype == "float16"), "trt_engine_cache_enable": "False"}),
            ("CUDAExecutionProvider", {"use_tf32": "0"}),
        ]
        try:
            self.session = onnxruntime.InferenceSession(model.data, options, providers=asked)
        except runtime_faults() as error:
            raise ModelError(
                f"{model.path}: TensorRT cannot run this model ({error}). Set embedder.runtime to onnxruntime."
            ) from error
        used = self.session.get_providers()
        if used[0] != PROVIDER:  # ONNX Runtime goes on without a provider whose libraries it cannot load
            raise ModelError(
                f"embedder.runtime: TensorRT cannot be loaded, ONNX Runtime would use {used[0]}. Install TensorRT's "
                f"libraries in the version that it was built for, or set embedder.runtime to auto."
            )
        self.input = self.session.get_inputs()[0].name
        self.name = "tensorrt"
        self.device = f"onnxruntime {PROVIDER}" + ("" if model.dtype == "float32" else f" {model.dtype}")
        self.reason = ""

    def __call__(self, planes_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """The network's output."""
        return np.asarray(self.session.run(None, {self.input: planes_NCHW})[0], np.float32)
