"""How good a face picture is, as far as its pixels tell."""

import numpy as np
from numpy.typing import NDArray

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in the luminance (ITU-R BT.601)."""


def sharpness(face_HWC: NDArray[np.uint8]) -> float:
    """Variance of the Laplacian of the luminance, in squared grey levels: low where a face is blurred or enlarged.

    The LAPV measure of Pech-Pacheco et al. ("Diatom autofocusing in brightfield microscopy: a comparative study", ICPR
    2000) with the Laplacian of four neighbours. Pixels at the rim, which have fewer, are left out. It grows with
    contrast and with noise too, and the black beyond the end of an image adds an edge, so that it compares faces that
    are prepared alike and is no measure of recognisability by itself.

    Parameters
    ----------
    face_HWC
        Aligned RGB face, at least 3 x 3 pixels.
    """
    grey = face_HWC @ LUMA
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float(np.var(around - 4 * grey[1:-1, 1:-1], dtype=np.float64))
