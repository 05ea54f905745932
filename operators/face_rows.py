"""Rows of images of which several faces are audited (`faces.several=all`).

The first row of an image is the one that it has under `largest`: its key, its label, its attributes. Each further face
is a row of its own right after it, under the image's key with `#2`, `#3` and so on. It has no label and no attributes:
those of the image are about the person that it is listed for, and nobody says who the others are.

Downstream of embed a set is listed by these rows (`expanded`), so that row numbers, counts and checks mean one face
everywhere. Where every image has one row, nothing differs from the listing of scan.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators.errors import FormatError, SchemaMismatch
from operators.records import FACES, nest, unnest
from operators.tables import MEMBER, UNITS

Further = Mapping[str, int]
"""Rows of the images of a unit that have more than one, by the image's place there, as the unit's marker has them."""


def face_key(key: str, face: int) -> str:
    """What a face is called: as its image, and from the second on with its number."""
    return key if face == 1 else f"{key}#{face}"


def image_rows(member: dict[str, Any], made: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The row of FACE of a listed image from what was made of it, and the rows of its further faces."""
    digest, status = member["digest"], {"status": "ok"}
    yield {"key": member["key"], "identity": member["identity"], "digest": digest, "face": 1} | status | made
    for face, other in enumerate(made.get("further", ()), 2):
        yield {"key": face_key(member["key"], face), "digest": digest, "face": face} | status | other


def further(face_N: NDArray[np.int64], images: int) -> dict[str, int]:
    """Rows of the images that have more than one, from the number of each row's face in its image.

    Raises
    ------
    SchemaMismatch
        If these are not the rows of so many images: each begins with face 1 and counts up.
    """
    starts = np.flatnonzero(face_N == 1)
    rows = np.diff(np.append(starts, len(face_N)))
    due = np.arange(len(face_N)) - np.repeat(starts, rows) + 1 if len(starts) and starts[0] == 0 else face_N[:0]
    if len(starts) != images or not np.array_equal(due, face_N):
        raise SchemaMismatch(f"{len(face_N)} rows of faces are not those of {images} images. Run `unveil embed` again.")
    return {str(at): int(rows[at]) for at in np.flatnonzero(rows > 1)}


def rows_of(found: Further, images: int) -> NDArray[np.int64]:
    """Rows of each of the images of a unit, shape (N,); at least 1."""
    rows_N = np.ones(images, np.int64)
    for place, rows in found.items():
        rows_N[int(place)] = rows
    return rows_N


def faces_of(rows_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of each row's face in its image, from 1, for images with so many rows."""
    ends = np.cumsum(rows_N)
    return np.asarray(np.arange(int(rows_N.sum())) - np.repeat(ends - rows_N, rows_N) + 1, np.int64)


def expanded(units: pa.Table, found: Sequence[Further]) -> pa.Table:
    """The listed `units` (UNITS) with one member for each row of their embeddings, and the row numbers that follow.

    Parameters
    ----------
    units
        As scan listed them, in row order.
    found
        What the marker of each unit's embeddings records.

    Raises
    ------
    FormatError
        If a further face would be called like another image of the set.
    """
    if not any(found):
        return units
    members = units["members"].combine_chunks()
    parts = [_members(members[at].values, own) if own else members[at].values for at, own in enumerate(found)]
    starts = np.cumsum([0, *map(len, parts)])
    flat = pa.concat_arrays(parts)
    _refuse_shared_names(flat.field("key"), units["set"][0].as_py())
    nested = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), flat)
    changed = {"members": nested.cast(UNITS.schema.field("members").type), "first_row": pa.array(starts[:-1])}
    return pa.table([changed.get(name, units[name]) for name in UNITS.schema.names], schema=UNITS.schema)


def picked(unit: pa.Table, face_N: NDArray[np.int64]) -> pa.Table:
    """A row of FACES with one face for each image: that of this number, `no_face` if there is none any more.

    Parameters
    ----------
    unit
        The prepared faces of images that are members of an `expanded` unit, each in the place of one of its faces.
    face_N
        Which of its faces.
    """
    faces = unnest(FACES.check(unit), "faces")
    found_M = np.asarray(faces["face"].to_numpy(), np.int64)
    starts = np.flatnonzero(found_M == 1)
    if len(starts) == len(faces) and (face_N == 1).all():
        return unit
    count_N = np.diff(np.append(starts, len(faces)))
    there_N = face_N <= count_N
    rows = faces.take(pa.array(np.where(there_N, starts + face_N - 1, starts))).to_pylist()
    firsts = faces.take(pa.array(starts)).to_pylist()
    for row, first, there in zip(rows, firsts, there_N.tolist(), strict=True):
        row |= {"key": first["key"], "identity": first["identity"]}
        if not there and row["status"] == "ok":
            row |= {"status": "no_face", "error": "this face is not found any more"}
    made = pa.Table.from_pylist(rows, schema=faces.schema)
    return nest(made, FACES, "faces", unit=unit["unit"][0].as_py())


def _members(members: pa.StructArray, found: Further) -> pa.StructArray:
    """The members of one unit, once for each of their rows; their bytes stay where they are."""
    rows = [member | {"place": member["place"] or member["key"]} for member in members.to_pylist()]
    told = rows_of(found, len(rows))
    made = [
        row if face == 1 else row | {"key": face_key(row["key"], face), "identity": None, "attributes": []}
        for row, count in zip(rows, told.tolist(), strict=True)
        for face in range(1, count + 1)
    ]
    return pa.array(made, MEMBER)


def _refuse_shared_names(keys: pa.Array, role: str) -> None:
    counts = pc.value_counts(keys)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(twice):
        raise FormatError(
            f"sets.{role}: an image is called {twice[0].as_py()!r}, and so would be a further face of another one "
            f"(faces.several=all). Rename the image."
        )
