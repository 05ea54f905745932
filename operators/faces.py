"""The per-image boundary: encoded images in, aligned faces out, every failure a row."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators.alignment import ARCFACE, align, alignment, realign
from operators.detectors import Detection, YuNet
from operators.errors import SchemaMismatch
from operators.face_rows import image_rows
from operators.formats import reader
from operators.formats.reading import Reader
from operators.images import ImageFault, ImageLimits, decode
from operators.quality import sharpness
from operators.records import CROP_COLUMNS, FACE, FACES, nest, unnest
from operators.sandbox import Fault, Sandbox
from operators.scrfd import Scrfd
from operators.tables import FACE_PIXELS, UNITS

Detector = Callable[[NDArray[np.uint8]], list[Detection]]
"""Faces in an RGB image (H, W, 3), best score first."""

log = logging.getLogger(__name__)

DETECTORS: dict[str, type[YuNet] | type[Scrfd]] = {"yunet": YuNet, "scrfd": Scrfd}
"""What `faces.kind` may be."""

SEVERAL = ("largest", "largest_central", "reject", "all")

TOGETHER = 64
"""Encoded images held at once."""

PREPARATION_VERSION = 2
"""Bumped whenever the same image and options could give other pixels; stored embeddings are keyed by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceConfig:
    """From image to aligned face. All sets of an audit are prepared alike."""

    mode: str = "detect"
    """`detect`: find the face and align it. `aligned`: images are 112 x 112 aligned faces already."""
    kind: str = "yunet"
    """What the detector is: `yunet`, or `scrfd` for InsightFace's detectors, which each user obtains on their terms."""
    detector: str = "models/yunet_2023mar.onnx"
    detector_sha256: str = "41b843087659e5187499f5e984a6208b5b111a08864a7a697fdaad370f508a07"
    min_score: float = 0.6
    """Detections below this score are no faces."""
    min_face: int = 0
    """Faces whose box has a shorter side of fewer pixels are passed over; an image with no other is `too_small`."""
    several: str = "largest"
    """When an image holds several faces: `largest` takes the biggest, `largest_central` weighs size against distance
    from the centre (`operators.detectors.Detection.centrality`), `reject` refuses the image. `all` audits the
    largest as `largest` does, and every other face too, as a person without a label (`operators.face_rows`)."""
    most_faces: int = 32
    """Of `several=all`: so many faces of an image at most, the largest. It bounds the memory that a crowd takes."""
    longest_side: int = 640
    """Pixels of the longest side during detection; alignment always uses the full image."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    isolate: bool = True
    """Decode and align in a child process of each worker. An image that crashes, hangs or eats memory there becomes a
    row (`crashed`, `timed_out`) and nothing else is lost; in the worker itself it would end the worker."""

    def __post_init__(self) -> None:
        if self.mode not in ("detect", "aligned"):
            raise ValueError(f"mode must be 'detect' or 'aligned'. Got {self.mode!r}.")
        if self.kind not in DETECTORS:
            raise ValueError(f"kind must be one of {', '.join(DETECTORS)}. Got {self.kind!r}.")
        if self.several not in SEVERAL:
            raise ValueError(f"several must be one of {', '.join(SEVERAL)}. Got {self.several!r}.")
        if self.most_faces < 1:
            raise ValueError(f"most_faces must be at least 1. Got {self.most_faces}.")
        if self.min_face < 0:
            raise ValueError(f"min_face must be 0 or more. Got {self.min_face}.")
        if not 0 < self.min_score < 1:
            raise ValueError(f"min_score must be between 0 and 1. Got {self.min_score}.")
        if self.longest_side < 64:
            raise ValueError(f"longest_side must be at least 64. Got {self.longest_side}.")


class FacePreparation:
    """Reads the images of a unit and prepares their faces: one row of `UNITS` in, one row of `FACES` out."""

    def __init__(self, config: FaceConfig, alignments: tuple[str, ...] = (ARCFACE,)) -> None:
        """Open the detector.

        Parameters
        ----------
        config
            From image to aligned face.
        alignments
            Those that the embedders need, of `operators.alignment.ALIGNMENTS`: an image is decoded and its face found
            once, and cut out once for each. In `aligned` mode all are made from the given face (`realign`).

        Raises
        ------
        ModelError
            If the detector is missing, altered or of another kind.
        ConfigError
            If an alignment is not known.
        """
        import cv2

        cv2.setNumThreads(1)
        self.config = config
        self.columns = {name: crop_column(name) for name in alignments}
        self.detector: Detector | None = open_detector(config) if config.mode == "detect" else None
        self.confined = False
        self.sandbox: Sandbox[bytes, dict[str, Any]] | None = None
        if config.isolate:
            memory = config.limits.memory_mb * 2**20
            build = partial(_in_sandbox, replace(config, isolate=False), alignments)
            self.sandbox = Sandbox(build, seconds=config.limits.seconds, memory_bytes=memory)

    def __call__(self, unit: pa.Table) -> pa.Table:
        """The prepared faces of one listed unit."""
        members = unnest(UNITS.check(unit), "members").to_pylist()
        row = unit.drop_columns(["members"]).to_pylist()[0]
        with reader(row["format"], row["uri"], row["anonymous"]) as opened:
            faces = list(self._faces(opened, members))
        return nest(pa.Table.from_pylist(faces, schema=pa.schema(list(FACE))), FACES, "faces", unit=row["unit"])

    def _faces(self, opened: Reader, members: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows of FACE in the members' order; images of equal bytes are prepared once."""
        known: dict[str, dict[str, Any]] = {}
        for at in range(0, len(members), TOGETHER):
            part = members[at : at + TOGETHER]
            read = [self._read(opened, member) for member in part]
            new: dict[str, bytes] = {}
            for member, data in zip(part, read, strict=True):
                if isinstance(data, bytes) and member["digest"] not in known:
                    new.setdefault(member["digest"], data)
            known |= zip(new, self._prepared(list(new.values())), strict=True)
            for member, data in zip(part, read, strict=True):
                yield from image_rows(member, known[member["digest"]] if isinstance(data, bytes) else data)

    def _read(self, opened: Reader, member: dict[str, Any]) -> bytes | dict[str, Any]:
        """The encoded image, or the status and error of one that cannot be read."""
        try:
            return self._bytes(opened, member)
        except ImageFault as fault:
            return _rejected(fault)

    def _prepared(self, images: Sequence[bytes]) -> Iterator[dict[str, Any]]:
        """Face columns of encoded images, or the status and error of each that failed, whatever it did."""
        for made in map(self.guarded, images) if self.sandbox is None else self.sandbox.map(images):
            if isinstance(made, Fault):
                log.warning("an image is rejected as %s: %s", made.status, made.reason)
                yield {"status": made.status, "error": made.reason}
                continue
            if surprise := made.pop("surprise", None):
                log.warning("an image raised %s; it is rejected as corrupt", surprise)
            yield made

    def guarded(self, data: bytes) -> dict[str, Any]:
        """What `prepare` returns, or the status and error of an image that it cannot use."""
        try:
            return self.prepare(data)
        except ImageFault as fault:
            return _rejected(fault)
        except Exception as error:  # the per-image boundary: a decoder's surprise must not end the run
            if self.confined and isinstance(error, MemoryError):
                raise  # earlier images may have used the memory up: the sandbox tries this one alone
            name = type(error).__name__
            return {"status": "corrupt", "error": _printable(f"{name}: {error}"), "surprise": name}

    def _bytes(self, opened: Reader, member: dict[str, Any]) -> bytes:
        """The encoded image as it was listed; no more than the limit is read."""
        if member["error"] is not None:
            raise ImageFault("unreadable", member["error"])
        limit = self.config.limits.max_bytes
        try:
            data = opened.read(member["place"] or member["key"], member["version"], limit)
        except OSError as error:
            raise ImageFault("unreadable", f"cannot be read: {error.strerror or error}") from error
        if len(data) <= limit and hashlib.sha256(data).hexdigest() != member["digest"]:
            raise ImageFault("changed", "the file changed after it was listed; run the audit again")
        return data

    def prepare(self, data: bytes) -> dict[str, Any]:
        """Face columns of one encoded image: crops, box, landmarks, score, number of faces and quality.

        With `several=all`, `further` are those of its further faces.

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
            return {"faces_found": 1} | self._crops(image, partial(realign, image))
        found = self.detector(image)
        first, *others = self._cut_out(image, self._chosen(found, *image.shape[:2]))
        for one in (first, *others):
            one["faces_found"] = len(found)
        return first | ({"further": others} if others else {})

    def _cut_out(self, image: NDArray[np.uint8], faces: Sequence[Detection]) -> list[dict[str, Any]]:
        """The columns of those faces that can be aligned, of one at least; ImageFault where none can."""
        made: list[dict[str, Any]] = []
        why = ""
        for face in faces:
            try:
                crop = align(image, face.landmarks_52)
            except ValueError as error:
                why = str(error)
                continue
            about = {
                "detector_score": face.score,
                "box": face.box_4.tolist(),
                "landmarks": face.landmarks_52.ravel().tolist(),
                "face_size": face.size,
            }
            made.append(about | self._crops(crop, partial(align, image, face.landmarks_52)))
        if not made:
            raise ImageFault("no_face", f"the detected face cannot be aligned: {why}")
        return made

    def _crops(self, crop_HWC: NDArray[np.uint8], other: Callable[[str], NDArray[np.uint8]]) -> dict[str, Any]:
        """The columns made from the ArcFace crop, and from `other` crops by the names of their alignments."""
        crops = {name: crop_HWC if name == ARCFACE else other(name) for name in self.columns}
        columns = {self.columns[name]: pixels.tobytes() for name, pixels in crops.items()}
        return {"sharpness": sharpness(crop_HWC), **columns}

    def _chosen(self, found: list[Detection], height: int, width: int) -> list[Detection]:
        """The faces to audit of those found in an image of this size: one, but for `all`; ImageFault if none."""
        if not found:
            raise ImageFault("no_face", f"no face with a score of {self.config.min_score} or more")
        usable = [face for face in found if face.size >= self.config.min_face]
        if not usable:
            size = max(face.size for face in found)
            raise ImageFault(
                "too_small", f"face of {size:.1f} pixels; the limit is {self.config.min_face} (faces.min_face)"
            )
        if len(usable) > 1 and self.config.several == "reject":
            raise ImageFault("several_faces", f"{len(usable)} faces; faces.several is 'reject'")
        if self.config.several == "largest_central":
            return [max(usable, key=lambda face: face.centrality(height, width))]
        several = self.config.most_faces if self.config.several == "all" else 1
        return sorted(usable, key=lambda face: -face.area)[:several]


def open_detector(config: FaceConfig) -> YuNet | Scrfd:
    """The configured detector; ModelError if its file is missing, altered or of another kind."""
    return DETECTORS[config.kind](
        config.detector, config.detector_sha256, min_score=config.min_score, longest_side=config.longest_side
    )


def _in_sandbox(config: FaceConfig, alignments: tuple[str, ...]) -> Callable[[bytes], dict[str, Any]]:
    """What the child process of a sandbox applies to every image."""
    preparation = FacePreparation(config, alignments)
    preparation.confined = True
    return preparation.guarded


def _rejected(fault: ImageFault) -> dict[str, Any]:
    return {"status": fault.status, "error": _printable(str(fault))}


def _printable(reason: str) -> str:
    """`reason` without what Arrow could not store: decoders may quote broken text."""
    return reason.encode("utf-8", "backslashreplace").decode()


def crop_column(name: str) -> str:
    """The column of FACE with the crops of the alignment `name`; ConfigError if there is no such alignment."""
    alignment(name)
    return CROP_COLUMNS[name]


def crops(faces: pa.Table, name: str = ARCFACE) -> NDArray[np.uint8]:
    """The faces of rows of FACE whose status is ok, cut out by the alignment `name`, shape (N, P, P, 3).

    Raises
    ------
    ConfigError
        If the alignment is not known.
    SchemaMismatch
        If a face was not cut out by it.
    """
    column = faces.filter(pc.equal(faces["status"], "ok"))[crop_column(name)].combine_chunks()
    if column.null_count:
        raise SchemaMismatch(
            f"{column.null_count} faces have no {name} crop. Prepare them with alignments=({name!r},)."
        )
    pixels = alignment(name).pixels
    return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(-1, pixels, pixels, 3)
