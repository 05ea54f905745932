"""Which release images come close to which training persons, from the tables of a finished audit.

A person is what the findings count: a unit of the controlled audit, or an identity, or an image where the training set
has no labels or the person is in the control set too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators.leakage import person
from operators.tables import CANDIDATES, FINDINGS, IMAGE_UNITS, PEOPLE, WITHIN_PAIRS, Table
from pipeline.calibrate import set_columns
from pipeline.clean_policy import Near
from pipeline.search import results
from pipeline.stage import Run

LINKS = Table(
    name="links",
    version=1,
    schema=pa.schema(
        [
            pa.field("release_row", pa.int64()),
            pa.field("person", pa.int64()),  # number of the training person, in this table only
            pa.field("rank", pa.int64()),  # of the person's finding; null: the person has none
            pa.field("training_identity", pa.string()),
            pa.field("training_key", pa.string()),
            pa.field("cosine", pa.float64()),
            pa.field("q", pa.float64()),  # of the person; null without a controlled claim
            pa.field("tier", pa.string()),
            pa.field("candidate", pa.bool_()),  # over the threshold; else the best match of a person below it
        ]
    ),
)
"""One row per release image and training person: the pair with the highest cosine; best finding first."""

LINK = ["release_row", "person"]


def links(run: Run, evidence: Mapping[str, Any] | None, release_keys: pa.ChunkedArray) -> pa.Table:
    """All candidates, and the best match of everybody tested, under the LINKS contract.

    Parameters
    ----------
    run
        A finished audit.
    evidence
        That part of its summary; None where there was no control set.
    release_keys
        Keys of the release images in row order.
    """
    persons = _Persons(run, evidence is not None)
    claim = evidence is not None and bool(evidence["claim"])
    found = run.table("assess", "candidates", CANDIDATES)
    found = found.filter(pc.equal(found["arm"], "training"))
    parts = [_rows(found, release_keys, persons, "gallery", candidate=True)]
    people = PEOPLE.schema.empty_table()
    if claim:
        people = run.table("assess", "people", PEOPLE)
        people = people.filter(pc.and_(pc.equal(people["arm"], "training"), people["q"].is_valid()))
        best = people.filter(people["release_key"].is_valid())
        best = best.rename_columns({"key": "training_key", "identity": "training_identity"})
        parts.append(_rows(best, release_keys, persons, "training", candidate=False))
    whole = pa.concat_tables(parts)
    numbered = whole.append_column("at", pa.array(np.arange(len(whole))))
    first = numbered.group_by(LINK, use_threads=False).aggregate([("at", "min")])["at_min"]
    return _told(whole.take(first), run, persons, people)


def _rows(pairs: pa.Table, keys: pa.ChunkedArray, persons: "_Persons", side: str, *, candidate: bool) -> pa.Table:
    """Pairs of release and training images as links; the best pair of an image and a person comes first."""
    identity, key = pairs[f"{side}_identity"], pairs[f"{side}_key"]
    table = pa.table(
        {
            "release_row": pc.index_in(pairs["release_key"], keys.combine_chunks()).cast(pa.int64()),
            "person": persons(identity, key),
            "training_identity": identity,
            "training_key": key,
            "cosine": pairs["cosine"],
            "candidate": pa.array(np.full(len(pairs), candidate)),
        }
    )
    return table.sort_by([("cosine", "descending"), ("release_row", "ascending")])


def _told(found: pa.Table, run: Run, persons: "_Persons", people: pa.Table) -> pa.Table:
    """Links with what is known of their persons, in the order of the findings; the others after them, by cosine."""
    findings = run.table("assess", "findings", FINDINGS)
    at = pc.index_in(found["person"], persons(findings["training_identity"], findings["training_key"]))
    q = people["q"].take(pc.index_in(found["person"], people["unit"].combine_chunks())) if len(people) else None
    columns = {
        "rank": findings["rank"].take(at),
        "tier": findings["tier"].take(at),
        "q": pa.nulls(len(found), pa.float64()) if q is None else q,
    }
    told = pa.table(
        [columns.get(name, found[name] if name in found.column_names else None) for name in LINKS.schema.names],
        schema=LINKS.schema,
    )
    rank_L = pc.fill_null(told["rank"], np.iinfo(np.int64).max).to_numpy()
    row_L, person_L, cosine_L = (told[name].to_numpy() for name in (*LINK, "cosine"))
    return told.take(pa.array(np.lexsort((person_L, row_L, -cosine_L, rank_L)))).combine_chunks()


class _Persons:
    """Numbers of training persons: those of the controlled audit's units, and behind them one for each other person."""

    def __init__(self, run: Run, controlled: bool) -> None:
        self._keys = set_columns(run, "training", ("key",))["key"].combine_chunks()
        self._unit_N: NDArray[np.int64] = np.full(len(self._keys), -1, np.int64)
        if controlled:
            units = run.table("assess", "image_units", IMAGE_UNITS)
            self._unit_N = units.filter(pc.equal(units["arm"], "training"))["unit"].to_numpy()
        self._first = int(self._unit_N.max(initial=-1)) + 1
        self._others: dict[str, int] = {}

    def __call__(self, identities: pa.ChunkedArray, keys: pa.ChunkedArray) -> pa.Array:
        """The person of each training image."""
        found = self._unit_N[pc.index_in(keys, self._keys).to_numpy()].copy()
        for at in np.flatnonzero(found < 0).tolist():
            name = person(identities[at].as_py(), keys[at].as_py())
            found[at] = self._first + self._others.setdefault(name, len(self._others))
        return pa.array(found)


def near_copies(run: Run, cosine: float) -> Near:
    """Pairs of release images from `cosine` up, by the search of the release against itself."""
    left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for block in results(run, WITHIN_PAIRS, "within-release"):
        close = block.filter(pc.greater_equal(block["cosine"], cosine))
        left.append(close["row"].to_numpy())
        right.append(close["other_row"].to_numpy())
    return Near(np.concatenate(left), np.concatenate(right))
