"""SCRFD: networks made here answer with planted faces, so that every step of decoding has a known truth.

No real weights are at hand: nothing here says how well SCRFD finds faces.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from operators.backbones import BackboneConfig
from operators.detectors import Detection
from operators.errors import ModelError
from operators.scrfd import Scrfd

OnnxFile = Callable[..., BackboneConfig]
KINDS = {"score": 1, "bbox": 4, "kps": 10}
NAMES = [f"{kind}_{stride}" for kind in KINDS for stride in (8, 16, 32)]
DISTANCES = (1.5, 2.0, 2.5, 3.25)
MARKS = tuple(at / 4 - 1 for at in range(10))


def opened(config: BackboneConfig, min_score: float = 0.5, longest_side: int = 640) -> Scrfd:
    return Scrfd(config.path, config.sha256, min_score=min_score, longest_side=longest_side)


def planted(
    onnx_file: OnnxFile, height: int, width: int, faces: list[tuple[int, int, int, float, np.ndarray, np.ndarray]]
) -> BackboneConfig:
    """A network for one size that always finds the same faces.

    Each is its stride, cell, anchor, score, box as left, top, right, bottom, and landmarks (5, 2), all in pixels.
    """
    values = {
        f"{kind}_{stride}": np.zeros((height // stride, width // stride, 2, numbers), np.float32)
        for kind, numbers in KINDS.items()
        for stride in (8, 16, 32)
    }
    for stride, cell, anchor, score, box, marks in faces:
        y, x = divmod(cell, width // stride)
        at = (y, x, anchor)
        values[f"score_{stride}"][at] = score
        corner = np.array([x, y]) * stride
        values[f"bbox_{stride}"][at] = np.concatenate([corner - box[:2], box[2:] - corner]) / stride
        values[f"kps_{stride}"][at] = ((marks - corner) / stride).ravel()
    # The answers do not hang on the picture: each is a constant plus nothing of the input.
    nodes = [helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0)]
    nodes += [helper.make_node("Mul", ["mean", "zero"], ["none"])]
    nodes += [helper.make_node("Add", [f"{name}_value", "none"], [name]) for name in NAMES]
    weights = [numpy_helper.from_array(np.array(0, np.float32), "zero")]
    weights += [
        numpy_helper.from_array(values[name].reshape(-1, values[name].shape[-1]), f"{name}_value") for name in NAMES
    ]
    return onnx_file(nodes, weights, takes=(1, 3, height, width), gives=("A", "W"), outputs=tuple(NAMES))


def faces_of(rng: np.random.Generator, count: int, height: int, width: int) -> list[tuple]:
    """Faces far from one another, at random strides and anchors that lie anywhere, also far from the box."""
    found = []
    for at in range(count):
        stride = int(rng.choice([8, 16, 32]))
        cell = int(rng.integers((height // stride) * (width // stride)))
        left, top = rng.uniform(0, 40) + at * 60, rng.uniform(10, 50)
        box = np.array([left, top, left + rng.uniform(8, 19), top + rng.uniform(8, 50)])
        found.append((stride, cell, at % 2, 0.95 - at / 20, box, rng.uniform(0, 100, (5, 2))))
    return found


def check(found: list[Detection], expected: list[tuple], scale: float = 1.0) -> None:
    """Equal up to float32, best first; positions scaled about pixel centres."""
    assert [face.score for face in found] == pytest.approx([face[3] for face in expected])
    for face, (*_, box, marks) in zip(found, expected, strict=True):
        left_top = (box[:2] + 0.5) * scale - 0.5
        np.testing.assert_allclose(face.box_4, [*left_top, *(box[2:] - box[:2]) * scale], atol=1e-3)
        np.testing.assert_allclose(face.landmarks_52, (marks + 0.5) * scale - 0.5, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(64, 320), (320, 320), (96, 640)])
def test_planted_boxes_and_landmarks_come_out_in_pixels(onnx_file: OnnxFile, height: int, width: int) -> None:
    """For a picture of the network's own size nothing is scaled."""
    for seed in range(5):
        truth = faces_of(np.random.default_rng(seed), 5, height, width)
        found = opened(planted(onnx_file, height, width, truth))(np.zeros((height, width, 3), np.uint8))
        check(found, truth)


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(640, 640, 2), (360, 960, 3), (1600, 800, 5), (200, 320, 1), (64, 100, 1), (3200, 3200, 10)],
)
def test_answers_of_a_network_for_one_size_are_scaled_back_to_the_picture(
    onnx_file: OnnxFile, height: int, width: int, scale: int
) -> None:
    """A larger picture is scaled down to fit into 320 x 320 pixels, a smaller one is put into the corner as it is."""
    truth = faces_of(np.random.default_rng(0), 4, 320, 320)
    found = opened(planted(onnx_file, 320, 320, truth))(np.zeros((height, width, 3), np.uint8))
    check(found, truth, scale)


def test_of_boxes_that_share_four_tenths_of_their_union_the_surer_is_kept(onnx_file: OnnxFile) -> None:
    """Squares of side 70, `shift` apart, share (70 - s) / (70 + s): 0.4 at s = 30."""
    marks = np.zeros((5, 2))
    for shift, kept in [(0, [0.9]), (29, [0.9]), (31, [0.9, 0.8]), (60, [0.9, 0.8])]:
        truth = [
            (8, 3, 0, 0.8, np.array([10.0, 10, 80, 80]), marks),
            (8, 3, 1, 0.9, np.array([10.0 + shift, 10, 80 + shift, 80]), marks),
        ]
        found = opened(planted(onnx_file, 160, 160, truth))(np.zeros((160, 160, 3), np.uint8))
        assert [face.score for face in found] == pytest.approx(kept), shift


@pytest.mark.parametrize(("min_score", "kept"), [(0.3, 3), (0.5, 2), (0.75, 1), (0.95, 0)])
def test_detections_below_the_limit_are_dropped(onnx_file: OnnxFile, min_score: float, kept: int) -> None:
    spots = [(8, 5, 0, 0.9, 0), (16, 2, 1, 0.6, 100), (32, 1, 0, 0.4, 200)]
    truth = [(*spot, np.array([at, 10.0, at + 40, 60]), np.ones((5, 2))) for *spot, at in spots]
    found = opened(planted(onnx_file, 64, 320, truth), min_score)(np.zeros((64, 320, 3), np.uint8))
    assert len(found) == kept


def seeing(onnx_file: OnnxFile, *, batched: bool = False, order: list[str] = NAMES, red: int = 0) -> BackboneConfig:
    """A network for any size whose first anchor of a cell scores the mean of the cell's red, in network units.

    The second anchor scores -1; all boxes and landmarks are the same in strides.
    """
    nodes, weights = [], []
    for stride in (8, 16, 32):
        kernel = np.zeros((2, 3, stride, stride), np.float32)
        kernel[0, red] = 1 / stride**2
        weights += [numpy_helper.from_array(kernel, f"kernel_{stride}")]
        bias = {"score": (0.0, -1.0), "bbox": DISTANCES * 2, "kps": MARKS * 2}
        for kind, numbers in KINDS.items():
            here = f"{kind}_{stride}"
            weights += [numpy_helper.from_array(np.array(bias[kind], np.float32), f"bias_{here}")]
            weights += [numpy_helper.from_array(np.zeros((2 * numbers, 3, stride, stride), np.float32), f"no_{here}")]
            weight = f"kernel_{stride}" if kind == "score" else f"no_{here}"
            size = [stride, stride]
            nodes += [helper.make_node("Conv", ["x", weight, f"bias_{here}"], [f"map_{here}"], strides=size)]
            nodes += [helper.make_node("Transpose", [f"map_{here}"], [f"rows_{here}"], perm=[0, 2, 3, 1])]
            shape = np.array([1, -1, numbers] if batched else [-1, numbers], np.int64)
            weights += [numpy_helper.from_array(shape, f"shape_{here}")]
            nodes += [helper.make_node("Reshape", [f"rows_{here}", f"shape_{here}"], [here])]
    gives = (1, "A", "W") if batched else ("A", "W")
    return onnx_file(nodes, weights, takes=(1, 3, "H", "W"), gives=gives, outputs=tuple(order))


def lit(height: int, width: int, left: int, top: int, side: int, red: int = 255) -> np.ndarray:
    """A black picture with a red square; green and blue are lit elsewhere, where they must not count."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, :, 1:] = 255
    picture[top : top + side, left : left + side] = (red, 0, 0)
    return picture


@pytest.mark.parametrize("red", [255, 204, 192])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (77, 131), (300, 201), (640, 480)])
@pytest.mark.parametrize(("batched", "order"), [(False, NAMES), (True, NAMES), (False, NAMES[::-1])])
def test_a_lit_cell_is_found_where_it_is_in_pictures_of_any_size(
    onnx_file: OnnxFile, height: int, width: int, red: int, batched: bool, order: list[str]
) -> None:
    """By hand: the cell (5, 3) of stride 8 has its corner at (40, 24), and scores (red - 127.5) / 128."""
    detector = opened(seeing(onnx_file, batched=batched, order=order))
    (face,) = detector(lit(height, width, 40, 24, 8, red))
    assert face.score == pytest.approx((red - 127.5) / 128)
    np.testing.assert_allclose(face.box_4, [40 - 12, 24 - 16, 8 * 4, 8 * 5.25], atol=1e-4)
    np.testing.assert_allclose(face.landmarks_52, np.array([40, 24]) + 8 * np.reshape(MARKS, (5, 2)), atol=1e-4)


@pytest.mark.parametrize("stride", [16, 32])
def test_a_larger_square_lights_a_cell_of_a_coarser_stride(onnx_file: OnnxFile, stride: int) -> None:
    """The finer strides see it too, with the same score; their boxes are smaller and lie elsewhere."""
    found = opened(seeing(onnx_file))(lit(160, 192, 2 * stride, stride, stride))
    corner = np.array([2, 1]) * stride
    expected = [*(corner - np.array([1.5, 2]) * stride), 4 * stride, 5.25 * stride]
    assert any(np.allclose(face.box_4, expected, atol=1e-4) for face in found)


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_a_large_picture_is_scaled_down_for_detection_only(onnx_file: OnnxFile, factor: int) -> None:
    """Pixels repeated `factor` times shrink back to the very same picture, so the truth is known."""
    picture = lit(96, 128, 40, 24, 8)
    detector = opened(seeing(onnx_file), longest_side=128)
    (small,) = detector(picture)
    (large,) = detector(picture.repeat(factor, 0).repeat(factor, 1))
    assert large.score == pytest.approx(small.score)
    np.testing.assert_allclose(large.landmarks_52, small.landmarks_52 * factor + (factor - 1) / 2, atol=1e-3)
    np.testing.assert_allclose(large.box_4[:2], small.box_4[:2] * factor + (factor - 1) / 2, atol=1e-3)
    np.testing.assert_allclose(large.box_4[2:], small.box_4[2:] * factor, atol=1e-3)


def test_a_tiny_picture_is_enlarged_and_what_is_filled_up_is_black(onnx_file: OnnxFile) -> None:
    detector = opened(seeing(onnx_file))
    assert detector(np.zeros((1, 1, 3), np.uint8)) == []
    assert detector(np.zeros((5, 2000, 3), np.uint8)) == []
    found = detector(np.full((32, 32, 3), 255, np.uint8))
    assert found
    whole = detector(np.full((65, 65, 3), 255, np.uint8))  # filled up to 96: the last row of cells is black but for 1/8
    assert max(face.box_4[0] for face in whole) == pytest.approx(7 * 8 - 12)


def test_the_network_gets_red_first(onnx_file: OnnxFile) -> None:
    """A network that looks at another channel does not find the red square."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[24:32, 40:48, 2] = 255
    assert opened(seeing(onnx_file))(picture) == []
    assert len(opened(seeing(onnx_file, red=2))(picture)) == 1


def test_the_picture_is_left_as_it_was(onnx_file: OnnxFile) -> None:
    picture = lit(64, 64, 40, 24, 8)
    before = picture.copy()
    picture.setflags(write=False)
    assert len(opened(seeing(onnx_file))(picture)) == 1
    np.testing.assert_array_equal(picture, before)


def test_a_detector_file_with_another_digest_is_refused(onnx_file: OnnxFile) -> None:
    with pytest.raises(ModelError, match="SHA-256"):
        Scrfd(seeing(onnx_file).path, "0" * 64, min_score=0.5, longest_side=640)


@pytest.mark.parametrize(
    "outputs",
    [NAMES[:6], NAMES[3:], NAMES[:8], NAMES[:1]],
    ids=["no landmarks", "no scores", "one missing", "scores of one stride"],
)
def test_a_network_without_all_nine_outputs_is_refused_when_it_is_opened(
    onnx_file: OnnxFile, outputs: list[str]
) -> None:
    """SCRFD comes without landmarks too; a face could not be aligned by it."""
    config = seeing(onnx_file, order=outputs)
    with pytest.raises(ModelError, match=f"{Path(config.path).name}: no SCRFD with landmarks"):
        opened(config)


def test_a_network_of_another_kind_is_refused_when_it_is_opened(onnx_file: OnnxFile) -> None:
    other = onnx_file([helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)], takes=("N", 3, "H", "W"))
    with pytest.raises(ModelError, match="no SCRFD with landmarks"):
        opened(other)
