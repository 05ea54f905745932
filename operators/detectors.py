"""Face detection with YuNet (Wu et al., Machine Intelligence Research 20, 2023), run by ONNX Runtime."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.backbones import open_model, runtime_faults
from operators.errors import ModelError

STRIDES = (8, 16, 32)
MULTIPLE = 32
"""Both sides of the network's input are multiples of its coarsest stride."""
OVERLAP = 0.3
"""Boxes with more intersection over union than this are one face (the OpenCV detector's default)."""
SHORTEST_SIDE = 64
"""Smaller images are enlarged first: the network finds no face below about ten pixels."""


class Detection(NamedTuple):
    """One face in an image."""

    box_4: NDArray[np.float32]
    """x, y, width, height in pixels."""
    landmarks_52: NDArray[np.float32]
    """Eyes, nose tip, mouth corners, image-left first: x and y in pixels."""
    score: float

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        return float(self.box_4[2] * self.box_4[3])


class YuNet:
    """Finds faces and their five landmarks."""

    def __init__(self, path: str, sha256: str, *, min_score: float, longest_side: int) -> None:
        """Open the model; ModelError if it is missing or altered.

        Parameters
        ----------
        path, sha256
            The plain ONNX file, dynamic in height and width, and its digest.
        min_score
            Detections below this are dropped.
        longest_side
            Larger images are scaled down to this many pixels for detection only; landmarks are scaled back.
        """
        self.session = open_model(path, sha256)
        self.input = self.session.get_inputs()[0].name
        self.outputs = [f"{kind}_{stride}" for stride in STRIDES for kind in ("cls", "obj", "bbox", "kps")]
        self.min_score = min_score
        self.longest_side = longest_side
        self._refuse_others(path)

    def _refuse_others(self, path: str) -> None:
        """ModelError unless the model has YuNet's outputs and takes images of any size."""
        missing = set(self.outputs) - {output.name for output in self.session.get_outputs()}
        if missing:
            raise ModelError(
                f"{path}: no YuNet; it has no output {', '.join(sorted(missing))}. Correct faces.detector."
            )
        try:
            for height, width in ((64, 64), (96, 64)):
                self(np.zeros((height, width, 3), np.uint8))
        except runtime_faults() as error:
            raise ModelError(
                f"{path}: does not take images of any size ({error}). Use the file that `make setup` makes."
            ) from error

    def __call__(self, image_HWC: NDArray[np.uint8]) -> list[Detection]:
        """Faces in an RGB image, best score first."""
        import cv2

        scaled = self._scaled(image_HWC)
        height, width = scaled.shape[:2]
        padded = np.pad(scaled, ((0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0)))
        planes = np.ascontiguousarray(padded[:, :, ::-1].transpose(2, 0, 1)[None], np.float32)  # BGR, 0..255
        values = self.session.run(self.outputs, {self.input: planes})
        boxes, landmarks, scores = self._decode(values, padded.shape[1])
        kept = cv2.dnn.NMSBoxes(boxes.tolist(), scores.tolist(), self.min_score, OVERLAP)
        # Pixel centres: position x of a picture that was resized k-fold was at (x + 1/2) / k - 1/2.
        back = np.array([image_HWC.shape[1] / width, image_HWC.shape[0] / height], np.float32)
        boxes = np.concatenate([(boxes[:, :2] + 0.5) * back - 0.5, boxes[:, 2:] * back], 1)
        landmarks = (landmarks + 0.5) * back - 0.5
        return [Detection(boxes[i], landmarks[i], float(scores[i])) for i in np.asarray(kept, int).ravel()]

    def _scaled(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The image at the size in which faces are looked for."""
        import cv2

        height, width = image_HWC.shape[:2]
        largest = self.longest_side / max(height, width)
        scale = min(largest, max(1.0, SHORTEST_SIDE / min(height, width)))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        if size == (width, height):
            return image_HWC
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(image_HWC, size, interpolation=how), np.uint8)

    def _decode(self, values: list[NDArray[np.float32]], width: int) -> tuple[NDArray[np.float32], ...]:
        """Boxes (N, 4), landmarks (N, 5, 2) and scores (N,) over `min_score`, from the network's per-anchor outputs."""
        boxes, landmarks, scores = [], [], []
        for level, stride in enumerate(STRIDES):
            cls, obj, box, points = (value[0] for value in values[4 * level : 4 * level + 4])
            score = np.sqrt(cls[:, 0].clip(0, 1) * obj[:, 0].clip(0, 1))
            keep = np.flatnonzero(score >= self.min_score)
            anchor = np.stack([keep % (width // stride), keep // (width // stride)], 1).astype(np.float32)
            centre = (anchor + box[keep, :2]) * stride
            extent = np.exp(box[keep, 2:]) * stride
            boxes.append(np.concatenate([centre - extent / 2, extent], 1))
            landmarks.append((points[keep].reshape(-1, 5, 2) + anchor[:, None]) * stride)
            scores.append(score[keep])
        return np.concatenate(boxes), np.concatenate(landmarks), np.concatenate(scores)
