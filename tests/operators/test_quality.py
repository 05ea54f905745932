"""Sharpness, against OpenCV's Laplacian and against pictures whose answer is computed by hand."""

import cv2
import numpy as np
import pytest

from operators.quality import sharpness


def noise(side: int = 112) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)


@pytest.mark.parametrize("side", [3, 5, 112, 150])
def test_it_is_the_variance_of_opencvs_laplacian_away_from_the_rim(side: int) -> None:
    grey = cv2.cvtColor(noise(side).astype(np.float32), cv2.COLOR_RGB2GRAY)
    expected = cv2.Laplacian(grey, cv2.CV_32F, ksize=1)[1:-1, 1:-1].astype(np.float64).var()
    assert sharpness(noise(side)) == pytest.approx(expected, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 10, 90)])
def test_a_flat_picture_and_an_even_slope_have_none(colour: tuple[int, int, int]) -> None:
    assert sharpness(np.full((112, 112, 3), colour, np.uint8)) == pytest.approx(0, abs=1e-6)
    slope = np.broadcast_to((np.arange(112) * 2)[:, None, None], (112, 112, 3)).astype(np.uint8)
    assert sharpness(slope) == pytest.approx(0, abs=1e-6)


def test_one_bright_pixel_counts_as_computed_by_hand() -> None:
    """A pixel of 100 gives -400 at itself and 100 at four neighbours: mean 0, mean square 200,000 / 110^2."""
    dot = np.zeros((112, 112, 3), np.uint8)
    dot[50, 60] = 100
    assert sharpness(dot) == pytest.approx(200_000 / 110**2, rel=1e-5)


def test_green_weighs_more_than_red_and_red_more_than_blue() -> None:
    pure = [noise() * np.array(channel, np.uint8) for channel in ([1, 0, 0], [0, 1, 0], [0, 0, 1])]
    red, green, blue = map(sharpness, pure)
    assert green > red > blue > 0


def test_it_falls_with_every_blur_and_scaling(portraits: list[np.ndarray]) -> None:
    for portrait in portraits:
        face = np.ascontiguousarray(portrait[8:120, 8:120])
        blurred = [sharpness(cv2.GaussianBlur(face, (0, 0), sigma)) for sigma in (0.5, 1.0, 2.0, 4.0)]
        assert [sharpness(face), *blurred] == sorted([sharpness(face), *blurred], reverse=True)
        small = cv2.resize(face, (28, 28), interpolation=cv2.INTER_AREA)
        assert sharpness(cv2.resize(small, (112, 112), interpolation=cv2.INTER_CUBIC)) < sharpness(face) / 2
