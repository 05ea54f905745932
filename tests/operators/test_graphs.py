"""Plain graphs compute what the shipped graphs do; ONNX's own reference evaluator is the independent truth."""

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from operators.errors import ModelError
from operators.graphs import dequantise, plain_graph
from seeds.face_models import MODELS, FaceModel, shipped_file

YUNET, SFACE = MODELS


def run(model: onnx.ModelProto, **inputs: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def shipped(model: FaceModel) -> onnx.ModelProto:
    return onnx.load(shipped_file(model.shipped))


def plain(model: FaceModel) -> onnx.ModelProto:
    return plain_graph(shipped(model), input_name=model.input_name, dynamic=model.dynamic)


def noise(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(7).integers(0, 256, shape).astype(np.float32)


def tiny(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[int]], **constants: NDArray[np.generic]
) -> onnx.ModelProto:
    """A model with float inputs of these shapes, one output "y" and these initialisers, which it lists as inputs."""
    listed = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    values = [numpy_helper.from_array(v, n) for n, v in constants.items()]
    listed += [helper.make_tensor_value_info(v.name, v.data_type, list(v.dims)) for v in values]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "tiny", listed, [output], initializer=values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def operators_of(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_plain_sface_equals_the_shipped_graph_for_every_image_of_a_batch() -> None:
    images = noise(3, 3, 112, 112)
    reference = ReferenceEvaluator(shipped(SFACE))
    expected = np.concatenate([reference.run(None, {"data": image[None]})[0] for image in images])
    (found,) = run(plain(SFACE), data=images)
    assert found.shape == (3, 128)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_plain_sface_has_one_input_a_free_batch_and_only_operators_with_fast_kernels() -> None:
    model = plain(SFACE)
    assert [i.name for i in model.graph.input] == ["data"]
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["N", 3, 112, 112]
    assert [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == ["N", 128]
    assert not {"DequantizeLinear", "Reshape", "Dropout", "PRelu", "Constant"} & set(operators_of(model))


def test_plain_yunet_equals_the_shipped_graph_at_its_own_size() -> None:
    image = noise(1, 3, 640, 640)
    expected = ReferenceEvaluator(shipped(YUNET)).run(None, {"input": image})
    for found, truth in zip(run(plain(YUNET), input=image), expected, strict=True):
        np.testing.assert_allclose(found, truth, atol=1e-4)


def test_plain_yunet_keeps_the_images_of_a_batch_apart_at_other_sizes() -> None:
    images, model = noise(3, 3, 96, 160), plain(YUNET)
    together = run(model, input=images)
    assert together[0].shape == (3, 12 * 20, 1)
    for number, image in enumerate(images):
        for batch, alone in zip(together, run(model, input=image[None]), strict=True):
            np.testing.assert_allclose(batch[number], alone[0], atol=1e-5)


def test_the_given_model_is_not_changed_and_the_bytes_are_the_same_every_time() -> None:
    model = shipped(YUNET)
    before = model.SerializeToString(deterministic=True)
    made = [plain_graph(model, input_name="input", dynamic=YUNET.dynamic) for _ in range(2)]
    assert model.SerializeToString(deterministic=True) == before
    assert made[0].SerializeToString(deterministic=True) == made[1].SerializeToString(deterministic=True)


def test_a_plain_graph_made_plain_again_is_the_same() -> None:
    once = plain(YUNET)
    twice = plain_graph(once, input_name="input", dynamic=YUNET.dynamic)
    assert [n.op_type for n in twice.graph.node] == operators_of(once)
    assert twice.graph.input == once.graph.input


def test_blocks_of_an_axis_have_a_scale_and_zero_point_each() -> None:
    values = np.array([[10, 20, 30, 40, 50]], np.int8)
    scale = np.array([[0.5, 2.0, 1.0]], np.float32)
    zero = np.array([[10, 30, 0]], np.int8)
    found = dequantise(values, scale, zero, axis=1, block=2)
    assert found.dtype == np.float32
    assert found.tolist() == [[0.0, 5.0, 0.0, 20.0, 50.0]]


def test_an_axis_or_the_whole_tensor_has_one_scale() -> None:
    values = np.array([[1, 2], [3, 4]], np.int8)
    scale = np.array([1.0, 10.0], np.float32)
    assert dequantise(values, scale, None, axis=0).tolist() == [[1.0, 2.0], [30.0, 40.0]]
    assert dequantise(values, scale, np.array([1, 2], np.int8), axis=1).tolist() == [[0.0, 0.0], [2.0, 20.0]]
    assert dequantise(values, np.float32(3)[...], None).tolist() == [[3.0, 6.0], [9.0, 12.0]]


def test_the_fold_agrees_with_the_operator_of_onnx_runtime() -> None:
    rng = np.random.default_rng(1)
    weights = rng.integers(-128, 128, (4, 6), dtype=np.int8)
    scale = rng.uniform(0.01, 1, (4, 2)).astype(np.float32)
    zero = rng.integers(-9, 9, (4, 2), dtype=np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=1, block_size=3),
        helper.make_node("Reshape", ["d", "shape"], ["r"]),
        helper.make_node("MatMul", ["x", "r"], ["y"]),
    ]
    model = tiny(nodes, {"x": [1, 6]}, w=weights, s=scale, z=zero, shape=np.array([6, 4]))
    folded = plain_graph(model, input_name="x", dynamic={0: "N"})
    x = rng.standard_normal((1, 6)).astype(np.float32)
    assert operators_of(folded) == ["MatMul"]
    np.testing.assert_allclose(run(folded, x=x)[0], run(model, x=x)[0], atol=1e-5)


def test_prelu_becomes_operators_that_give_the_same() -> None:
    slope = np.array([[[0.25]], [[-0.5]]], np.float32)
    model = tiny([helper.make_node("PRelu", ["x", "a"], ["y"])], {"x": [1, 2, 1, 3]}, a=slope)
    split = plain_graph(model, input_name="x", dynamic={0: "N"})
    x = np.array([[[[-4, 0, 4]], [[-4, 0, 4]]]], np.float32)
    assert operators_of(split) == ["Relu", "Mul", "Mul", "Add"]
    assert run(split, x=x)[0].tolist() == [[[[-1, 0, 4]], [[2, 0, 4]]]]


def test_idle_dropout_dead_nodes_and_constant_nodes_go_and_the_rest_is_put_in_order() -> None:
    half = helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(np.float32(0.5)))
    nodes = [
        helper.make_node("Add", ["dropped", "half"], ["y"]),
        helper.make_node("Dropout", ["doubled", "half"], ["dropped"]),
        helper.make_node("Neg", ["doubled"], ["unread"]),
        helper.make_node("Add", ["x", "x"], ["doubled"]),
        half,
    ]
    made = plain_graph(tiny(nodes, {"x": [1, 2]}), input_name="x", dynamic={0: "N"})
    assert operators_of(made) == ["Add", "Add"]
    assert run(made, x=np.array([[1, 2], [3, 4]], np.float32))[0].tolist() == [[2.5, 4.5], [6.5, 8.5]]


def test_a_reshape_to_one_image_keeps_the_batch_only_where_the_batch_is_free() -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    model = tiny(nodes, {"x": [1, 2, 2]}, shape=np.array([1, -1, 1]))
    x = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    assert run(plain_graph(model, input_name="x", dynamic={0: "N"}), x=x)[0].shape == (3, 4, 1)
    fixed = plain_graph(model, input_name="x", dynamic={})
    assert [d.dim_value for d in fixed.graph.output[0].type.tensor_type.shape.dim] == [1, 4, 1]


def test_a_missing_input_or_axis_is_named() -> None:
    model = tiny([helper.make_node("Neg", ["x"], ["y"])], {"x": [1, 2]})
    with pytest.raises(ModelError, match="no input is called 'images'; its first inputs are x"):
        plain_graph(model, input_name="images", dynamic={0: "N"})
    with pytest.raises(ModelError, match="has 2 axes, none is 2"):
        plain_graph(model, input_name="x", dynamic={2: "H"})


def test_a_second_true_input_a_cycle_and_control_flow_are_refused() -> None:
    two = tiny([helper.make_node("Add", ["x", "mask"], ["y"])], {"x": [1, 2], "mask": [1, 2]})
    with pytest.raises(ModelError, match="needs mask beside its input"):
        plain_graph(two, input_name="x", dynamic={0: "N"})
    ring = [helper.make_node("Add", ["x", "b"], ["y"]), helper.make_node("Neg", ["y"], ["b"])]
    with pytest.raises(ModelError, match="a cycle"):
        plain_graph(tiny(ring, {"x": [1, 2]}), input_name="x", dynamic={0: "N"})
    body = tiny([helper.make_node("Neg", ["x"], ["y"])], {}).graph
    branch = helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)
    with pytest.raises(ModelError, match=r"If .* is control flow"):
        plain_graph(tiny([branch], {"x": [1]}), input_name="x", dynamic={})


def test_a_graph_that_is_not_valid_is_refused() -> None:
    model = tiny([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [1, 2]}, w=np.ones((3, 3), np.float32))
    with pytest.raises(ModelError, match="not valid ONNX"):
        plain_graph(model, input_name="x", dynamic={0: "N"})
