import io

import numpy as np
import PIL.Image
import pytest

from operators.images import ImageLimits, decode
from operators.pictures import CONTEXT, COVER_RGB, PADDING_RGB, picture

SIDE = 144
TOLERANCE = 3
"""Levels by which JPEG may change a flat colour."""


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(data))).astype(int)


def noise(seed: int, height: int = 200, width: int = 180) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def face_area(box):
    """Slices of the picture in which the face box lies, less one JPEG block at the edges of the image.

    By hand: the picture is a square of 1.6 longer sides of the box, with the same middle.
    """
    x, y, w, h = box
    square = CONTEXT * max(w, h)
    left, top = x + w / 2 - square / 2, y + h / 2 - square / 2
    edges = [(at - origin) * SIDE / square for at, origin in ((y, top), (y + h, top), (x, left), (x + w, left))]
    block = 8 if x == 0 or x + w == 180 else 0
    rows, columns = (slice(int(a) + block, int(np.ceil(b)) - block) for a, b in (edges[:2], edges[2:]))
    return rows, columns


BOXES = [(60, 60, 50, 70), (61.3, 58.7, 33.9, 20.2), (90, 100, 8, 9), (0, 0, 60, 60), (120, 130, 60, 70)]


@pytest.mark.parametrize("box", BOXES)
def test_every_pixel_of_a_covered_face_box_is_the_cover(box):
    found = pixels(picture(noise(1), box, covered=True))
    rows, columns = face_area(box)
    assert found.shape == (SIDE, SIDE, 3)
    assert np.abs(found[rows, columns] - COVER_RGB).max() <= TOLERANCE


@pytest.mark.parametrize("box", [*BOXES, (-20, -30, 80, 90), (150, 170, 60, 80), None])
def test_nothing_of_the_face_reaches_a_covered_picture(box):
    first = noise(1)
    second = first.copy()
    x, y, w, h = box or (0, 0, 180, 200)
    area = (slice(max(0, int(y)), int(np.ceil(y + h))), slice(max(0, int(x)), int(np.ceil(x + w))))
    second[area] = noise(2)[area]
    assert not np.array_equal(first, second)
    assert picture(first, box, covered=True) == picture(second, box, covered=True)
    assert picture(first, box, covered=False) != picture(second, box, covered=False)


@pytest.mark.parametrize(
    "box", [None, (0, 0, 0, 10), (5, 5, -3, 4), (float("nan"), 0, 9, 9), (0, 0, float("inf"), 9), (500, 500, 9, 9)]
)
def test_without_a_usable_box_everything_is_covered(box):
    found = pixels(picture(noise(1, 112, 112), box, covered=True))
    assert np.abs(found - COVER_RGB).max() <= TOLERANCE


def test_a_clear_picture_shows_the_surroundings_of_the_face():
    image = np.zeros((200, 200, 3), np.uint8)
    image[:, 100:] = 255
    found = pixels(picture(image, (75, 75, 50, 50), covered=False))
    assert found[:, : SIDE // 2 - 6].max() <= 12
    assert found[:, SIDE // 2 + 6 :].min() >= 243


def test_beyond_the_image_is_grey():
    found = pixels(picture(np.full((60, 60, 3), 255, np.uint8), (0, 0, 40, 40), covered=False))
    # The square is 64 pixels wide and begins 12 pixels outside, so 27 of 144 pixels are padding.
    assert np.abs(found[:19, :19] - PADDING_RGB).max() <= TOLERANCE
    assert found[40, 40:100].min() >= 250


def test_an_aligned_crop_is_shown_whole_and_another_shape_is_padded():
    assert np.abs(pixels(picture(np.full((112, 112, 3), 9, np.uint8), None, covered=False)) - 9).max() <= TOLERANCE
    wide = pixels(picture(np.full((50, 100, 3), 250, np.uint8), None, covered=False))
    assert np.abs(wide[:28] - PADDING_RGB).max() <= TOLERANCE
    assert np.abs(wide[48:96] - 250).max() <= TOLERANCE


@pytest.mark.parametrize("covered", [True, False])
def test_no_metadata_of_the_source_survives(covered):
    source, exif = io.BytesIO(), PIL.Image.Exif()
    exif[0x010E] = "SECRET-DESCRIPTION"
    exif.get_ifd(0x8825)[1] = "N"
    PIL.Image.fromarray(noise(3)).save(source, "JPEG", exif=exif, comment=b"SECRET-COMMENT", icc_profile=b"SECRET-ICC")
    assert source.getvalue().count(b"SECRET") == 3
    made = picture(decode(source.getvalue(), ImageLimits()), (50, 50, 60, 60), covered=covered)
    again = PIL.Image.open(io.BytesIO(made))
    assert b"SECRET" not in made
    assert not again.getexif()
    assert set(again.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_the_source_pixels_are_left_alone():
    image = noise(4)
    kept = image.copy()
    picture(image, (50, 50, 60, 60), covered=True)
    assert np.array_equal(image, kept)


@pytest.mark.parametrize("image", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)])
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match="uint8 pixels"):
        picture(image, None, covered=False)


def test_a_box_far_larger_than_the_image_costs_no_memory():
    assert len(picture(noise(5), (-1e7, -1e7, 3e7, 3e7), covered=True)) < 5_000
