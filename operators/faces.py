"""The per-image boundary: encoded images in, aligned faces out, every failure a row."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators.alignment import align
from operators.detectors import Detection, YuNet
from operators.formats import form
from operators.images import ImageFault, ImageLimits, decode
from operators.tables import FACE, FACE_PIXELS, FACES, UNITS, nest, unnest

OpenImage = Callable[[str], BufferedReader]

log = logging.getLogger(__name__)

PREPARATION_VERSION = 1
"""Bumped whenever the same image and options could give other pixels; stored embeddings are keyed by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceConfig:
    """From image to aligned face. All sets of an audit are prepared alike."""

    mode: str = "detect"
    """`detect`: find the face and align it. `aligned`: images are 112 x 112 aligned faces already."""
    detector: str = "models/yunet_2023mar.onnx"
    detector_sha256: str = "41b843087659e5187499f5e984a6208b5b111a08864a7a697fdaad370f508a07"
    min_score: float = 0.6
    """Detections below this score are no faces."""
    several: str = "largest"
    """When an image holds several faces: `largest` takes the biggest, `reject` refuses the image."""
    longest_side: int = 640
    """Pixels of the longest side during detection; alignment always uses the full image."""
    limits: ImageLimits = field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        if self.mode not in ("detect", "aligned"):
            raise ValueError(f"mode must be 'detect' or 'aligned'. Got {self.mode!r}.")
        if self.several not in ("largest", "reject"):
            raise ValueError(f"several must be 'largest' or 'reject'. Got {self.several!r}.")
        if not 0 < self.min_score < 1:
            raise ValueError(f"min_score must be between 0 and 1. Got {self.min_score}.")
        if self.longest_side < 64:
            raise ValueError(f"longest_side must be at least 64. Got {self.longest_side}.")


class FacePreparation:
    """Reads the images of a unit and prepares their faces: one row of `UNITS` in, one row of `FACES` out."""

    def __init__(self, config: FaceConfig) -> None:
        import cv2

        cv2.setNumThreads(1)
        self.config = config
        self.detector: YuNet | None = None
        if config.mode == "detect":
            self.detector = YuNet(
                config.detector, config.detector_sha256, min_score=config.min_score, longest_side=config.longest_side
            )

    def __call__(self, unit: pa.Table) -> pa.Table:
        """The prepared faces of one listed unit."""
        members = unnest(UNITS.check(unit), "members").to_pylist()
        row = unit.drop_columns(["members"]).to_pylist()[0]
        open_image = partial(form(row["format"]).open_image, row["uri"])
        faces = [self._image(open_image, member) for member in members]
        return nest(pa.Table.from_pylist(faces, schema=pa.schema(list(FACE))), FACES, "faces", unit=row["unit"])

    def _image(self, open_image: OpenImage, member: dict[str, Any]) -> dict[str, Any]:
        """One row of FACE. Whatever goes wrong with one image becomes its status and error."""
        face = {"key": member["key"], "identity": member["identity"], "digest": member["digest"], "status": "ok"}
        try:
            return face | self.prepare(self._bytes(open_image, member))
        except ImageFault as fault:
            return face | {"status": fault.status, "error": _printable(str(fault))}
        except Exception as error:  # noqa: BLE001 - the per-image boundary: a decoder's surprise must not end the run
            log.warning("an image raised %s; it is rejected as corrupt", type(error).__name__)
            return face | {"status": "corrupt", "error": _printable(f"{type(error).__name__}: {error}")}

    def _bytes(self, open_image: OpenImage, member: dict[str, Any]) -> bytes:
        """The encoded image as it was listed; no more than the limit is read."""
        if member["error"] is not None:
            raise ImageFault("unreadable", member["error"])
        limit = self.config.limits.max_bytes
        try:
            with open_image(member["key"]) as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise ImageFault("unreadable", f"cannot be read: {error.strerror or error}") from error
        if len(data) <= limit and hashlib.sha256(data).hexdigest() != member["digest"]:
            raise ImageFault("changed", "the file changed after it was listed; run the audit again")
        return data

    def prepare(self, data: bytes) -> dict[str, Any]:
        """Face columns of one encoded image: crop, box, score and number of faces.

        Raises
        ------
        ImageFault
            If the image cannot be decoded or holds no usable face.
        """
        image = decode(data, self.config.limits)
        if self.detector is None:
            if image.shape != (FACE_PIXELS, FACE_PIXELS, 3):
                size = f"{image.shape[1]} x {image.shape[0]}"
                raise ImageFault("not_aligned", f"{size} pixels; `aligned` takes 112 x 112. Use faces.mode=detect")
            return {"crop": image.tobytes(), "faces_found": 1}
        found = self._choose(self.detector(image))
        try:
            crop = align(image, found[0].landmarks_52)
        except ValueError as error:
            raise ImageFault("no_face", f"the detected face cannot be aligned: {error}") from error
        return {
            "crop": crop.tobytes(),
            "faces_found": len(found),
            "detector_score": found[0].score,
            "box": found[0].box_4.tolist(),
        }

    def _choose(self, found: list[Detection]) -> list[Detection]:
        if not found:
            raise ImageFault("no_face", f"no face with a score of {self.config.min_score} or more")
        if len(found) > 1 and self.config.several == "reject":
            raise ImageFault("several_faces", f"{len(found)} faces; faces.several is 'reject'")
        return sorted(found, key=lambda face: -face.area)


def _printable(reason: str) -> str:
    """`reason` without what Arrow could not store: decoders may quote broken text."""
    return reason.encode("utf-8", "backslashreplace").decode()


def crops(faces: pa.Table) -> NDArray[np.uint8]:
    """The aligned faces of rows of FACE whose status is ok, shape (N, 112, 112, 3)."""
    column = faces["crop"].combine_chunks().drop_null()
    flat = np.frombuffer(b"".join(column.to_pylist()), np.uint8)
    return flat.reshape(-1, FACE_PIXELS, FACE_PIXELS, 3)
