"""Faces brought to one place: five landmarks to the ArcFace template, 112 x 112 pixels."""

import numpy as np
from numpy.typing import NDArray

from operators.tables import FACE_PIXELS

TEMPLATE_52 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float64
)
"""Where the eyes, the nose tip and the mouth corners go, image-left first (ArcFace, Deng et al., CVPR 2019)."""


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


def align(image_HWC: NDArray[np.uint8], landmarks_52: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The aligned face, shape (112, 112, 3), bilinear, black where the image ends."""
    import cv2

    matrix = similarity_transform(landmarks_52, TEMPLATE_52)
    face = cv2.warpAffine(image_HWC, matrix, (FACE_PIXELS, FACE_PIXELS), flags=cv2.INTER_LINEAR, borderValue=0)
    return np.asarray(face, np.uint8)
