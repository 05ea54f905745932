"""Where two face models of an audit disagree about an image: a backdoor, a failure of one of them, or an odd image.

A linear map from the first model's space to the second's is fitted on the anchor and placebo sets, which have nobody of
the audited sets, and its cosine with what the second model says is compared with that of the control images.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators import translation, vectors
from operators.backbones import BackboneConfig
from operators.errors import CapacityError
from operators.tables import DISAGREEMENTS
from operators.translation import Translation
from pipeline.calibrate import set_columns
from pipeline.embed import unit_store
from pipeline.face_units import face_units
from pipeline.stage import Run

FITTED_ON = ("anchor", "placebo")
LOOKED_AT = ("release", "training")
MOST = 20_000
"""Faces that the map is fitted on."""


def disagreements(run: Run) -> tuple[pa.Table, dict[str, Any] | None]:
    """Flagged images under the DISAGREEMENTS contract, and what the summary says; None where there is one model."""
    models = run.config.models()
    given = run.config.sets.given()
    if len(models) < 2 or "control" not in given:
        return DISAGREEMENTS.schema.empty_table(), None
    first, second = models[:2]
    told: dict[str, Any] = {"models": [first.name, second.name]}
    try:
        fitted = _fitted(run, first, second, [role for role in FITTED_ON if role in given])
    except CapacityError as error:
        return DISAGREEMENTS.schema.empty_table(), told | {"not_possible": str(error)}
    control_N = _cosines(run, first, second, "control", fitted)[1]
    tables = []
    for role in LOOKED_AT:
        rows_M, cosine_M = _cosines(run, first, second, role, fitted)
        found = translation.disagreement(cosine_M, control_N)
        told[role] = {"images": len(cosine_M), "flagged": int(found.flagged_N.sum())}
        told |= {"level": found.cut.level, "finest": found.cut.finest, "cosine": found.cut.value}
        keys = set_columns(run, role, ("key",))["key"].take(pa.array(rows_M[found.flagged_N]))
        columns = [pa.array([role] * len(keys), pa.string()), keys, cosine_M[found.flagged_N]]
        tables.append(pa.table(columns, schema=DISAGREEMENTS.schema))
    told |= {"map": fitted.kind, "pairs": fitted.pairs, "control_images": len(control_N)}
    return pa.concat_tables(tables).combine_chunks(), told


def _fitted(run: Run, first: BackboneConfig, second: BackboneConfig, roles: list[str]) -> Translation:
    """The map, a ridge regression where there are faces enough, else a rotation; CapacityError if not even that."""
    sides: list[list[NDArray[np.float16]]] = [[], []]
    for role in roles:
        _, left_MD, right_ME = _both(run, first, second, role)
        sides[0].append(left_MD)
        sides[1].append(right_ME)
    if not roles:
        raise CapacityError("no anchor or placebo set to fit a map between the face models on. Give sets.anchor.")
    left, right = (np.concatenate(side) for side in sides)
    chosen = np.sort(np.random.default_rng(0).permutation(len(left))[:MOST])
    enough = len(chosen) >= translation.ENOUGH * left.shape[1]
    fit = translation.fit_ridge if enough else translation.fit_rotation
    return fit(left[chosen], right[chosen], centred=True)


def _cosines(
    run: Run, first: BackboneConfig, second: BackboneConfig, role: str, fitted: Translation
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows of a set that both models embedded, and the cosine of the translated with the second's own vector."""
    rows_M, left_MD, right_ME = _both(run, first, second, role)
    return rows_M, translation.cosines(fitted, left_MD, right_ME)


def _both(
    run: Run, first: BackboneConfig, second: BackboneConfig, role: str
) -> tuple[NDArray[np.int64], NDArray[np.float16], NDArray[np.float16]]:
    """Row numbers, and vectors of both models, of the images that both have embedded."""
    stores = unit_store(run, first), unit_store(run, second)
    rows: list[NDArray[np.int64]] = []
    sides: tuple[list[NDArray[np.float16]], list[NDArray[np.float16]]] = ([], [])
    for unit in face_units(run, role).select(["unit", "first_row"]).to_pylist():
        columns = [store.read(unit["unit"], ["vector"])["vector"].combine_chunks() for store in stores]
        both = np.asarray(columns[0].is_valid()) & np.asarray(columns[1].is_valid())
        rows.append(unit["first_row"] + np.flatnonzero(both))
        for side, column in zip(sides, columns, strict=True):
            side.append(vectors.from_arrow(column.filter(pa.array(both))))
    return np.concatenate(rows), np.concatenate(sides[0]), np.concatenate(sides[1])
