"""The release by images, where the tables of an audit have a row for each face (`faces.several=all`).

What is removed is an image, whichever of its faces leads to that. Where every image has one row, nothing differs.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.calibrate import set_columns
from pipeline.clean_policy import Near
from pipeline.face_units import face_numbers
from pipeline.stage import Run


class Images(NamedTuple):
    """The images of the release, and whose faces the rows of the audit are."""

    table: pa.Table
    """`key`, `identity`, `digest` and `status` of each image, in their order: `ok` if any of its faces was audited."""
    keys: pa.ChunkedArray
    """Of the rows, each a face."""
    image_N: NDArray[np.int64]
    """The image of each row."""
    face_N: NDArray[np.int64]
    """The number of each row's face in its image, from 1."""


class Leading(NamedTuple):
    """Links of images to training persons, each pair of the two once, the strongest first."""

    found: pa.Table
    """LINKS, with images for rows, and `face`: the number of the face that comes closest."""
    selected_L: NDArray[np.bool_]
    """Whether the image is to be removed for this person."""
    faces_N: NDArray[np.int64]
    """Faces of each image that it is removed for, by links of their own."""


def release_images(run: Run) -> Images:
    """The images of the embedded release."""
    rows = set_columns(run, "release", ("key", "identity", "digest", "status"))
    face_N = face_numbers(run, "release")
    image_N = np.cumsum(face_N == 1) - 1
    audited_N = np.bincount(image_N, np.asarray(pc.equal(rows["status"], "ok").to_numpy(), np.float64)) > 0
    table = rows.take(pa.array(np.flatnonzero(face_N == 1)))
    status = pc.if_else(pa.array(audited_N), "ok", table["status"])
    table = table.set_column(table.schema.get_field_index("status"), "status", status)
    return Images(table.combine_chunks(), rows["key"], image_N, face_N)


def by_image(images: Images, found: pa.Table, selected_L: NDArray[np.bool_]) -> Leading:
    """The links of faces as links of their images; of several faces close to one person the closest speaks.

    Parameters
    ----------
    images
        The release.
    found
        LINKS of faces, the strongest first.
    selected_L
        Which of them lead to removal.
    """
    row_L, person_L = (found[name].to_numpy() for name in ("release_row", "person"))
    image_L = images.image_N[row_L]
    _, first = np.unique(np.stack([image_L, person_L], axis=1), axis=0, return_index=True)
    best = np.sort(first)
    own = found.take(pa.array(best))
    own = own.set_column(own.schema.get_field_index("release_row"), "release_row", pa.array(image_L[best]))
    own = own.append_column("face", pa.array(images.face_N[row_L[best]], pa.int64()))
    leading = images.image_N[np.unique(row_L[selected_L])]
    return Leading(own, selected_L[best], np.bincount(leading, minlength=len(images.table)))


def near_images(images: Images, near: Near) -> Near:
    """Pairs of faces as pairs of different images."""
    left_P, right_P = images.image_N[near.left_P], images.image_N[near.right_P]
    other_P = left_P != right_P
    return Near(left_P[other_P], right_P[other_P])
