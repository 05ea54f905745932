"""Face detection: what detectors share, and YuNet (Wu et al., Machine Intelligence Research 20, 2023)."""

from collections.abc import Sequence
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

    @property
    def size(self) -> float:
        """Shorter side of the box in pixels."""
        return float(min(self.box_4[2:]))

    def centrality(self, height: int, width: int) -> float:
        """Area less twice the squared distance of the box's centre from that of an image of this size, in pixels.

        The rule by which InsightFace picks one face of several (`max_num` of its detectors), after FaceNet's
        align_dataset_mtcnn.py ("some extra weight on the centering"). Both terms are squared pixels, so the choice does
        not hang on the resolution. Pixel centres count: the centre of an image is (width - 1) / 2.
        """
        x, y = self.box_4[:2] + self.box_4[2:] / 2 - np.array([width - 1, height - 1]) / 2
        return self.area - 2 * float(x * x + y * y)


def scaled(image_HWC: NDArray[np.uint8], longest_side: int, room: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """The image at the size in which faces are looked for.

    Parameters
    ----------
    image_HWC
        RGB pixels.
    longest_side
        Most pixels of the longest side.
    room
        Most pixels in height and width, for networks that take one size only.
    """
    import cv2

    height, width = image_HWC.shape[:2]
    largest = longest_side / max(height, width)
    if room is not None:
        largest = min(largest, room[0] / height, room[1] / width)
    scale = min(largest, max(1.0, SHORTEST_SIDE / min(height, width)))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size == (width, height):
        return image_HWC
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image_HWC, size, interpolation=how), np.uint8)


class Found(NamedTuple):
    """What a network says about a scaled image, overlaps included."""

    boxes_N4: NDArray[np.float32]
    landmarks_N52: NDArray[np.float32]
    scores_N: NDArray[np.float32]

    def faces(self, shape: Sequence[int], original: Sequence[int], min_score: float, overlap: float) -> list[Detection]:
        """Distinct faces in pixels of the original image, best score first.

        Parameters
        ----------
        shape, original
            Height and width of the scaled and of the original image.
        min_score
            Detections below this are dropped.
        overlap
            Of two boxes with more intersection over union than this, the one with the lower score is dropped.
        """
        import cv2

        kept = cv2.dnn.NMSBoxes(self.boxes_N4.tolist(), self.scores_N.tolist(), min_score, overlap)
        # Pixel centres: position x of a picture that was resized k-fold was at (x + 1/2) / k - 1/2.
        back = np.array([original[1] / shape[1], original[0] / shape[0]], np.float32)
        boxes = np.concatenate([(self.boxes_N4[:, :2] + 0.5) * back - 0.5, self.boxes_N4[:, 2:] * back], 1)
        landmarks = (self.landmarks_N52 + 0.5) * back - 0.5
        return [Detection(boxes[i], landmarks[i], float(self.scores_N[i])) for i in np.asarray(kept, int).ravel()]


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
        small = scaled(image_HWC, self.longest_side)
        height, width = small.shape[:2]
        padded = np.pad(small, ((0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0)))
        planes = np.ascontiguousarray(padded[:, :, ::-1].transpose(2, 0, 1)[None], np.float32)  # BGR, 0..255
        found = self._decode(self.session.run(self.outputs, {self.input: planes}), padded.shape[1])
        return found.faces(small.shape, image_HWC.shape, self.min_score, OVERLAP)

    def _decode(self, values: list[NDArray[np.float32]], width: int) -> Found:
        """Detections over `min_score`, from the network's per-anchor outputs."""
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
        return Found(np.concatenate(boxes), np.concatenate(landmarks), np.concatenate(scores))
