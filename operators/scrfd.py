"""Face detection with SCRFD (Guo et al., ICLR 2022) and networks of the same outputs, such as InsightFace's det_10g.

Written from the published description. No weights of this kind can be had without their terms (InsightFace offers its
own for non-commercial research only), so this module was **not run here on real weights**: its decoding is checked on
networks that are made for the tests and answer with planted boxes.

The network takes RGB pixels (x - 127.5) / 128. For strides 8, 16 and 32 it gives, for two anchors in each cell, row by
row, a score (0..1), the distances from the cell's corner to the left, top, right and bottom of the box, and the offsets
of five landmarks; distances and offsets are in strides. That makes nine outputs, which are told apart by their sizes:
their names and order differ between exports.
"""

import numpy as np
from numpy.typing import NDArray

from operators.backbones import open_model, runtime_faults
from operators.detectors import MULTIPLE, STRIDES, Detection, Found, scaled
from operators.errors import ModelError

ANCHORS = 2
"""Anchors in each cell. They differ in scale during training only: both are decoded alike."""
OVERLAP = 0.4
"""Boxes with more intersection over union than this are one face (InsightFace's default)."""
WIDTHS = (1, 4, 10)
"""Numbers of one anchor: score, box, landmarks."""


class Scrfd:
    """Finds faces and their five landmarks."""

    def __init__(self, path: str, sha256: str, *, min_score: float, longest_side: int) -> None:
        """Open the model; ModelError if it is missing, altered or no SCRFD with landmarks.

        Parameters
        ----------
        path, sha256
            The ONNX file and its digest. If it takes one size only, images are scaled down to fit, put into the top
            left corner and filled up with black; else they are filled up to a multiple of 32 pixels.
        min_score
            Detections below this are dropped. InsightFace uses 0.5.
        longest_side
            Larger images are scaled down to this many pixels for detection only; landmarks are scaled back.
        """
        self.session = open_model(path, sha256)
        taken = self.session.get_inputs()[0]
        self.input = taken.name
        fixed = [side for side in taken.shape[2:] if isinstance(side, int)]
        self.room = (fixed[0], fixed[1]) if len(fixed) == 2 else None
        self.min_score = min_score
        self.longest_side = longest_side
        self._refuse_others(path)

    def _refuse_others(self, path: str) -> None:
        """ModelError unless the model has SCRFD's outputs for images of any size."""
        try:
            for height, width in ((64, 64), (96, 64)):
                self(np.zeros((height, width, 3), np.uint8))
        except runtime_faults() as error:
            raise ModelError(f"{path}: no SCRFD with landmarks ({error}). Correct faces.detector.") from error

    def __call__(self, image_HWC: NDArray[np.uint8]) -> list[Detection]:
        """Faces in an RGB image, best score first."""
        small = scaled(image_HWC, self.longest_side, self.room)
        height, width = small.shape[:2]
        room = self.room or (height + -height % MULTIPLE, width + -width % MULTIPLE)
        padded = np.pad(small, ((0, room[0] - height), (0, room[1] - width), (0, 0)))
        planes = (padded.transpose(2, 0, 1)[None].astype(np.float32) - 127.5) / 128
        found = self._decode(self.session.run(None, {self.input: np.ascontiguousarray(planes)}), room)
        return found.faces(small.shape, image_HWC.shape, self.min_score, OVERLAP)

    def _decode(self, values: list[NDArray[np.float32]], room: tuple[int, int]) -> Found:
        """Detections over `min_score`, from the network's per-anchor outputs for an image of the size `room`."""
        boxes, landmarks, scores = [], [], []
        for stride, (score, box, points) in zip(STRIDES, _levels(values, room), strict=True):
            keep = np.flatnonzero(score[:, 0] >= self.min_score)
            cell, columns = keep // ANCHORS, room[1] // stride
            corner = np.stack([cell % columns, cell // columns], 1).astype(np.float32)
            left_top, right_bottom = corner - box[keep, :2], corner + box[keep, 2:]
            boxes.append(np.concatenate([left_top, right_bottom - left_top], 1) * stride)
            landmarks.append((corner[:, None] + points[keep].reshape(-1, 5, 2)) * stride)
            scores.append(score[keep, 0])
        return Found(np.concatenate(boxes), np.concatenate(landmarks), np.concatenate(scores))


def _levels(values: list[NDArray[np.float32]], room: tuple[int, int]) -> list[list[NDArray[np.float32]]]:
    """Scores (A, 1), boxes (A, 4) and landmarks (A, 10) of each stride, finest first.

    Raises
    ------
    ValueError
        If the outputs are not those of SCRFD for an image of the size `room`.
    """
    flat = [value.reshape(-1, value.shape[-1]) for value in values]
    anchors = [ANCHORS * (room[0] // stride) * (room[1] // stride) for stride in STRIDES]
    expected = [(count, width) for count in anchors for width in WIDTHS]
    if sorted(value.shape for value in flat) != sorted(expected):
        raise ValueError(f"for {room[1]} x {room[0]} pixels its outputs are {[value.shape for value in values]}")
    by_shape = {value.shape: value for value in flat}
    return [[by_shape[count, width] for width in WIDTHS] for count in anchors]
