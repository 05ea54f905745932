"""Pixels that a set holds unencoded, as the simplest encoded image: binary PPM (P6) or PGM (P5).

The same pixels give the same bytes in every form, so that digests mean the same.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 150_000_000
"""Of one unencoded image: 50 million RGB pixels (`operators.images.ImageLimits`)."""

SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"P5", b"P6")
"""What encoded images begin with."""


def axes(shape: Sequence[int]) -> str | None:
    """`HWC`, `CHW` or `HW` for the shape of one image of 1 or 3 channels, None if it has none of these."""
    if len(shape) == 2 and min(shape) > 0:
        return "HW"
    if len(shape) != 3 or min(shape) <= 0:
        return None
    if shape[2] in (1, 3):
        return "HWC"
    return "CHW" if shape[0] in (1, 3) else None


def netpbm(pixels: NDArray[np.uint8], order: str) -> bytes:
    """One image, its axes in the order `HWC`, `CHW` or `HW`, as PPM or PGM bytes."""
    if order == "CHW":
        pixels = np.moveaxis(pixels, 0, 2)
    height, width = pixels.shape[:2]
    kind = 6 if pixels.shape[2:] == (3,) else 5
    return b"P%d\n%d %d\n255\n" % (kind, width, height) + np.ascontiguousarray(pixels).tobytes()


def netpbm_size(shape: Sequence[int], order: str) -> int:
    """Length of what `netpbm` gives for an image of this shape."""
    height, width = shape[1:] if order == "CHW" else shape[:2]
    channels = {"HWC": shape[-1], "CHW": shape[0]}.get(order, 1)
    return len(b"P5\n%d %d\n255\n" % (width, height)) + height * width * channels
