"""Face recognition networks: aligned faces in, raw embeddings out."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from operators.errors import ModelError
from operators.tables import FACE_PIXELS

if TYPE_CHECKING:
    from onnx import TensorProto
    from onnxruntime import InferenceSession

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """A face recognition model and what it takes. The default is OpenCV Zoo's SFace (Zhong et al., IEEE TIP 2021)."""

    name: str = "sface_2021dec"
    path: str = "models/sface_2021dec.onnx"
    sha256: str = "222e00c3b3fc916ab2d85d40db7e8b6324b72e6bfef7f9612a794cf63b26719b"
    """Digest of the file; a file with another digest is refused."""
    width: int = 128
    """Components of an embedding."""
    channels: str = "rgb"
    """Order of colours that the network was trained on: `rgb` or `bgr`."""
    mean: float = 0.0
    scale: float = 1.0
    """The network's input is (pixel - mean) * scale, pixels 0..255. SFace does this inside its graph."""
    batch: int = 8
    """Faces per call. Every call has this shape (the last one is padded), so no result depends on its neighbours."""

    def __post_init__(self) -> None:
        if self.channels not in ("rgb", "bgr"):
            raise ValueError(f"channels must be 'rgb' or 'bgr'. Got {self.channels!r}.")
        if self.batch < 1 or self.width < 1:
            raise ValueError(f"batch and width must be at least 1. Got {self.batch} and {self.width}.")


class OnnxBackbone:
    """A face recognition network run by ONNX Runtime."""

    def __init__(self, config: BackboneConfig) -> None:
        """Open the model and try it once; ModelError if it is missing, altered or of another width than declared."""
        self.config = config
        self.session = open_model(config.path, config.sha256)
        self.input = self.session.get_inputs()[0].name
        self.device: str = self.session.get_providers()[0]
        blank = np.zeros((config.batch, FACE_PIXELS, FACE_PIXELS, 3), np.uint8)
        try:
            found = self(blank).shape
        except runtime_faults() as error:
            raise ModelError(
                f"{config.path}: cannot take input of shape {(config.batch, 3, FACE_PIXELS, FACE_PIXELS)} ({error}). "
                f"Set embedder.batch to the model's batch size, or export it for this input."
            ) from error
        if found != (config.batch, config.width):
            raise ModelError(
                f"{config.path}: output shape is {found}, declared is {(config.batch, config.width)}. "
                f"Set embedder.width to the model's width."
            )

    def __call__(self, faces_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Raw embeddings (N, D) of aligned RGB faces (N, 112, 112, 3)."""
        batch = self.config.batch
        outputs = [self._run(faces_NHWC[at : at + batch]) for at in range(0, len(faces_NHWC), batch)]
        return np.concatenate(outputs) if outputs else np.zeros((0, self.config.width), np.float32)

    def _run(self, faces_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = len(faces_NHWC)
        padded = np.pad(faces_NHWC, ((0, self.config.batch - count), (0, 0), (0, 0), (0, 0)))
        if self.config.channels == "bgr":
            padded = padded[..., ::-1]
        planes = np.ascontiguousarray(padded.transpose(0, 3, 1, 2), np.float32)
        output = self.session.run(None, {self.input: (planes - self.config.mean) * np.float32(self.config.scale)})[0]
        return np.asarray(output, np.float32)[:count]


def open_model(path: str, sha256: str) -> "InferenceSession":
    """An ONNX Runtime session for the pinned file at `path`, on the fastest device of this worker.

    One thread per session: parallelism comes from the number of workers, and results stay the same on any machine of
    a kind.

    Raises
    ------
    ModelError
        If the file is missing, has another digest, refers to external data, or cannot be loaded.
    """
    import onnxruntime

    data = pinned_bytes(path, sha256)
    _refuse_external_data(path, data)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    available = onnxruntime.get_available_providers()
    providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    log.info("%s: providers %s (installed build offers %s)", path, ", ".join(providers), ", ".join(available))
    try:
        return onnxruntime.InferenceSession(data, options, providers=providers)
    except runtime_faults() as error:
        raise ModelError(f"{path}: ONNX Runtime cannot run this model ({error}). Export it again.") from error


def runtime_faults() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a file that it cannot run; its classes have no common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    own: list[type[Exception]] = [getattr(state, name) for name in names]
    return (RuntimeError, ValueError, IndexError, *own)


def pinned_bytes(path: str, sha256: str) -> bytes:
    """The bytes of a model file, whose SHA-256 must be `sha256`.

    Raises
    ------
    ModelError
        If the file is missing or its digest is another one.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: model file cannot be read ({error.strerror}). Run `make setup`, or correct its path."
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ModelError(f"{path}: SHA-256 is {found}, pinned is {sha256}. Restore the file, or pin the one you trust.")
    return data


def _refuse_external_data(path: str, data: bytes) -> None:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_from_string(data)
    except DecodeError as error:
        raise ModelError(f"{path}: not an ONNX model ({error}). Correct the path.") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model)):
        raise ModelError(f"{path}: keeps weights in other files, which are not pinned. Export it as a single file.")


def _tensors(message: Any) -> "Iterator[TensorProto]":
    """All tensors of a model, wherever they hang: initialisers, attributes, branches of control flow, functions."""
    from google.protobuf.message import Message
    from onnx import TensorProto

    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _tensors(part)
