"""The rows of an embedded set as stages after embed list them: one for each image, or each face (`several=all`)."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.faults import IncompleteTable
from operators.face_rows import Further, expanded, faces_of, rows_of
from operators.tables import UNITS
from pipeline.embed import unit_store
from pipeline.stage import Run


def face_units(run: Run, role: str) -> pa.Table:
    """The units of an embedded set (UNITS) with a member for each row of its embeddings, in row order.

    They are those of scan, unless several faces of an image are audited (`operators.face_rows`).

    Raises
    ------
    IncompleteTable
        If the set is not listed or not embedded, or the models of the audit have other faces of an image.
    FormatError
        If a further face would be called like an image.
    """
    units = run.table("scan", role, UNITS)
    if run.config.faces.several != "all":
        return units
    found = further_faces(run, units)
    _refuse_unlike(run, units, found)
    return expanded(units, found)


def _refuse_unlike(run: Run, units: pa.Table, found: Sequence[Further]) -> None:
    """IncompleteTable if a further model has other faces of an image than the first: rows would be of different faces.

    They are found once for all models, but where one was added later, an image that could not be read in time for the
    first can have been read for it.
    """
    for model in run.config.models()[1:]:
        store = unit_store(run, model)
        for name, own in zip(units["unit"].to_pylist(), found, strict=True):
            made = store.find(name)
            if made is not None and made.facts.get("faces", {}) != own:
                places = " and ".join(f"{one.address}/{name}.*" for one in (unit_store(run), store))
                raise IncompleteTable(
                    f"unit {name}: {model.name} has other faces of its images than the first model, since an image "
                    f"could not be read for one of them. Delete {places}, and run `unveil embed` again."
                )


def further_faces(run: Run, units: pa.Table) -> list[Further]:
    """For each of the embedded `units`, which of its images have several rows; IncompleteTable if one is not there."""
    store, found = unit_store(run), []
    for name in units["unit"].to_pylist():
        made = store.find(name)
        if made is None:
            raise IncompleteTable(f"{store.address}: unit {name} is not embedded. Run `unveil embed` again.")
        found.append(made.facts.get("faces", {}))
    return found


def face_numbers(run: Run, role: str) -> NDArray[np.int64]:
    """The number of each row's face in its image, from 1, in row order."""
    units = run.table("scan", role, UNITS)
    sizes = pc.list_value_length(units["members"]).to_pylist()
    return faces_of(np.concatenate([rows_of(*one) for one in zip(further_faces(run, units), sizes, strict=True)]))


def images_among(run: Run, role: str, rows: pa.ChunkedArray, keys: pa.ChunkedArray) -> int:
    """How many images of a set the `keys` are of; `rows` are the keys of all its rows, each of which may be a face."""
    if run.config.faces.several != "all":
        return len(pc.unique(keys))
    image_N = np.cumsum(face_numbers(run, role) == 1)
    return len(np.unique(image_N[pc.index_in(keys, rows.combine_chunks()).to_numpy()]))


def seen(run: Run, role: str) -> dict[str, Any] | None:
    """How many faces of a set's images were audited, and how many that were found were not.

    None where nothing was detected: ready vectors, aligned sets. A detected face is passed over because of `several`,
    `most_faces` or `min_face`, or since it could not be aligned or embedded. Faces of images without any audited face
    are counted with these images, as rejects.
    """
    if run.config.faces.mode == "aligned":
        return None
    store, units = unit_store(run), run.table("scan", role, UNITS)
    columns = pa.concat_tables([store.read(name, ["status", "faces_found"]) for name in units["unit"].to_pylist()])
    face_N = face_numbers(run, role)
    starts = np.flatnonzero(face_N == 1)
    ok_I = np.add.reduceat(np.asarray(pc.equal(columns["status"], "ok")).astype(np.int64), starts)
    found_I = np.asarray(pc.fill_null(columns["faces_found"], 0))[starts]
    if not found_I.any():
        return None
    left_I = np.where(ok_I > 0, found_I - ok_I, 0)
    return {
        "audited": int(ok_I.sum()),
        "images": int((ok_I > 0).sum()),
        "passed_over": int(left_I.sum()),
        "images_with_passed_over": int((left_I > 0).sum()),
    }


def rejected_images(run: Run, role: str) -> dict[str, int]:
    """Images of a set without an audited face, by the status of their first row."""
    store, units = unit_store(run), run.table("scan", role, UNITS)
    columns = [store.read(name, ["status"])["status"] for name in units["unit"].to_pylist()]
    status = pa.chunked_array([chunk for column in columns for chunk in column.chunks]).to_numpy()
    starts = np.flatnonzero(face_numbers(run, role) == 1)
    lost = np.add.reduceat((status == "ok").astype(np.int64), starts) == 0
    return dict(sorted(Counter(status[starts][lost].tolist()).items()))
