"""Ways to run a pinned ONNX model, and the choice between those that give the same embeddings.

A stored embedding does not say in its address what ran the network. So nothing runs one that has not shown, on the
machine where it works and before any face is embedded, that it gives the unit vectors of ONNX Runtime in fp32 on the
CPU, up to `EQUIVALENT`.

One thread per network: parallelism comes from the number of workers. Shapes: N faces, D components of an embedding.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from operators.errors import ModelError
from operators.sessions import onnx_session, runtime_faults

log = logging.getLogger(__name__)

EQUIVALENT = 1e-4
"""Runtimes may share stored embeddings if their unit vectors are at most this far apart (cosine 1 - 5e-9).

No cosine of two embeddings can then move by more than twice this, and rounding the vectors to fp16 for the store moves
each by 2e-4. Measured for SFace on a CPU: 1.6e-6 between runtimes in fp32, 3e-2 for bfloat16."""
ROUNDED = 0.25
"""The same for networks in reduced arithmetic, which have an address of their own: beyond it they do not work so."""
CLEARLY_FASTER = 1.15
"""Another runtime replaces ONNX Runtime if it does so many times its work. A smaller gain is not worth that workers of
one machine choose differently by chance."""
ROUNDS, CALIBRATION_S = 5, 2.0
"""Timing ends after so many rounds, or once it has taken this long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """An ONNX model of one input (N, 3, H, W) and one output (N, D), without external data."""

    path: str
    """For messages only."""
    data: bytes
    batch: int
    """Faces per call."""
    fixed: bool
    """Whether the graph takes this batch only."""
    pixels: int
    """H and W."""
    width: int
    """D."""
    dtype: str = "float32"
    """Arithmetic: `float32`, `bfloat16` or `float16`."""


class Network(Protocol):
    """A model that is open. Its input is (N, 3, H, W) with N the model's batch, its output (N, D); both fp32."""

    name: str
    """Of its runtime."""
    device: str
    """What it runs on."""
    reason: str
    """Why this runtime was chosen, with the seconds and distances that decided."""

    def __call__(self, planes_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """The network's output for one batch."""
        ...


class OnnxRuntime:
    """A network run by ONNX Runtime, on a CUDA device where the installed build has one."""

    def __init__(self, model: Model, *, cuda: bool = True) -> None:
        """ModelError if ONNX Runtime cannot run the model, or not in this arithmetic."""
        if model.dtype != "float32":
            raise ModelError(
                f"{model.path}: ONNX Runtime runs it in float32 only. Set embedder.dtype to float32"
                + (", or embedder.runtime to openvino." if model.dtype == "bfloat16" else ".")
            )
        # TF32 has three digits; it would be another arithmetic under the name of float32.
        self.session = onnx_session(model.path, model.data, cuda={"use_tf32": "0"} if cuda else None)
        self.input = self.session.get_inputs()[0].name
        self.provider: str = self.session.get_providers()[0]
        self.name = "onnxruntime"
        self.device = f"onnxruntime {self.provider}"
        self.reason = ""

    def __call__(self, planes_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """The network's output; any batch that the graph takes."""
        return np.asarray(self.session.run(None, {self.input: planes_NCHW})[0], np.float32)


class OpenVino:
    """A network run by OpenVINO's CPU plugin."""

    def __init__(self, model: Model) -> None:
        """ModelError if OpenVINO is not installed, or cannot run the model or not in this arithmetic."""
        openvino = _openvino()
        kind = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16, "float16": openvino.Type.f16}[model.dtype]
        settings = {
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            # Without both hints the plugin takes bfloat16 wherever the CPU has it.
            "INFERENCE_PRECISION_HINT": kind,
            "EXECUTION_MODE_HINT": "ACCURACY" if model.dtype == "float32" else "PERFORMANCE",
        }
        core = openvino.Core()
        try:
            graph = core.read_model(model=model.data, weights=b"")
            graph.reshape([model.batch, 3, model.pixels, model.pixels])
            compiled = core.compile_model(graph, "CPU", settings)
        except RuntimeError as error:
            raise ModelError(
                f"{model.path}: OpenVINO cannot run this model ({_line(error)}). Set embedder.runtime to onnxruntime."
            ) from error
        if compiled.get_property("INFERENCE_PRECISION_HINT") != kind:
            raise ModelError(f"{model.path}: OpenVINO has no {model.dtype} on this CPU. Set embedder.dtype to float32.")
        self.request = compiled.create_infer_request()
        self.name = "openvino"
        self.device = "openvino CPU" + ("" if model.dtype == "float32" else f" {model.dtype}")
        self.reason = ""

    def __call__(self, planes_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """The network's output."""
        result = self.request.infer([planes_NCHW], share_inputs=True, share_outputs=False)
        return np.asarray(result[0], np.float32)


def _tensorrt(model: Model) -> Network:
    from operators.trt import TensorRt

    return TensorRt(model)


Opener = Callable[[Model], Network]
RUNTIMES: Mapping[str, Opener] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino, "tensorrt": _tensorrt}
"""What can run a model, by the name that `embedder.runtime` takes."""


def open_network(model: Model, probes_NCHW: NDArray[np.float32], runtime: str = "auto") -> Network:
    """The model run by `runtime`, or by the faster of the equivalent ones if that is `auto`.

    Parameters
    ----------
    model
        The file and the calls that will be made.
    probes_NCHW
        A few inputs, no two alike, on which the runtimes are compared.
    runtime
        A name in `RUNTIMES`, or `auto`.

    Raises
    ------
    ModelError
        If the model cannot be run so, has another output than declared, or gives other embeddings than ONNX Runtime
        in fp32 gives for one face at a time.
    """
    if runtime != "auto":
        network = RUNTIMES[runtime](model)
        apart = _compared(network, model, probes_NCHW)
        network.reason = f"{runtime} as set, {_apart(apart)}"
    elif model.dtype != "float32":
        network = OpenVino(model)
        apart = _compared(network, model, probes_NCHW)
        network.reason = f"the only runtime for {model.dtype}, {_apart(apart)}"
    else:
        network = _fastest(model, probes_NCHW)
    log.info("%s: runs on %s (%s)", model.path, network.device, network.reason)
    return network


def _fastest(model: Model, probes_NCHW: NDArray[np.float32]) -> Network:
    """ONNX Runtime, or OpenVINO where it is there, equivalent and clearly faster."""
    usual = OnnxRuntime(model)
    apart = _compared(usual, model, probes_NCHW)
    if usual.provider != "CPUExecutionProvider":
        usual.reason = f"a GPU is there, {_apart(apart)}"
        return usual
    try:
        other = OpenVino(model)
        apart = _compared(other, model, probes_NCHW)
    except ModelError as error:
        usual.reason = f"the only one that can be used; {error}"
        return usual
    seconds = _seconds([usual, other], _filled(probes_NCHW, model.batch)[: model.batch])
    times = f"onnxruntime {seconds[0]:.3g} s, openvino {seconds[1]:.3g} s per batch of {model.batch}, {_apart(apart)}"
    if seconds[0] >= CLEARLY_FASTER * seconds[1]:
        other.reason = f"the faster one: {times}"
        return other
    usual.reason = f"no other is clearly faster: {times}"
    return usual


def _compared(network: Network, model: Model, probes_NCHW: NDArray[np.float32]) -> float:
    """Largest distance of the network's unit vectors from those of ONNX Runtime on the CPU, one face at a time.

    One face at a time shows too if the graph mixes up the images of a batch.
    """
    planes = _filled(probes_NCHW, model.batch)
    starts = range(0, len(planes), model.batch)
    found = np.concatenate([_output(network, planes[at : at + model.batch], model) for at in starts])
    alone = model if model.fixed else replace(model, batch=1)
    plain = network
    if not isinstance(network, OnnxRuntime) or network.provider != "CPUExecutionProvider":
        plain = OnnxRuntime(replace(alone, dtype="float32"), cuda=False)
    wanted = np.concatenate([_output(plain, _filled(probe[None], alone.batch), alone)[:1] for probe in probes_NCHW])
    apart = distance(found[: len(wanted)], wanted)
    allowed = EQUIVALENT if model.dtype == "float32" else ROUNDED
    if apart <= allowed:
        return apart
    if plain is network:
        raise ModelError(
            f"{model.path}: an embedding depends on the other faces of its batch (unit vectors {apart:.3g} apart). "
            f"Set embedder.batch to 1, or export the model with a free batch axis."
        )
    if isinstance(network, OnnxRuntime):
        log.warning("%s: %s is %.3g from the CPU, more than %g", model.path, network.device, apart, allowed)
        return apart
    raise ModelError(
        f"{model.path}: {network.name} gives other embeddings than ONNX Runtime (unit vectors {apart:.3g} apart, at "
        f"most {allowed:g} is allowed in {model.dtype}). Set embedder.runtime to onnxruntime and dtype to float32."
    )


def _output(network: Network, planes_NCHW: NDArray[np.float32], model: Model) -> NDArray[np.float32]:
    """The network's output; ModelError if it cannot take the input or gives another shape than declared."""
    try:
        found = network(planes_NCHW)
    except runtime_faults() as error:
        raise ModelError(
            f"{model.path}: cannot take input of shape {planes_NCHW.shape} ({_line(error)}). "
            f"Set embedder.batch to the model's batch size, or export it for this input."
        ) from error
    if found.shape != (len(planes_NCHW), model.width):
        raise ModelError(
            f"{model.path}: output shape is {found.shape}, declared is {(len(planes_NCHW), model.width)}. "
            f"Set embedder.width to the model's width."
        )
    return found


def _filled(planes_NCHW: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
    """The planes over and over, to a whole number of batches."""
    count = -(-len(planes_NCHW) // batch) * batch
    return np.ascontiguousarray(np.resize(planes_NCHW, (count, *planes_NCHW.shape[1:])))


def distance(found_ND: NDArray[np.float32], wanted_ND: NDArray[np.float32]) -> float:
    """Largest distance of unit vectors; rows that are not usable must be so in both."""
    units = []
    for raw in (found_ND.astype(np.float64), wanted_ND.astype(np.float64)):
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
        usable = np.isfinite(unit).all(axis=1, keepdims=True)
        units.append(np.where(usable, unit, 0.0))
    return float(np.linalg.norm(units[0] - units[1], axis=1).max())


def _seconds(networks: Sequence[Network], planes_NCHW: NDArray[np.float32]) -> list[float]:
    """Shortest processor time of one call of each network, taken in turns: waiting for other work does not count."""
    best = [float("inf")] * len(networks)
    begun = time.monotonic()
    for _ in range(ROUNDS):
        for at, network in enumerate(networks):
            start = time.process_time()
            network(planes_NCHW)
            best[at] = min(best[at], time.process_time() - start)
        if time.monotonic() - begun > CALIBRATION_S:
            break
    return best


def _apart(apart: float) -> str:
    return f"unit vectors {apart:.2g} from ONNX Runtime on the CPU"


def _openvino() -> Any:
    """The package OpenVINO, kept from reporting its use; ModelError if it is not installed.

    Beside its companion `openvino_telemetry`, importing OpenVINO sends a message to a web service and writes an
    identifier into the user's home, unless the user has declined. An audit tells nobody that it runs.
    """
    cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)
    try:
        import openvino
    except ImportError as error:
        raise ModelError(
            f"embedder.runtime: OpenVINO cannot be imported ({error}). Install `unveil[openvino]`, or set onnxruntime."
        ) from error
    return openvino


def _line(error: Exception) -> str:
    """The first line of a runtime's message, which may be long."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
