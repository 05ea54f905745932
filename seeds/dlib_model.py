"""dlib's face recognition network (face_recognition_resnet_model_v1) as a plain ONNX graph.

The graph follows from the layers that the file holds: residual blocks of convolutions and affine layers, whose
shortcut is the block's entry, or its average-pooled entry where the block halves the picture. Weights: CC0 1.0,
https://github.com/davisking/dlib-models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from operators.errors import ModelError
from seeds.dlib_format import Layer, Network

if TYPE_CHECKING:
    import onnx

OUTPUT = "embedding"
PIXEL_SCALE = 1 / 256
"""What dlib multiplies a pixel by once the mean is subtracted."""


class _Graph:
    """Nodes and constants so far; `add` returns the name of the new node's output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[Any]] = {}

    def constant(self, value: NDArray[Any]) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        from onnx import helper

        made = name or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [made], **attributes))
        return made


@dataclass(frozen=True, slots=True)
class _Value:
    """An intermediate result: its name, channels and side in pixels."""

    name: str
    channels: int
    pixels: int


def network_graph(network: Network, *, name: str, input_name: str = "input") -> "onnx.ModelProto":
    """The network as ONNX called `name`: `input_name` (N, 3, P, P) of raw RGB 0..255 to `embedding` (N, D), any N.

    Mean and scale are inside. An affine layer is folded into the convolution before it, in fp64. Where the two sides
    of a residual sum differ in size, zeros follow the smaller one, as in dlib.

    Raises
    ------
    ModelError
        If the layers do not follow each other as in dlib's residual networks.
    """
    graph = _Graph()
    mean = graph.constant(np.array(network.mean_rgb, np.float32).reshape(1, 3, 1, 1))
    centred = graph.add("Sub", input_name, mean)
    scaled = graph.add("Mul", centred, graph.constant(np.array([PIXEL_SCALE], np.float32)))
    now = entry = other = _Value(scaled, 3, network.pixels)  # `entry` opens a residual block, `other` is its shortcut
    layers = iter(network.layers)
    for layer in layers:
        if layer.kind == "con_4":
            now = _convolution(graph, now, layer, next(layers, Layer("nothing")))
        elif layer.kind == "avg_pool_2" and layer.numbers[0] == 0:
            pooled = graph.add("GlobalAveragePool", now.name)
            now = _Value(graph.add("Flatten", pooled), now.channels, 1)
        elif layer.kind == "avg_pool_2":
            other = _pool(graph, entry, layer, "AveragePool")
        elif layer.kind == "max_pool_2":
            now = entry = other = _pool(graph, now, layer, "MaxPool")
        elif layer.kind == "add_prev_":
            now = entry = _sum(graph, now, other)
        elif layer.kind == "relu_":
            summed = now is entry
            now = _Value(graph.add("Relu", now.name), now.channels, now.pixels)
            entry, other = (now, now) if summed else (entry, other)
        else:
            final = _fully_connected(graph, now, layer)
            return _model(
                graph, name, [(input_name, [3, network.pixels, network.pixels]), (final.name, [final.channels])]
            )
    raise ModelError("dlib network: must end in a fully connected layer; there is none.")


def _convolution(graph: _Graph, value: _Value, layer: Layer, affine: Layer) -> _Value:
    """The convolution with the affine layer after it: w' = w g and b' = b g + c per output channel."""
    filters, rows, columns, step, step_x, pad, pad_x = layer.numbers
    if affine.kind != "affine_" or (rows, step, pad) != (columns, step_x, pad_x):
        raise ModelError(f"dlib network: a square convolution and affine_ must come in turn, found {affine.kind}.")
    shape = layer.windows[0]
    if shape != (filters, value.channels, rows, columns) or affine.parameters.size != 2 * filters:
        raise ModelError(f"dlib network: filters {shape} do not fit {value.channels} channels and {filters} outputs.")
    weights, biases = np.split(layer.parameters.astype(np.float64), [int(np.prod(shape))])
    gain, shift = np.split(affine.parameters.astype(np.float64), 2)
    folded = (weights.reshape(shape) * gain[:, None, None, None]).astype(np.float32)
    name = graph.add(
        "Conv",
        value.name,
        graph.constant(folded),
        graph.constant((biases * gain + shift).astype(np.float32)),
        kernel_shape=[rows, rows],
        strides=[step, step],
        pads=[pad] * 4,
    )
    return _Value(name, filters, (value.pixels + 2 * pad - rows) // step + 1)


def _pool(graph: _Graph, value: _Value, layer: Layer, operator: str) -> _Value:
    rows, columns, step, step_x, pad, pad_x = layer.numbers
    if (rows, step) != (columns, step_x) or pad or pad_x:
        raise ModelError(f"dlib network: only square pooling without padding is known, found {layer.numbers}.")
    name = graph.add(operator, value.name, kernel_shape=[rows, rows], strides=[step, step])
    return _Value(name, value.channels, (value.pixels - rows) // step + 1)


def _sum(graph: _Graph, first: _Value, second: _Value) -> _Value:
    channels, pixels = max(first.channels, second.channels), max(first.pixels, second.pixels)
    padded = []
    for value in (first, second):
        lacking = [0, channels - value.channels, *[pixels - value.pixels] * 2]
        pads = np.array([0] * 4 + lacking, np.int64)
        padded.append(graph.add("Pad", value.name, graph.constant(pads)) if any(lacking) else value.name)
    return _Value(graph.add("Add", *padded), channels, pixels)


def _fully_connected(graph: _Graph, value: _Value, layer: Layer) -> _Value:
    outputs, inputs = layer.numbers[:2]
    if layer.parameters.size != inputs * outputs or inputs != value.channels:
        raise ModelError(f"dlib network: {layer.parameters.size} weights do not fit {value.channels} x {outputs}.")
    weights = graph.constant(layer.parameters.reshape(inputs, outputs))
    return _Value(graph.add("MatMul", value.name, weights, name=OUTPUT), outputs, 1)


def _model(graph: _Graph, name: str, ends: Sequence[tuple[str, list[int]]]) -> "onnx.ModelProto":
    """The model of these nodes; `ends` are the names and shapes, without the batch, of its input and its output."""
    from onnx import TensorProto, checker, helper, numpy_helper

    given, made = (helper.make_tensor_value_info(end, TensorProto.FLOAT, ["N", *shape]) for end, shape in ends)
    constants = [numpy_helper.from_array(value, constant) for constant, value in graph.constants.items()]
    body = helper.make_graph(graph.nodes, name, [given], [made], constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model, full_check=True)
    return model
