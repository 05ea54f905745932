"""Images whose bytes another unit has too: embedded in one of them, taken from there by the others.

The driver notes for every unit which of its digests an earlier unit of the audit lists, its *source*. A worker that
finds the source committed leaves those images out and takes their rows when it commits. A source that is still under
way is not waited for; its images are then embedded twice. Either way the rows are the same, bit for bit: a row follows
from the image's bytes, and copies are only made if the models have shown that a face has the same vector in every place
of a batch (`operators.encoder.Encoder.placeless`). Rows that do not follow from the bytes are never taken.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.storage import Store
from operators.face_rows import Further, face_key, faces_of, further, rows_of
from operators.formats import FORMATS
from operators.records import unnest

CHANCE = frozenset({"unreadable", "changed", "crashed", "timed_out"})
"""Statuses that another copy of the same bytes need not have."""
SOURCES = pa.list_(pa.struct({"unit": pa.string(), "digests": pa.list_(pa.string())}))


def with_sources(pending: pa.Table, wanted: pa.Table, *, copies: bool) -> pa.Table:
    """The `pending` units with a column `sources`: where among the `wanted` units their images occur first.

    Parameters
    ----------
    pending, wanted
        Rows of `UNITS`; `wanted` holds all of the audit in their order.
    copies
        False leaves the column empty.
    """
    given: dict[str, dict[str, list[str]]] = _sources(wanted) if copies else {}
    column = [
        [{"unit": source, "digests": digests} for source, digests in given.get(name, {}).items()]
        for name in pending["unit"].to_pylist()
    ]
    return pending.append_column("sources", pa.array(column, SOURCES))


def _sources(wanted: pa.Table) -> dict[str, dict[str, list[str]]]:
    """By unit, then by its source: the digests that it need not embed."""
    pictures = [name for name, form in FORMATS.items() if form.holds != "vectors"]
    wanted = wanted.filter(pc.is_in(wanted["format"], pa.array(pictures))).combine_chunks()
    if wanted.num_rows == 0:
        return {}
    names = wanted["unit"].to_pylist()
    members = wanted["members"].combine_chunks()
    digests = members.flatten().field("digest")
    listed = np.flatnonzero(digests.is_valid())
    codes = digests.take(pa.array(listed)).dictionary_encode().indices.to_numpy()
    unit_of = members.value_parent_indices().to_numpy()[listed]
    _, first = np.unique(codes, return_index=True)  # codes count up from 0 without gaps
    source_of = unit_of[first][codes]
    found: dict[str, dict[str, list[str]]] = {}
    for at in np.flatnonzero(source_of != unit_of):
        unit, source = names[unit_of[at]], names[source_of[at]]
        if unit != source:  # two sets may share a unit
            noted = found.setdefault(unit, {}).setdefault(source, [])
            noted.append(digests[int(listed[at])].as_py())
    return found


def without_copies(unit: pa.Table, stores: Sequence[Store]) -> pa.Table:
    """The listed unit without the images that can be taken from sources that are committed in all `stores`."""
    ready: set[str] = set()
    for source in unit["sources"][0].as_py():
        if all(usable(store, source["unit"]) for store in stores):
            ready.update(source["digests"])
    if not ready:
        return unit
    members = unit["members"].combine_chunks().flatten()
    left = members.filter(pc.invert(pc.is_in(members.field("digest"), pa.array(sorted(ready)))))
    column = pa.ListArray.from_arrays(pa.array([0, len(left)], pa.int32()), left)
    place = unit.schema.get_field_index("members")
    return unit.set_column(place, unit.schema.field(place), column.cast(unit.schema.field(place).type))


def usable(store: Store, unit: str) -> bool:
    """Whether rows may be taken from a unit: it is committed, and all of it follows from its bytes."""
    made = store.find(unit)
    return made is not None and not CHANCE & set(made.facts["status"])


def filled(images: pa.Table, face_N: NDArray[np.int64], unit: pa.Table, store: Store) -> tuple[pa.Table, Further]:
    """The rows of all listed images of a unit: those in `images`, and the others as their sources in `store` have them.

    Parameters
    ----------
    images
        Rows of the images that were embedded, with those of their further faces.
    face_N
        The number of each row's face in its image.
    unit
        The listed unit, with its `sources`.
    store
        Where the sources are.

    Returns the rows, and which images have several.

    Raises
    ------
    IncompleteTable
        If a source is gone or altered since it was found.
    SchemaMismatch
        If the rows are not those of images.
    """
    members = unnest(unit, "members")
    firsts = np.flatnonzero(face_N == 1)
    if len(members) == len(firsts):
        return images, further(face_N, len(members))
    rows, faces = images, face_N
    at: dict[tuple[str, Any], int] = {("key", images["key"][row].as_py()): row for row in firsts.tolist()}
    wanted = list(zip(members["key"].to_pylist(), members["digest"].to_pylist(), strict=True))
    needed = {digest for key, digest in wanted if ("key", key) not in at}
    for source in unit["sources"][0].as_py():
        if needed.isdisjoint(source["digests"]):  # it was still under way: its images are among `images`
            continue
        known, own_N = _known(store, source["unit"])
        keep_N = np.asarray(pc.is_in(known["digest"], pa.array(source["digests"])))
        digests = known["digest"].filter(pa.array(keep_N)).to_pylist()
        own_N = own_N[keep_N]
        for row in np.flatnonzero(own_N == 1).tolist():
            at.setdefault(("digest", digests[row]), len(rows) + row)
        rows, faces = pa.concat_tables([rows, known.filter(pa.array(keep_N))]), np.append(faces, own_N)
    first_M = np.array([at[("key", key)] if ("key", key) in at else at[("digest", one)] for key, one in wanted], int)
    ends = np.append(np.flatnonzero(faces == 1), len(faces))
    count_M = ends[np.searchsorted(ends, first_M, side="right")] - first_M
    made_N = faces_of(count_M)
    made = rows.take(pa.array(np.repeat(first_M, count_M) + made_N - 1))
    named = _named(members, count_M, made_N)
    for name, column in named.items():
        made = made.set_column(made.schema.get_field_index(name), made.schema.field(name), column)
    return made.combine_chunks(), further(made_N, len(members))


def _known(store: Store, unit: str) -> tuple[pa.Table, NDArray[np.int64]]:
    """The rows of a committed unit, and the number of each row's face in its image."""
    found, rows = store.find(unit), store.read(unit)
    several: Further = {} if found is None else found.facts.get("faces", {})
    return rows, faces_of(rows_of(several, len(rows) - sum(several.values()) + len(several)))


def _named(members: pa.Table, count_M: NDArray[np.int64], face_N: NDArray[np.int64]) -> dict[str, pa.Array]:
    """Key and identity of each row of images that have so many; further faces have no identity."""
    image_N = pa.array(np.repeat(np.arange(len(members)), count_M))
    keys = members["key"].take(image_N).to_pylist()
    named = [face_key(key, face) for key, face in zip(keys, face_N.tolist(), strict=True)]
    identities = members["identity"].take(image_N)
    return {
        "key": pa.array(named, pa.string()),
        "identity": pc.if_else(pa.array(face_N == 1), identities, pa.scalar(None, pa.string())),
    }
