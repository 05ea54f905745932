"""Alignment: the least-squares similarity transform, and pixels that land where the template says."""

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from operators.alignment import ALIGNMENTS, align, realign, similarity_transform
from operators.errors import ConfigError
from operators.records import CROP_COLUMNS, FACE

TEMPLATE_52 = ALIGNMENTS["arcface112"].template_52
DLIB_52 = ALIGNMENTS["dlib150"].template_52


def transform(angle: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.column_stack([scale * rotation, shift])


def moved(points_N2: np.ndarray, matrix_23: np.ndarray) -> np.ndarray:
    return points_N2 @ matrix_23[:, :2].T + matrix_23[:, 2]


def umeyama(source_N2: np.ndarray, target_N2: np.ndarray) -> np.ndarray:
    """Equations 40 to 43 of Umeyama (IEEE PAMI 13(4), 1991), with the correction for reflections."""
    source_mean, target_mean = source_N2.mean(0), target_N2.mean(0)
    source, target = source_N2 - source_mean, target_N2 - target_mean
    left, singular, right = np.linalg.svd(target.T @ source / len(source))
    sign = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    rotation = left @ np.diag(sign) @ right
    scale = (singular * sign).sum() / (source**2).sum(1).mean()
    return np.column_stack([scale * rotation, target_mean - scale * rotation @ source_mean])


def test_the_template_is_the_arcface_one() -> None:
    """As published: `arcface_dst` in insightface's face_align.py."""
    expected = [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
    np.testing.assert_allclose(TEMPLATE_52, expected)


def test_the_dlib_template_is_the_measured_one_and_lies_in_the_chip() -> None:
    expected = [[47.71, 46.01], [102.53, 45.73], [75.28, 77.33], [51.19, 101.15], [99.55, 101.97]]
    np.testing.assert_allclose(DLIB_52, expected)
    assert ALIGNMENTS["dlib150"].pixels == 150


def test_every_alignment_has_its_column_of_crops() -> None:
    assert set(CROP_COLUMNS) == set(ALIGNMENTS)
    assert set(CROP_COLUMNS.values()) < {field.name for field in FACE}
    assert CROP_COLUMNS["arcface112"] == "crop"


angles = st.floats(-np.pi, np.pi)
scales = st.floats(0.02, 50)
shifts = st.tuples(st.floats(-4000, 4000), st.floats(-4000, 4000))


@settings(max_examples=100, deadline=None)
@given(angle=angles, scale=scales, shift=shifts)
def test_a_known_rotation_scale_and_shift_is_recovered(angle: float, scale: float, shift: tuple[float, float]) -> None:
    expected = transform(angle, scale, shift)
    found = similarity_transform(TEMPLATE_52, moved(TEMPLATE_52, expected))
    np.testing.assert_allclose(found, expected, atol=1e-7 * max(1, scale))
    back = similarity_transform(moved(TEMPLATE_52, expected), TEMPLATE_52)
    np.testing.assert_allclose(moved(moved(TEMPLATE_52, expected), back), TEMPLATE_52, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), noise=st.floats(0, 15), angle=angles, scale=scales)
def test_noisy_landmarks_give_umeyamas_closed_form(seed: int, noise: float, angle: float, scale: float) -> None:
    shaken = TEMPLATE_52 + np.random.default_rng(seed).normal(0, noise, (5, 2))
    centred, target = shaken - shaken.mean(0), TEMPLATE_52 - TEMPLATE_52.mean(0)
    assume(np.linalg.det(target.T @ centred) > 1)  # else the best transform would be a reflection, which a face is not
    source = moved(shaken, transform(angle, scale, (300.0, -20.0)))
    found = similarity_transform(source, TEMPLATE_52)
    np.testing.assert_allclose(moved(source, found), moved(source, umeyama(source, TEMPLATE_52)), atol=1e-6)


def test_a_mirrored_face_is_not_mirrored_back() -> None:
    mirrored = TEMPLATE_52 * [-1, 1] + [112, 0]
    found = similarity_transform(mirrored, TEMPLATE_52)
    assert np.linalg.det(found[:, :2]) > 0


def test_landmarks_on_the_template_stay() -> None:
    found = similarity_transform(TEMPLATE_52, TEMPLATE_52)
    np.testing.assert_allclose(found, [[1, 0, 0], [0, 1, 0]], atol=1e-10)


@pytest.mark.parametrize("point", [(0.0, 0.0), (7.0, 3.0), (1000.1, 770.3), (1e6 / 3, 1e6 / 7)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_coinciding_landmarks_determine_nothing(point: tuple[float, float], dtype: type) -> None:
    with pytest.raises(ValueError, match="coincide"):
        similarity_transform(np.tile(np.array(point, dtype), (5, 1)), TEMPLATE_52)
    with pytest.raises(ValueError, match="coincide"):
        align(np.zeros((50, 50, 3), np.uint8), np.tile(np.array(point, dtype), (5, 1)))


def test_an_aligned_face_passes_unchanged() -> None:
    face = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    np.testing.assert_array_equal(align(face, TEMPLATE_52), face)


def test_a_shifted_face_is_cut_out_exactly() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    found = align(picture, TEMPLATE_52 + np.array([31, 120]))
    np.testing.assert_array_equal(found, picture[120:232, 31:143])


def test_a_face_on_its_side_is_turned_exactly() -> None:
    face = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    turned = np.rot90(face)  # counter-clockwise: the pixel at (x, y) goes to (y, 111 - x)
    landmarks = np.stack([TEMPLATE_52[:, 1], 111 - TEMPLATE_52[:, 0]], axis=1)
    assert np.abs(align(np.ascontiguousarray(turned), landmarks).astype(int) - face).max() <= 1


@pytest.mark.parametrize("name", ALIGNMENTS)
@pytest.mark.parametrize(
    ("angle", "scale", "shift"), [(0.0, 2.0, (40, 60)), (0.5, 3.0, (250, 50)), (-2.5, 1.3, (320, 330))]
)
def test_marks_drawn_on_the_landmarks_come_to_lie_on_the_template(
    angle: float, scale: float, shift: tuple[int, int], name: str
) -> None:
    pixels, template_52 = ALIGNMENTS[name]
    landmarks = moved(template_52, transform(angle, scale * 112 / pixels, shift))
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (250, 0, 250)]
    picture = np.zeros((500, 500, 3), np.uint8)
    for (x, y), colour in zip(landmarks, colours, strict=True):
        centre = (round(x * 256), round(y * 256))
        cv2.circle(picture, centre, round(5 * scale * 256), colour, -1, cv2.LINE_AA, shift=8)
    found = align(picture, landmarks.astype(np.float32), name).astype(float)
    assert found.shape == (pixels, pixels, 3)
    y, x = np.mgrid[:pixels, :pixels]
    for target, colour in zip(template_52, colours, strict=True):
        near = np.hypot(x - target[0], y - target[1]) < 9 * pixels / 112
        weight = found @ np.array(colour) / np.square(colour).sum() * near
        centroid = np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()
        np.testing.assert_allclose(centroid, target, atol=0.25)
        np.testing.assert_allclose(found[round(target[1]), round(target[0])], colour, atol=2)


def test_a_face_on_the_dlib_template_passes_unchanged_as_dlib_and_is_dark_nowhere() -> None:
    face = np.random.default_rng(0).integers(1, 256, (150, 150, 3), np.uint8)
    np.testing.assert_array_equal(align(face, DLIB_52, "dlib150"), face)


def test_the_given_arcface_crop_is_its_own_arcface_alignment() -> None:
    face = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    assert realign(face, "arcface112") is face


def test_of_a_given_arcface_crop_the_dlib_crop_is_that_of_the_whole_picture_where_both_have_pixels() -> None:
    """With landmarks exactly on the ArcFace template; by hand, at most a ninth lies beyond the given crop."""
    y, x = np.mgrid[:300, :300]
    picture = np.stack([100 + 90 * np.sin(x / 17), 100 + 90 * np.cos(y / 19), (x + y) / 3], 2).astype(np.uint8)
    landmarks = TEMPLATE_52 + 90  # a shift by whole pixels, so that the ArcFace crop is a plain cut
    given = align(picture, landmarks)
    whole, made = align(picture, landmarks, "dlib150"), realign(given, "dlib150")
    matrix = umeyama(TEMPLATE_52, DLIB_52)
    places = np.stack(np.meshgrid(np.arange(150), np.arange(150)), 2).reshape(-1, 2)
    back = (places - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T
    inside = ((back > 0) & (back < 111)).all(1)
    beyond = ((back < -1) | (back > 112)).any(1)
    assert 0.85 < inside.mean() < 0.92
    np.testing.assert_array_equal(made.reshape(-1, 3)[beyond], 0)
    assert np.abs(made.reshape(-1, 3)[inside].astype(int) - whole.reshape(-1, 3)[inside]).max() <= 1


def test_an_unknown_alignment_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"alignment 'x' is not known. Use arcface112 or dlib150 \(embedder"):
        align(np.zeros((50, 50, 3), np.uint8), TEMPLATE_52, "x")


def test_beyond_the_picture_is_black() -> None:
    white = np.full((112, 112, 3), 255, np.uint8)
    found = align(white, TEMPLATE_52 - np.array([50, 0]))
    assert found[:, :49].max() == 0
    assert found[:, 51:].min() == 255


def test_the_picture_is_left_as_it_was() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    before = picture.copy()
    picture.setflags(write=False)
    align(picture, TEMPLATE_52 * 1.5)
    np.testing.assert_array_equal(picture, before)
