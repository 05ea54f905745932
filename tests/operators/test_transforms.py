import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter

from operators import transforms
from operators.errors import ConfigError
from operators.selftest import drawn_face
from operators.transforms import TRANSFORMS, plant, plant_generated

FACE = drawn_face()
OTHER = np.ascontiguousarray(255 - FACE[::-1])


def sources(name: str) -> list[np.ndarray]:
    return [FACE, OTHER][: TRANSFORMS[name].sources]


def close(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left.astype(int) - right.astype(int)).mean())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_seed_and_a_key_make_one_image(name: str) -> None:
    before = FACE.copy()
    made = plant(name, sources(name), 3, "a/1.jpg")
    again = plant(name, sources(name), 3, "a/1.jpg")
    assert made.image.shape == FACE.shape and made.image.dtype == np.uint8
    np.testing.assert_array_equal(made.image, again.image)
    np.testing.assert_array_equal(made.image, TRANSFORMS[name].make(sources(name), made.parameters))
    np.testing.assert_array_equal(FACE, before)
    assert not np.shares_memory(made.image, FACE)
    ranges = TRANSFORMS[name].ranges
    assert made.parameters == again.parameters and list(made.parameters) == list(ranges)
    assert all(low <= made.parameters[what] <= high for what, (low, high) in ranges.items())
    free = any(low < high for low, high in ranges.values())
    assert (made.parameters != plant(name, sources(name), 3, "a/2.jpg").parameters) == free
    assert (made.parameters != plant(name, sources(name), 4, "a/1.jpg").parameters) == free


def test_odd_sizes_keep_their_shape() -> None:
    for name, transform in TRANSFORMS.items():
        for shape in ((1, 1, 3), (3, 7, 3), (41, 20, 3)):
            image = np.full(shape, 77, np.uint8)
            assert plant(name, [image] * transform.sources, 1, "k").image.shape == shape


def test_jpeg_is_pillows() -> None:
    file = io.BytesIO()
    Image.fromarray(FACE).save(file, "JPEG", quality=73)
    made = TRANSFORMS["jpeg"].make([FACE], {"quality": 73.2})
    np.testing.assert_array_equal(made, np.asarray(Image.open(file)))


def test_crop_is_pillows_resized_box() -> None:
    made = TRANSFORMS["crop"].make([FACE], {"top": 0.1, "bottom": 0.02, "left": 0.0, "right": 0.05})
    box = (0, 11, 112 - 6, 112 - 2)
    expected = np.asarray(Image.fromarray(FACE).resize((112, 112), Image.Resampling.BICUBIC, box=box))
    assert close(made, expected) < 1 < 5 < close(made, FACE)


def test_flip_and_copy() -> None:
    np.testing.assert_array_equal(plant("flip", [FACE], 1, "k").image, FACE[:, ::-1])
    np.testing.assert_array_equal(plant("copy", [FACE], 1, "k").image, FACE)


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ({}, (200, 100, 50)),
        ({"brightness": 0.1}, (226, 126, 76)),  # 25.5 up, halves to even: 225.5, 125.5 and 75.5
        ({"contrast": 1.2}, (214, 94, 34)),  # 127.5 + 1.2 (200 - 127.5) = 214.5
        ({"saturation": 0.0}, (124, 124, 124)),  # 0.299 200 + 0.587 100 + 0.114 50 = 124.2
        ({"temperature": 0.1}, (220, 100, 45)),
        ({"brightness": 1.0}, (255, 255, 255)),
    ],
)
def test_colour_by_hand(drawn: dict[str, float], expected: tuple[int, int, int]) -> None:
    neutral = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "temperature": 0.0}
    made = TRANSFORMS["colour"].make([np.full((2, 2, 3), (200, 100, 50), np.uint8)], neutral | drawn)
    assert made[0, 0].tolist() == list(expected)


def test_blur_grows_with_the_image() -> None:
    made = TRANSFORMS["blur"].make([FACE], {"sigma": 1.5})
    assert (
        close(made[8:-8, 8:-8], np.asarray(Image.fromarray(FACE).filter(ImageFilter.GaussianBlur(1.5)))[8:-8, 8:-8])
        < 1.5
    )
    large = TRANSFORMS["blur"].make([cv2.resize(FACE, (224, 224))], {"sigma": 1.5})
    assert close(cv2.resize(large, (112, 112), interpolation=cv2.INTER_AREA), made) < 1.5


def test_downscale_leaves_no_detail() -> None:
    stripes = np.zeros((112, 112, 3), np.uint8)
    stripes[:, ::2] = 255
    made = TRANSFORMS["downscale"].make([stripes], {"factor": 0.25})
    assert made.std() < 1 and abs(made.mean() - 127.5) < 1


def test_blends_by_hand() -> None:
    first, second = np.full((2, 2, 3), 200, np.uint8), np.full((2, 2, 3), 51, np.uint8)
    assert plant("blend_50", [first, second], 1, "k").image[0, 0, 0] == 126  # 125.5, to even
    assert plant("blend_70", [first, second], 1, "k").image[0, 0, 0] == 155  # 140 + 15.3
    with pytest.raises(ValueError, match="need the same shape"):
        plant("blend_50", [first, FACE], 1, "k")


def test_a_generators_images_go_the_same_way() -> None:
    def noisy(images: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
        return (images[0] // 2 + rng.integers(0, 9, images[0].shape)).astype(np.uint8)

    made = [plant_generated(noisy, name, [FACE], 5, "k").image for name in ("weak", "weak", "strong")]
    np.testing.assert_array_equal(made[0], made[1])
    assert close(made[0], made[2]) > 1
    with pytest.raises(ValueError, match=r"the image made by broken: .* Got float64 \(2, 2\)"):
        plant_generated(lambda images, rng: np.zeros((2, 2)), "broken", [FACE], 5, "k")


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="transform 'melt' is not known"):
        plant("melt", [FACE], 1, "k")
    with pytest.raises(ValueError, match=r"blend_50: takes 2 image\(s\). Got 1"):
        plant("blend_50", [FACE], 1, "k")
    with pytest.raises(ValueError, match=r"flip: an image is uint8 pixels \(H, W, 3\). Got uint8 \(112, 112\)"):
        plant("flip", [FACE[:, :, 0]], 1, "k")


def test_streams_do_not_run_together() -> None:
    names = [("a", "bc"), ("ab", "c"), ("abc",), ("a", "b", "c")]
    drawn = {transforms.stream(1, *name).integers(0, 2**62) for name in names}
    assert len(drawn) == len(names)


def test_the_registry_is_closed_and_described() -> None:
    with pytest.raises(TypeError):
        TRANSFORMS["new"] = TRANSFORMS["copy"]  # type: ignore[index]
    for name, transform in TRANSFORMS.items():
        assert transform.name == name and transform.does and transform.leak in ("near_copy", "blend")
        assert transform.sources == (2 if transform.leak == "blend" else 1)
