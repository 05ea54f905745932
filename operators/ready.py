"""Ready embeddings: a set that comes as vectors is checked and normalised, and no image of it is ever seen."""

import hashlib
import re
from typing import Any

import numpy as np
import pyarrow as pa

from operators import vectors
from operators.encoder import UNUSABLE
from operators.formats import reader
from operators.formats.reading import Reader
from operators.records import embedded_unit, embeddings, nest, unnest
from operators.tables import UNITS

DIGITS = re.compile(r"([0-9]+)")

DEVICE = "given"
"""What stands where other units say what the embedder ran on."""


def embedded(unit: pa.Table, width: int) -> pa.Table:
    """The embedded unit of one listed unit of ready vectors.

    Vectors are scaled to unit length and rounded to fp16 as all embeddings are. One of another width, with values that
    are not finite, or of length zero is a row that says so.

    Parameters
    ----------
    unit
        One row of UNITS whose form holds vectors.
    width
        Components of an embedding of the model that the vectors are said to come from.
    """
    members = unnest(UNITS.check(unit), "members").to_pylist()
    row = unit.drop_columns(["members"]).to_pylist()[0]
    raw_ND = np.zeros((len(members), width), np.float32)
    rows: list[dict[str, Any]] = [{}] * len(members)
    with reader(row["format"], row["uri"], row["anonymous"]) as opened:
        for at in sorted(range(len(members)), key=lambda at: _as_it_lies(members[at])):
            member = members[at]
            status, error = _take(opened, member, raw_ND[at])
            kept = {name: member[name] for name in ("key", "identity", "digest")}
            rows[at] = kept | {"status": status, "error": error}
    contract = embeddings(width)
    images = contract.from_rows(rows)
    made_ND, norms_N, usable_N = vectors.normalise(raw_ND)
    ready_N = np.array([row["status"] == "ok" for row in rows])
    for bad in np.flatnonzero(ready_N & ~usable_N).tolist():
        rows[bad] |= {"status": "bad_embedding", "error": UNUSABLE}
    good_N = ready_N & usable_N
    columns = {
        "status": pa.array([row["status"] for row in rows]),
        "error": pa.array([row["error"] for row in rows], pa.string()),
        "norm": pa.array(norms_N.astype(np.float32), mask=~good_N),
        "vector": vectors.to_arrow(made_ND, good_N),
    }
    arrays = [columns[f.name] if f.name in columns else images[f.name] for f in contract.schema]
    table = contract.check(pa.Table.from_arrays(arrays, schema=contract.schema))
    return nest(table, embedded_unit(width), "images", unit=row["unit"], device=DEVICE)


def _as_it_lies(member: dict[str, Any]) -> list[str | int]:
    """What sorts members as they lie in their files: compressed ones are unpacked from the beginning for every step
    back. Texts and numbers take turns in a place, so that any two can be compared.
    """
    return [int(part) if at % 2 else part for at, part in enumerate(DIGITS.split(member["place"] or member["key"]))]


def _take(
    opened: Reader, member: dict[str, Any], into_D: np.ndarray[Any, np.dtype[np.float32]]
) -> tuple[str, str | None]:
    """Read one vector into its row; its status and error."""
    if member["error"] is not None:
        return "unreadable", member["error"]
    try:
        data = opened.read(member["place"] or member["key"], member["version"], into_D.nbytes)
    except OSError as error:
        return "unreadable", f"cannot be read: {error.strerror or error}"
    if len(data) != into_D.nbytes:
        found = f"{len(data) // 4}" if len(data) < into_D.nbytes else f"more than {into_D.size}"
        return "bad_embedding", f"the vector has {found} components; the model gives {into_D.size}"
    if hashlib.sha256(data).hexdigest() != member["digest"]:
        return "changed", "the vector changed after it was listed; run the audit again"
    into_D[:] = np.frombuffer(data, "<f4")
    return "ok", None
