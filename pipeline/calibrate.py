"""The threshold of an audit, measured on the training set before and after the search.

The search asks first, so that it keeps every pair that could become a candidate; assess asks again with its options.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators import calibration, leakage, vectors
from operators.calibration import Threshold
from operators.tables import UNITS
from pipeline.embed import unit_store
from pipeline.face_units import face_numbers
from pipeline.stage import Run

FINEST_FMR = 1e-6
"""The rate aimed at when none is asked for."""


COLUMNS = ("key", "identity", "digest", "box")


def set_columns(run: Run, role: str, columns: Sequence[str] = COLUMNS) -> pa.Table:
    """Some columns of a set's embeddings, one row per listed image, or face, in row-number order."""
    store = unit_store(run)
    units = run.table("scan", role, UNITS)
    return pa.concat_tables([store.read(name, columns) for name in units["unit"].to_pylist()]).combine_chunks()


def calibrate(run: Run, training: pa.Table) -> tuple[Threshold, dict[str, Any]]:
    """The threshold, and what the report says about it.

    Parameters
    ----------
    run
        The audit, with its sets embedded.
    training
        `set_columns` of the training set.
    """
    options = run.config.assess
    vectors_ND, person_N, labels = _sample(run, training)
    pairs = _non_mated(person_N)
    wanted = options.fmr if options.fmr is not None else calibration.finest_fmr(pairs, FINEST_FMR)
    tail = calibration.non_mated_tail(vectors_ND, person_N, keep=int(wanted * pairs) + 2)
    found = calibration.threshold_at(tail, wanted)
    reason = "set by assess.fmr" if options.fmr is not None else (
        f"the smallest rate that {pairs:,} non-mated pairs measure with {calibration.RESOLUTION} exceedances"
    )  # fmt: skip
    about = {
        "threshold": found.cosine,
        "fmr_wanted": wanted,
        "fmr": found.fmr.value,
        "fmr_low": found.fmr.low,
        "fmr_high": found.fmr.high,
        "pairs": found.pairs,
        "mated": tail.mated,
        "over": found.over,
        "images": len(vectors_ND),
        "labels": labels,
        "reason": reason,
    }
    return found, about


def _sample(run: Run, training: pa.Table) -> tuple[NDArray[np.float16], NDArray[np.int64], bool]:
    """Vectors and person numbers of a random sample of training images, and whether the set has labels."""
    store = unit_store(run)
    columns = [
        store.read(name, ["vector"])["vector"] for name in run.table("scan", "training", UNITS)["unit"].to_pylist()
    ]
    stored = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
    first_N = np.ones(len(training), bool)
    if run.config.faces.several == "all":  # further faces have no label, and one person may be in many pictures
        first_N = face_numbers(run, "training") == 1
    usable = np.flatnonzero(np.asarray(stored.is_valid()) & first_N)
    chosen = np.random.default_rng(run.config.assess.seed).permutation(usable)[: run.config.assess.calibration_images]
    rows = np.sort(chosen)
    labels = [
        leakage.person(*pair)
        for pair in zip(*(training.take(rows)[c].to_pylist() for c in ("identity", "key")), strict=True)
    ]
    _, person_N = np.unique(np.array(labels, dtype=object).astype(str), return_inverse=True)
    return (
        vectors.from_arrow(stored.take(pa.array(rows))),
        person_N.astype(np.int64),
        training["identity"].filter(pa.array(first_N)).null_count == 0,
    )


def _non_mated(person_N: NDArray[np.int64]) -> int:
    """Pairs of rows that belong to different persons."""
    counts = np.bincount(person_N)
    return int(len(person_N) * (len(person_N) - 1) // 2 - (counts * (counts - 1) // 2).sum())
