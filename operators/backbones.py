"""Face recognition networks: aligned faces in, raw embeddings out."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from operators.alignment import alignment
from operators.errors import ModelError
from operators.runtimes import Model, open_network
from operators.selftest import check_self_test, drawn_face
from operators.sessions import onnx_session
from operators.sessions import runtime_faults as runtime_faults

if TYPE_CHECKING:
    from onnx import TensorProto
    from onnxruntime import InferenceSession

log = logging.getLogger(__name__)

NO_ADDRESS = ("path", "name", "runtime", "self_test", "url", "licence", "training_data")
"""Fields of `BackboneConfig` that an embedding does not depend on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """A face recognition model and what it takes. The default is OpenCV Zoo's SFace (Zhong et al., IEEE TIP 2021)."""

    name: str = "sface_2021dec"
    path: str = "models/sface_2021dec.onnx"
    sha256: str = "222e00c3b3fc916ab2d85d40db7e8b6324b72e6bfef7f9612a794cf63b26719b"
    """Digest of the file; a file with another digest is refused."""
    backend: str = "onnx"
    """What the file is: `onnx`, or `torch` for weights of an architecture that `operators/iresnet.py` builds."""
    architecture: str = ""
    """For `torch`: iresnet18, iresnet34, iresnet50 or iresnet100."""
    width: int = 128
    """Components of an embedding."""
    alignment: str = "arcface112"
    """The face crop that the network was trained on; one of `operators.alignment.ALIGNMENTS`."""
    channels: str = "rgb"
    """Order of colours that the network was trained on: `rgb` or `bgr`."""
    mean: float = 0.0
    scale: float = 1.0
    """The network's input is (pixel - mean) * scale, pixels 0..255. SFace does this inside its graph."""
    flip: bool = False
    """Embed the mirrored face too, and store the direction of the sum of both unit vectors."""
    batch: int = 8
    """Faces per call. Every call has this shape (the last one is padded), so no result depends on its neighbours."""
    runtime: str = "auto"
    """What runs an `onnx` model: `onnxruntime`, `openvino`, `tensorrt`, or `auto` for the faster of the first two on
    each worker, as far as their outputs agree to `operators.runtimes.EQUIVALENT`."""
    compile: bool = False
    """Let `torch.compile` rewrite a `torch` model. It opens in minutes instead of seconds, and its vectors differ in
    their last bits, so they are other embeddings."""
    dtype: str = "float32"
    """Arithmetic of the network. `bfloat16` and `float16` are faster on some machines, and other embeddings."""
    self_test: tuple[float, ...] = ()
    """First components of the unit vector that the model gives for the bundled test face; `unveil doctor` and every
    worker check them. They tell a wrong colour order, normalisation or file from the right one."""
    url: str = ""
    """Where the file can be had; empty where it is made by `python -m seeds.face_models`."""
    licence: str = ""
    training_data: str = ""
    """What is known of the weights' terms and of the faces that they were trained on; reports print it."""

    def __post_init__(self) -> None:
        choices = {
            "backend": ("onnx", "torch"),
            "channels": ("rgb", "bgr"),
            "runtime": ("auto", "onnxruntime", "openvino", "tensorrt"),
            "dtype": ("float32", "bfloat16", "float16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}. Got {getattr(self, name)!r}.")
        if self.batch < 1 or self.width < 1:
            raise ValueError(f"batch and width must be at least 1. Got {self.batch} and {self.width}.")
        if self.compile and self.backend != "torch":
            raise ValueError(f"compile is for the backend torch. Got it with {self.backend}.")


class Backbone(Protocol):
    """An embedder that is open."""

    config: BackboneConfig
    """What it was opened with; a `runtime` of `auto` is replaced by the one that was chosen."""
    device: str
    """What it runs on, for the manifest."""

    def __call__(self, faces_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Raw embeddings (N, D) of RGB faces (N, P, P, 3) in the crop of `config.alignment`."""
        ...


def open_backbone(config: BackboneConfig) -> Backbone:
    """The embedder as configured, which has passed its self-test if one is stated.

    Raises
    ------
    ModelError
        If the file is missing, altered, of another width than declared, fails its self-test, or cannot be run here.
    """
    opened = _network(replace(config, flip=False))
    check_self_test(opened, _network)
    return Mirrored(opened) if config.flip else opened


def address(config: BackboneConfig) -> dict[str, Any]:
    """The fields that determine an embedding; embeddings of equal addresses may be stored together.

    Not where the file lies, how it is called and what is said of it. Not `runtime`, nor the batch of an ONNX model in
    fp32: each time that one is opened it shows that they change no unit vector by more than
    `operators.runtimes.EQUIVALENT`.
    """
    fields = {name: value for name, value in asdict(config).items() if name not in NO_ADDRESS}
    if config.backend == "onnx" and config.dtype == "float32":
        del fields["batch"]
    if not config.compile:
        del fields["compile"]  # embeddings made before there was the option keep their address
    return fields


class OnnxBackbone:
    """A face recognition network in an ONNX file, one way round. `open_backbone` adds `flip` and the self-test."""

    def __init__(self, config: BackboneConfig) -> None:
        """Open the model and try it; ModelError if it is missing, altered or of another width than declared."""
        if config.flip:
            raise ValueError("OnnxBackbone embeds one way round. Use open_backbone for flip.")
        data = pinned_bytes(config.path, config.sha256)
        fixed = _fixed_batch(config.path, data)
        self.batch = fixed or config.batch
        """Faces per call: the model's own batch if its graph fixes one, else the configured one."""
        if self.batch != config.batch:
            log.info("%s: takes %s faces per call, embedder.batch %s is not used", config.path, fixed, config.batch)
        pixels = alignment(config.alignment).pixels
        model = Model(
            path=config.path,
            data=data,
            batch=self.batch,
            fixed=fixed is not None,
            pixels=pixels,
            width=config.width,
            dtype=config.dtype,
        )
        noise = np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3), np.uint8)
        self.config = config
        probes_NCHW = self._planes(np.stack([drawn_face(pixels), noise]))
        self.network = open_network(model, probes_NCHW, config.runtime)
        self.config = replace(config, runtime=self.network.name)
        self.device = self.network.device
        self.reason = self.network.reason

    def __call__(self, faces_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Raw embeddings (N, D) of aligned RGB faces (N, P, P, 3)."""
        outputs = [self._run(faces_NHWC[at : at + self.batch]) for at in range(0, len(faces_NHWC), self.batch)]
        return np.concatenate(outputs) if outputs else np.zeros((0, self.config.width), np.float32)

    def _run(self, faces_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = len(faces_NHWC)
        padded = np.pad(faces_NHWC, ((0, self.batch - count), (0, 0), (0, 0), (0, 0)))
        return self.network(self._planes(padded))[:count]

    def _planes(self, faces_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The network's input (N, 3, P, P)."""
        ordered = faces_NHWC[..., ::-1] if self.config.channels == "bgr" else faces_NHWC
        planes = np.ascontiguousarray(ordered.transpose(0, 3, 1, 2), np.float32)
        return (planes - np.float32(self.config.mean)) * np.float32(self.config.scale)


class Mirrored:
    """A network that embeds each face and its mirror image.

    An embedding has the direction of the sum of both unit vectors, and the mean of both lengths as its length.
    """

    def __init__(self, plain: Backbone) -> None:
        self.plain = plain
        """The network that embeds one way round."""
        self.config = replace(plain.config, flip=True)
        self.device = plain.device
        self.reason: str = getattr(plain, "reason", "")

    def __call__(self, faces_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings (N, D) of aligned RGB faces (N, P, P, 3); not finite where one of the two is not, or is zero."""
        pair = np.stack([self.plain(faces_NHWC), self.plain(np.ascontiguousarray(faces_NHWC[:, :, ::-1]))])
        pair = pair.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            lengths = np.linalg.norm(pair, axis=2, keepdims=True)
            total = (pair / lengths).sum(axis=0)
            direction = total / np.linalg.norm(total, axis=1, keepdims=True)
            return np.asarray(direction * lengths.mean(axis=0), np.float32)


def _network(config: BackboneConfig) -> Backbone:
    """The network of `config`, one way round, not yet tested."""
    if config.backend == "torch":
        from operators.iresnet import TorchBackbone

        return TorchBackbone(config)
    return OnnxBackbone(config)


def open_model(path: str, sha256: str) -> "InferenceSession":
    """An ONNX Runtime session for the pinned file at `path`, on the fastest device of this worker.

    One thread per session: parallelism comes from the number of workers, and results stay the same on any machine of
    a kind.

    Raises
    ------
    ModelError
        If the file is missing, has another digest, refers to external data, or cannot be loaded.
    """
    data = pinned_bytes(path, sha256)
    _fixed_batch(path, data)
    return onnx_session(path, data, cuda={})


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


def _fixed_batch(path: str, data: bytes) -> int | None:
    """The batch that the graph fixes, None if it takes any; ModelError if it is no ONNX or has external data."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_from_string(data)
    except DecodeError as error:
        raise ModelError(f"{path}: not an ONNX model ({error}). Correct the path.") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model)):
        raise ModelError(f"{path}: keeps weights in other files, which are not pinned. Export it as a single file.")
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [i.type.tensor_type.shape.dim for i in model.graph.input if i.name not in constants]
    return int(inputs[0][0].dim_value) or None if inputs and inputs[0] else None


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
