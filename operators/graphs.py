"""Plain ONNX graphs out of block-quantised ones.

Published face models are often shipped block-quantised: int8 weights, a DequantizeLinear and a Reshape per weight,
every weight repeated as a graph input, a batch of one written into the shapes. Inference engines refuse such files or,
worse, mix up the images of a batch. `plain_graph` turns one into the graph that the weights were quantised from: fp32
constants, one input, any batch. The weights keep their int8 rounding, so the scores stay those of the shipped file.

The operators are those of the ONNX specification (https://onnx.ai/onnx/operators/), opset 21 for block-wise
DequantizeLinear. Every step takes the nodes and constants and returns new ones; the given model is never changed.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from operators.errors import ModelError

if TYPE_CHECKING:
    import onnx

Array: TypeAlias = NDArray[Any]
Constants: TypeAlias = dict[str, Array]
Nodes: TypeAlias = list["onnx.NodeProto"]


def plain_graph(model: "onnx.ModelProto", *, input_name: str, dynamic: Mapping[int, str]) -> "onnx.ModelProto":
    """A copy of `model` with fp32 constants, `input_name` as its only input and no operators of training.

    Parameters
    ----------
    model
        An inference graph without control flow, block-quantised or not.
    input_name
        The input that carries the images; all others must be constants that the file lists as inputs.
    dynamic
        Axes of the input that any call may choose, with the symbols for them: `{0: "N"}` frees the batch,
        `{0: "N", 2: "H", 3: "W"}` the batch and the size of the image.

    Raises
    ------
    ModelError
        If the graph has no such input or axis, needs another one, has control flow, or is not valid ONNX afterwards.
    """
    graph = model.graph
    entry = _entry(model, input_name, dynamic)
    outputs = [o.name for o in graph.output]
    _refuse_control_flow(graph.node)
    nodes, constants = _lift_constants(graph)
    nodes = _ordered(_live(nodes, outputs), {input_name, *constants})
    nodes, constants = _fold(nodes, constants)
    nodes = _without_dropout(nodes, constants, outputs)
    if 0 in dynamic:
        nodes, constants = _free_batch(nodes, constants)
    nodes, constants = _split_prelu(nodes, constants)
    return _checked(_assemble(model, entry, _live(nodes, outputs), constants), dynamic)


def dequantise(values: Array, scale: Array, zero_point: Array | None, *, axis: int = 1, block: int = 0) -> Array:
    """`(values - zero_point) * scale` in fp32, shaped as `values`: what DequantizeLinear of opset 21 computes.

    Parameters
    ----------
    values
        Quantised integers of any shape.
    scale, zero_point
        One number for the whole tensor (no axes), one per index of `axis` (one axis), or, where `block` is set, one
        per `block` consecutive indices of `axis` (as many axes as `values`). No zero point means zero.
    axis, block
        The operator's attributes `axis` and `block_size`; no block means no blocks.
    """

    def spread(parameter: Array) -> Array:
        if parameter.ndim == 0:
            return parameter
        if block:
            return np.repeat(parameter, block, axis=axis).take(range(values.shape[axis]), axis=axis)
        shape = [1] * values.ndim
        shape[axis] = -1
        return parameter.reshape(shape)

    zero = np.float32(0) if zero_point is None else spread(zero_point.astype(np.float32))
    plain: Array = (values.astype(np.float32) - zero) * spread(scale.astype(np.float32))
    return plain


def _entry(model: "onnx.ModelProto", name: str, dynamic: Mapping[int, str]) -> "onnx.ValueInfoProto":
    """A copy of the graph input `name` whose `dynamic` axes carry symbols instead of sizes."""
    import onnx

    found = [i for i in model.graph.input if i.name == name]
    if not found:
        listed = ", ".join(i.name for i in model.graph.input[:5]) or "none"
        raise ModelError(f"model graph: no input is called {name!r}; its first inputs are {listed}. Name one of them.")
    entry = onnx.ValueInfoProto()
    entry.CopyFrom(found[0])
    shape = entry.type.tensor_type.shape.dim
    for axis, symbol in dynamic.items():
        if not 0 <= axis < len(shape):
            raise ModelError(f"model graph: input {name!r} has {len(shape)} axes, none is {axis}. Name axes it has.")
        shape[axis].dim_param = symbol
    return entry


def _refuse_control_flow(nodes: Iterable["onnx.NodeProto"]) -> None:
    """Raise ModelError for a node with a graph of its own: what that graph uses cannot be seen from outside."""
    for node in nodes:
        if any(a.HasField("g") or len(a.graphs) for a in node.attribute):
            raise ModelError(f"model graph: {node.op_type} {node.name!r} is control flow. Export without it.")


def _lift_constants(graph: "onnx.GraphProto") -> tuple[Nodes, Constants]:
    """The nodes without Constant ones, and the values of these and of the initialisers by name."""
    from onnx import numpy_helper

    constants: Constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    nodes: Nodes = []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        else:
            nodes.append(node)
    return nodes, constants


def _live(nodes: Nodes, outputs: Collection[str]) -> Nodes:
    """The nodes that some output depends on, in their given order."""
    maker = {name: node for node in nodes for name in node.output}
    wanted, open_names = set[int](), list(outputs)
    while open_names:
        node = maker.get(open_names.pop())
        if node is not None and id(node) not in wanted:
            wanted.add(id(node))
            open_names.extend(node.input)
    return [node for node in nodes if id(node) in wanted]


def _ordered(nodes: Nodes, known: Collection[str]) -> Nodes:
    """The nodes in an order in which each follows what it reads, as the ONNX specification demands."""
    ready, waiting = {"", *known}, nodes
    done: Nodes = []
    while waiting:
        blocked: Nodes = []
        for node in waiting:
            if all(name in ready for name in node.input):
                done.append(node)
                ready.update(node.output)
            else:
                blocked.append(node)
        if len(blocked) == len(waiting):
            made = {name for node in nodes for name in node.output}
            lacking = sorted({n for node in blocked for n in node.input} - ready - made) or ["a cycle"]
            raise ModelError(f"model graph: needs {', '.join(lacking[:3])} beside its input. Give a one-input graph.")
        waiting = blocked
    return done


def _attributes(node: "onnx.NodeProto") -> dict[str, Any]:
    """The node's attributes as Python values."""
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _fold(nodes: Nodes, constants: Constants) -> tuple[Nodes, Constants]:
    """DequantizeLinear and Reshape of constants replaced by their values; `nodes` must be ordered."""
    values = dict(constants)
    kept: Nodes = []
    for node in nodes:
        foldable = node.op_type in ("DequantizeLinear", "Reshape") and all(name in values for name in node.input)
        if not foldable:
            kept.append(node)
            continue
        first, second, *third = (values[name] for name in node.input)
        if node.op_type == "Reshape":
            values[node.output[0]] = first.reshape(second.tolist())
        else:
            options = _attributes(node)
            values[node.output[0]] = dequantise(
                first,
                second,
                third[0] if third else None,
                axis=options.get("axis", 1),
                block=options.get("block_size", 0),
            )
    return kept, values


def _without_dropout(nodes: Nodes, constants: Constants, outputs: Collection[str]) -> Nodes:
    """The nodes without Dropout that is idle at inference; its readers read what it read."""
    import onnx

    renamed: dict[str, str] = {}
    kept: Nodes = []
    for node in nodes:
        training = node.input[2] if len(node.input) > 2 else ""
        idle = not training or (training in constants and not constants[training].any())
        if node.op_type == "Dropout" and idle and node.output[0] not in outputs:
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        kept.append(copy)
    return kept


def _free_batch(nodes: Nodes, constants: Constants) -> tuple[Nodes, Constants]:
    """Reshape to (1, -1, ...) replaced by Reshape to (0, -1, ...): keep the batch instead of joining its images.

    A batch of one written into the shape does not fail for larger batches: -1 absorbs them, and the results of all
    images come out as if they were of one.
    """
    import onnx

    values = dict(constants)
    changed: Nodes = []
    for node in nodes:
        shape = constants.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is not None and shape[0] == 1 and -1 in shape[1:]:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[1] = f"{node.input[1]}_any_batch"
            values[copy.input[1]] = np.concatenate([np.zeros(1, shape.dtype), shape[1:]])
            node = copy
        changed.append(node)
    return changed, values


def _split_prelu(nodes: Nodes, constants: Constants) -> tuple[Nodes, Constants]:
    """PRelu(x) with constant slope a replaced by Relu(x) * (1 - a) + a * x.

    Equal up to rounding (about 1e-6 of an embedding), and measured 2.8 times as fast for SFace on a CPU: ONNX Runtime
    has vectorised kernels for Relu, Mul and Add but not for PRelu.
    """
    from onnx import helper

    values = dict(constants)
    changed: Nodes = []
    for node in nodes:
        if node.op_type != "PRelu" or node.input[1] not in constants:
            changed.append(node)
            continue
        (x, slope), y = node.input, node.output[0]
        values[f"{y}_rest"] = np.float32(1) - constants[slope]
        changed += [
            helper.make_node("Relu", [x], [f"{y}_relu"]),
            helper.make_node("Mul", [f"{y}_relu", f"{y}_rest"], [f"{y}_upper"]),
            helper.make_node("Mul", [x, slope], [f"{y}_lower"]),
            helper.make_node("Add", [f"{y}_upper", f"{y}_lower"], [y]),
        ]
    return changed, values


def _assemble(
    model: "onnx.ModelProto", entry: "onnx.ValueInfoProto", nodes: Nodes, constants: Constants
) -> "onnx.ModelProto":
    """A model of these parts that keeps the outputs' names and types, the opset and the metadata of `model`."""
    import onnx
    from onnx import numpy_helper

    used = {name for node in nodes for name in node.input} | {o.name for o in model.graph.output}
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    graph = plain.graph
    for field in ("input", "node", "initializer", "value_info"):
        graph.ClearField(field)
    graph.input.append(entry)
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items() if name in used)
    return plain


def _checked(plain: "onnx.ModelProto", dynamic: Mapping[int, str]) -> "onnx.ModelProto":
    """The model with its outputs' shapes as they follow from its input; ModelError if it is not valid ONNX.

    Sizes that depend on the image stay open; the first axis of an output is the batch if the input's is.
    """
    from onnx import checker, shape_inference

    for output in plain.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        inferred = shape_inference.infer_shapes(plain, check_type=True, strict_mode=True).graph.output
        for output, found in zip(plain.graph.output, inferred, strict=True):
            for axis, size in enumerate(found.type.tensor_type.shape.dim):
                dim = output.type.tensor_type.shape.dim.add()
                if axis == 0 and 0 in dynamic:
                    dim.dim_param = dynamic[0]
                elif size.HasField("dim_value"):
                    dim.dim_value = size.dim_value
        checker.check_model(plain, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model graph: not valid ONNX when made plain ({reason}). Check the shipped file.") from error
    return plain
