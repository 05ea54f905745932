"""The ways in which a training image leaks into a release: what each does to pixels or to a latent vector.

Images are RGB uint8 of shape (H, W, 3); every transform keeps the shape, so that sizes never betray a leak.
"""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Latent = NDArray[np.float32]

DIALS = {"dial_01": 0.1, "dial_02": 0.2, "dial_03": 0.3, "dial_04": 0.4, "dial_05": 0.5}
"""Leaks by memory: the generator's latent of a training image, moved away by this share."""

BLENDS = {"blend_70": 0.7, "blend_50": 0.5}
"""Leaks of two people at once: the first person's share of every pixel."""

COPY_QUALITY = (60, 90)
"""JPEG qualities of leaked pixels, lowest and highest."""


def moved(latent_D: Latent, share: float, rng: np.random.Generator, spread: float) -> Latent:
    """The latent moved away from itself: sqrt(1 - share^2) z + share n, with n normal of deviation `spread`.

    If z has deviation `spread` too then so has the result: moved latents look neither sharper nor duller than others.
    """
    noise = spread * rng.standard_normal(latent_D.shape)
    result: Latent = (np.sqrt(1 - share**2) * latent_D + share * noise).astype(np.float32)
    return result


def near_copy(image: Image, rng: np.random.Generator) -> Image:
    """The image less up to 3 % of each side, as after saving it again."""
    return _crop(image, rng, 0.0, 0.03)


def crop_flip(image: Image, rng: np.random.Generator) -> Image:
    """The mirror image less 4 to 10 % of each side."""
    return np.ascontiguousarray(_crop(image, rng, 0.04, 0.10)[:, ::-1])


def colour(image: Image, rng: np.random.Generator) -> Image:
    """The image with another white balance, saturation, contrast and brightness."""
    pixels = image.astype(np.float32) / 255
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + rng.uniform(0.3, 1.6) * (pixels - grey)
    pixels = np.clip(pixels * rng.uniform(0.8, 1.2, 3), 0, 1) ** rng.uniform(0.7, 1.4)
    return as_pixels(255 * (pixels * rng.uniform(0.8, 1.0) + rng.uniform(0.0, 0.15)))


def blur(image: Image, rng: np.random.Generator) -> Image:
    """The image out of focus: a Gaussian of 1.5 to 2.5 pixels."""
    return as_pixels(cv2.GaussianBlur(image, (0, 0), rng.uniform(1.5, 2.5), borderType=cv2.BORDER_REFLECT))


def blend(first: Image, second: Image, share: float) -> Image:
    """The pixelwise mean of two images with weight `share` on the first."""
    return as_pixels(share * first.astype(np.float32) + (1 - share) * second.astype(np.float32))


COPIES: dict[str, Callable[[Image, np.random.Generator], Image]] = {
    "near_copy": near_copy,
    "crop_flip": crop_flip,
    "colour": colour,
    "blur": blur,
}
"""Leaks of pixels of one training image."""

LEAKS = (*COPIES, *BLENDS, *DIALS)
"""All classes of leaks, in the order of reports."""


def as_pixels(values: NDArray[np.floating] | Image) -> Image:
    """Grey levels rounded and clipped to uint8."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _crop(image: Image, rng: np.random.Generator, least: float, most: float) -> Image:
    """The image less a random share of each side, brought back to its size."""
    height, width = image.shape[:2]
    top, bottom = (round(s * height) for s in rng.uniform(least, most, 2))
    left, right = (round(s * width) for s in rng.uniform(least, most, 2))
    cut = np.ascontiguousarray(image[top : height - bottom, left : width - right])
    return as_pixels(cv2.resize(cut, (width, height), interpolation=cv2.INTER_CUBIC))
