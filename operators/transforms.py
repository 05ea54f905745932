"""Known leaks made on purpose: what an audit that says "not found" must have been able to find.

A planted positive is a release image made from a gallery image (or from two) by one of `TRANSFORMS`. What is drawn at
random is drawn from a seed and kept, so that a planted image can be made again and its class of leak explained.
Images are RGB uint8 of shape (H, W, 3); every transform keeps the shape, so that sizes never betray what was planted.
"""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.errors import ConfigError
from operators.tables import FACE_PIXELS

Image = NDArray[np.uint8]
Parameters = Mapping[str, float]

GeneratorHook = Callable[[Sequence[Image], np.random.Generator], Image]
"""A hook for planted images that a generator makes: source images and a random stream in, one image out. It must draw
from the stream only, so that the same seed gives the same image (image-to-image diffusion at a stated strength, face
swap, reconstruction from an embedding)."""

NEAR_COPY, BLEND = "near_copy", "blend"
"""Classes of leaks: recall is reported per class."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in the grey level (ITU-R BT.601)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transform:
    """One way in which a source image becomes a planted one."""

    name: str
    leak: str
    """`NEAR_COPY` or `BLEND`."""
    sources: int
    """Images that it takes."""
    does: str
    """In words, for the report."""
    ranges: Mapping[str, tuple[float, float]]
    """Lowest and highest value of each parameter; one value per image is drawn, all equally likely."""
    make: Callable[[Sequence[Image], Parameters], Image]
    """The image, from sources and parameters alone."""


class Planted(NamedTuple):
    """A planted image and how it came about."""

    image: Image
    parameters: dict[str, float]
    """What was drawn, by the names of `Transform.ranges`."""


def plant(name: str, sources: Sequence[Image], seed: int, key: str) -> Planted:
    """The planted image called `key`, made from `sources` by the transform `name`.

    The same arguments give the same image for one version of OpenCV and Pillow. Each (seed, name, key) has a random
    stream of its own, so that planting one image more changes no other.

    Raises
    ------
    ConfigError
        If there is no such transform.
    ValueError
        If it takes another number of images, or one of them is not RGB uint8 of shape (H, W, 3), or the two of a blend
        differ in shape.
    """
    transform = transform_called(name)
    _check(sources, transform.sources, name)
    rng = stream(seed, name, key)
    parameters = {what: float(rng.uniform(*limits)) for what, limits in transform.ranges.items()}
    return Planted(transform.make(sources, parameters), parameters)


def plant_generated(hook: GeneratorHook, name: str, sources: Sequence[Image], seed: int, key: str) -> Planted:
    """As `plant`, made by a generator; `name` says which, and is part of the random stream's name.

    Raises
    ------
    ValueError
        If a source or the generator's image is not RGB uint8 of shape (H, W, 3).
    """
    _check(sources, len(sources), name)
    image = hook(sources, stream(seed, name, key))
    _check([image], 1, f"the image made by {name}")
    return Planted(image, {})


def transform_called(name: str) -> Transform:
    """The transform called `name`; ConfigError if there is none."""
    if name not in TRANSFORMS:
        raise ConfigError(f"transform {name!r} is not known. Use one of {', '.join(TRANSFORMS)}.")
    return TRANSFORMS[name]


def stream(seed: int, *name: str) -> np.random.Generator:
    """The random stream of that name: independent of all others, and the same wherever it is asked for."""
    text = b"".join(len(part).to_bytes(8, "big") + part for part in (p.encode() for p in (str(seed), *name)))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest(), "big"))


def _check(images: Sequence[Image], count: int, name: str) -> None:
    if len(images) != count or not images:
        raise ValueError(f"{name}: takes {count or 'some'} image(s). Got {len(images)}.")
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"{name}: an image is uint8 pixels (H, W, 3). Got {image.dtype} {image.shape}.")


def _copy(sources: Sequence[Image], _: Parameters) -> Image:
    return sources[0].copy()


def _jpeg(sources: Sequence[Image], drawn: Parameters) -> Image:
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(sources[0]).save(file, "JPEG", quality=round(drawn["quality"]))
    return np.asarray(PIL.Image.open(file).convert("RGB"))


def _crop(sources: Sequence[Image], drawn: Parameters) -> Image:
    image = sources[0]
    height, width = image.shape[:2]
    top, bottom = round(drawn["top"] * height), round(drawn["bottom"] * height)
    left, right = round(drawn["left"] * width), round(drawn["right"] * width)
    return _resized(image[top : height - bottom, left : width - right], height, width)


def _flip(sources: Sequence[Image], _: Parameters) -> Image:
    return np.ascontiguousarray(sources[0][:, ::-1])


def _colour(sources: Sequence[Image], drawn: Parameters) -> Image:
    pixels = sources[0].astype(np.float32)
    grey = (pixels @ LUMA)[:, :, None]
    vivid = grey + drawn["saturation"] * (pixels - grey)
    warmth = np.array([1 + drawn["temperature"], 1, 1 - drawn["temperature"]], np.float32)
    middle = np.float32(127.5)
    return _pixels(drawn["contrast"] * (warmth * vivid - middle) + middle + 255 * drawn["brightness"])


def _blur(sources: Sequence[Image], drawn: Parameters) -> Image:
    import cv2

    image = sources[0]
    sigma = drawn["sigma"] * min(image.shape[:2]) / FACE_PIXELS
    return np.asarray(cv2.GaussianBlur(image, (0, 0), max(sigma, 0.1), borderType=cv2.BORDER_REFLECT), np.uint8)


def _downscale(sources: Sequence[Image], drawn: Parameters) -> Image:
    import cv2

    image = sources[0]
    height, width = image.shape[:2]
    small = (max(1, round(drawn["factor"] * width)), max(1, round(drawn["factor"] * height)))
    return _resized(cv2.resize(image, small, interpolation=cv2.INTER_AREA), height, width)


def _blend(sources: Sequence[Image], drawn: Parameters) -> Image:
    first, second = sources
    if first.shape != second.shape:
        raise ValueError(f"blend: both images need the same shape: align them. Got {first.shape} and {second.shape}.")
    share = np.float32(drawn["share"])
    return _pixels(share * first.astype(np.float32) + (1 - share) * second.astype(np.float32))


def _resized(image: Image, height: int, width: int) -> Image:
    import cv2

    whole = np.ascontiguousarray(image)
    return np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def _pixels(values: NDArray[np.floating]) -> Image:
    """Grey levels rounded and clipped to uint8."""
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


def _near_copy(name: str, does: str, make: Callable[..., Image], **ranges: tuple[float, float]) -> Transform:
    return Transform(name=name, leak=NEAR_COPY, sources=1, does=does, ranges=MappingProxyType(ranges), make=make)


def _of_two(name: str, does: str, share: float) -> Transform:
    ranges = MappingProxyType({"share": (share, share)})
    return Transform(name=name, leak=BLEND, sources=2, does=does, ranges=ranges, make=_blend)


_SIDE = (0.0, 0.1)

_ALL = (
    _near_copy("copy", "the source itself", _copy),
    _near_copy("jpeg", "saved again as JPEG of the drawn quality", _jpeg, quality=(50, 95)),
    _near_copy(
        "crop",
        "less the drawn share of each side, brought back to its size",
        _crop,
        top=_SIDE,
        bottom=_SIDE,
        left=_SIDE,
        right=_SIDE,
    ),
    _near_copy("flip", "mirrored left to right", _flip),
    _near_copy(
        "colour",
        "saturation and contrast times the drawn value, brightness plus it; red up and blue down by the temperature",
        _colour,
        brightness=(-0.12, 0.12),
        contrast=(0.7, 1.3),
        saturation=(0.3, 1.6),
        temperature=(-0.15, 0.15),
    ),
    _near_copy("blur", "out of focus: a Gaussian of sigma pixels, were the image 112 wide", _blur, sigma=(0.5, 2.0)),
    _near_copy("downscale", "made smaller by the factor, and large again", _downscale, factor=(0.25, 0.6)),
    _of_two("blend_50", "the pixelwise mean of two aligned faces", 0.5),
    _of_two("blend_70", "0.7 of the first aligned face and 0.3 of the second", 0.7),
)

TRANSFORMS: Mapping[str, Transform] = MappingProxyType({transform.name: transform for transform in _ALL})
"""All transforms by name, in the order of reports."""
