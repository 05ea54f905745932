"""Faces brought to one place: five landmarks to the template that a network was trained on."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.errors import ConfigError
from operators.tables import FACE_PIXELS


class Alignment(NamedTuple):
    """Where a face lies in its crop."""

    pixels: int
    """Side of the crop."""
    template_52: NDArray[np.float64]
    """Where the eyes, the nose tip and the mouth corners go, image-left first: x and y in pixels."""


ARCFACE = "arcface112"

ALIGNMENTS = {
    # ArcFace (Deng et al., CVPR 2019); `arcface_dst` of InsightFace.
    ARCFACE: Alignment(
        FACE_PIXELS,
        np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]),
    ),
    # The face chip of dlib (150 pixels, padding 0.25), which dlib cuts by five or 68 other landmarks: the median place
    # of YuNet's five points in it over 398 photographs of LFW.
    "dlib150": Alignment(
        150,
        np.array([[47.71, 46.01], [102.53, 45.73], [75.28, 77.33], [51.19, 101.15], [99.55, 101.97]]),
    ),
}
"""The face crops that networks are trained on, by the names that `embedder.alignment` takes."""


def alignment(name: str) -> Alignment:
    """The alignment called `name`; ConfigError if there is none."""
    if name not in ALIGNMENTS:
        raise ConfigError(f"alignment {name!r} is not known. Use {' or '.join(ALIGNMENTS)} (embedder.alignment).")
    return ALIGNMENTS[name]


def similarity_transform(points_52: NDArray[np.floating], target_52: NDArray[np.floating]) -> NDArray[np.float64]:
    """The 2 x 3 matrix of rotation, uniform scale and shift that takes `points_52` nearest to `target_52`.

    Least squares over the four parameters, which is linear; without reflection it equals the estimator of Umeyama
    (IEEE PAMI 13(4), 1991).

    Raises
    ------
    ValueError
        If the points coincide, so that no transform is determined.
    """
    x, y = np.asarray(points_52, np.float64).T
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    solution, _, rank, _ = np.linalg.lstsq(rows, np.asarray(target_52, np.float64).T.ravel(), rcond=None)
    if rank < 4:
        raise ValueError("the landmarks coincide")
    a, b, shift_x, shift_y = solution
    return np.array([[a, -b, shift_x], [b, a, shift_y]])


def align(image_HWC: NDArray[np.uint8], landmarks_52: NDArray[np.floating], name: str = ARCFACE) -> NDArray[np.uint8]:
    """The face cut out of an image by the alignment `name`, shape (P, P, 3), bilinear, black where the image ends.

    Parameters
    ----------
    image_HWC
        RGB pixels.
    landmarks_52
        Eyes, nose tip and mouth corners, image-left first: x and y in pixels of `image_HWC`.
    name
        One of `ALIGNMENTS`; P is its number of pixels.

    Raises
    ------
    ValueError
        If the landmarks coincide.
    """
    import cv2

    pixels, template_52 = alignment(name)
    matrix = similarity_transform(landmarks_52, template_52)
    face = cv2.warpAffine(image_HWC, matrix, (pixels, pixels), flags=cv2.INTER_LINEAR, borderValue=0)
    return np.asarray(face, np.uint8)


def realign(face_HWC: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """The alignment `name` of a face that is aligned to `ARCFACE` already, for sets that hold such faces only.

    The landmarks are taken to lie on the template, so this is the similarity between the two templates. Pixels that the
    given face does not hold are black: for `dlib150` the lowest ninth of the crop, from the chin down. And the
    templates differ by more than a similarity, up to four pixels of 150. An embedding of such a face is near that of
    the original image and not equal to it.
    """
    return face_HWC if name == ARCFACE else align(face_HWC, ALIGNMENTS[ARCFACE].template_52, name)
