"""ONNX Runtime sessions of one thread, for embedders and detectors."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from operators.errors import ModelError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

log = logging.getLogger(__name__)


def onnx_session(path: str, data: bytes, *, cuda: Mapping[str, str] | None) -> "InferenceSession":
    """A session of one thread for a checked file's bytes; on a CUDA device, with these options, unless None."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    available = onnxruntime.get_available_providers()
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda is not None and "CUDAExecutionProvider" in available:
        providers.insert(0, ("CUDAExecutionProvider", dict(cuda)))
    log.info("%s: providers %s (installed build offers %s)", path, providers, ", ".join(available))
    try:
        return onnxruntime.InferenceSession(data, options, providers=providers)
    except runtime_faults() as error:
        raise ModelError(f"{path}: ONNX Runtime cannot run this model ({error}). Export it again.") from error


def runtime_faults() -> tuple[type[Exception], ...]:
    """What the runtimes raise for a file that they cannot run; ONNX Runtime's classes have no common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    own: list[type[Exception]] = [getattr(state, name) for name in names]
    return (RuntimeError, ValueError, IndexError, *own)
