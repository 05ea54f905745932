"""Some images of a set again, after the audit: for the evidence on pairs, for planted copies, for the report.

Only images that were audited are opened, and only if they still have the bytes that were audited: what the decoder did
with them is known.
"""

import hashlib
import logging
from collections import Counter
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators.alignment import align
from operators.formats import FORMATS, reader
from operators.images import ImageFault, decode
from pipeline.calibrate import set_columns
from pipeline.face_units import face_units
from pipeline.stage import Run

log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """One image and its face."""

    key: str
    identity: str | None
    image: NDArray[np.uint8]
    """Upright RGB, shape (H, W, 3)."""
    crop: NDArray[np.uint8]
    """Its aligned face, shape (112, 112, 3)."""
    landmarks: NDArray[np.float32] | None
    """Shape (5, 2), in pixels of `image`; None for sets that came aligned."""
    box: list[float] | None


class Imagery:
    """Opens audited images of one set by row number; a context manager."""

    def __init__(self, run: Run, role: str) -> None:
        self.role, self.limits = role, run.config.faces.limits
        units = face_units(run, role)
        self.members = pa.Table.from_struct_array(units["members"].combine_chunks().flatten())
        self.columns = set_columns(run, role, ("key", "identity", "digest", "status", "landmarks", "box"))
        about = run.readable(units).select(["format", "uri", "anonymous"]).slice(0, 1).to_pylist()[0]
        self.available = FORMATS[about["format"]].holds == "images"
        self.gone: Counter[str] = Counter()
        self.reader = reader(about["format"], about["uri"], about["anonymous"])

    def __call__(self, row: int) -> Seen | None:
        """The image of a row; None if it was not audited, came as a vector, or is no longer what was audited."""
        known = {name: self.columns[name][row].as_py() for name in self.columns.column_names}
        if not self.available or known["status"] != "ok":
            return None
        place, version = self.members["place"][row].as_py(), self.members["version"][row].as_py()
        try:
            with self.reader.open(place or known["key"], version) as file:
                data = file.read(self.limits.max_bytes + 1)
            if hashlib.sha256(data).hexdigest() != known["digest"]:
                raise OSError("changed since it was audited")
            image = decode(data, self.limits)
        except (OSError, ImageFault) as fault:
            self.gone[type(fault).__name__] += 1
            return None
        if known["landmarks"] is None:
            return Seen(known["key"], known["identity"], image, image, None, known["box"])
        landmarks_52 = np.array(known["landmarks"], np.float32).reshape(5, 2)
        return Seen(known["key"], known["identity"], image, align(image, landmarks_52), landmarks_52, known["box"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.reader.close()
        if self.gone:
            log.warning("%d images of the %s set can no longer be read (%s)", *self._lost())

    def _lost(self) -> tuple[int, str, str]:
        return self.gone.total(), self.role, ", ".join(sorted(self.gone))
