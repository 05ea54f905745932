"""Whether the labels of the release follow those of the training set, as a class-conditional generator leaves them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.class_alignment import alignment_test, nearest_class, order_test
from operators.tables import NEIGHBOURS
from pipeline.search import results
from pipeline.stage import Run


def same_classes(run: Run, sets: Mapping[str, pa.Table]) -> dict[str, Any] | None:
    """The test of `operators.class_alignment`, as the summary says it; None where one of the sets has no labels.

    Labels count by their place in sorted order. Where both sets have equally many, a release identity is aligned if its
    nearest training person has nearly the same place; otherwise only the two orders are compared.
    """
    ranks, sizes = {}, {}
    for role in ("release", "training"):
        labels = sets[role]["identity"].combine_chunks()
        names = sorted(pc.unique(labels.drop_null()).to_pylist(), key=_natural)
        if len(names) < 2:
            return None
        ranks[role] = pc.index_in(labels, pa.array(names, pa.string())).fill_null(-1).to_numpy()
        sizes[role] = len(names)
    own, nearest = [], []
    for block in results(run, NEIGHBOURS):
        best = block.filter(pc.and_(pc.equal(block["arm"], "training"), pc.equal(block["rank"], 1)))
        own.append(ranks["release"][best["release_row"].to_numpy()])
        nearest.append(ranks["training"][best["gallery_row"].to_numpy()])
    left, right = np.concatenate(own), np.concatenate(nearest)
    known = (left >= 0) & (right >= 0)
    if not known.any():
        return None
    columns = nearest_class(left[known].astype(np.int64), right[known].astype(np.int64))
    seed = run.config.assess.seed
    if sizes["release"] == sizes["training"]:
        found = alignment_test(*columns, sizes["training"], seed=seed)
        return {"test": "alignment", **found._asdict(), "share": found.share._asdict()}
    return {"test": "order", **order_test(*columns, seed=seed)._asdict()}


def _natural(label: str) -> tuple[int, int, str]:
    """Numbers by value, before names by letters."""
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)
