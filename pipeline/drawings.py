"""The report's figures: drawn from what the search and assess committed, and saved for other documents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.files import write_private
from operators.tables import NEIGHBOURS, SCORES
from pipeline.figures import Drawing, best_match_figure, exceedance_figure
from pipeline.roc import roc_figure
from pipeline.score_figure import score_figure
from pipeline.search import results
from pipeline.stage import Run

FOLDER = "figures"


class Drawings(NamedTuple):
    """The figures of one report."""

    scores: list[tuple[str, Drawing]]
    """With their captions."""
    roc: Drawing | None
    """Where the audit may state rates."""

    def files(self) -> dict[str, bytes]:
        """Name and content of every figure, as SVG and as PNG."""
        drawn = [one for _, one in self.scores] + ([self.roc] if self.roc is not None else [])
        made = {f"{one.name}.svg": f"{one}\n".encode() for one in drawn}
        return made | {f"{one.name}.png": one.png() for one in drawn}


def drawings(run: Run, summary: Mapping[str, Any], digits: int | None = None) -> Drawings:
    """All figures of the report; with `digits`, of scores that are rounded first, so that none can be read exactly."""
    threshold, evidence = summary["calibration"]["threshold"], summary.get("evidence")
    best = best_matches(run)
    if digits is not None:
        best = {arm: coarse(values_Q, threshold, digits) for arm, values_Q in best.items()}
    figures = [
        ("Best match of every release image", best_match_figure(best, threshold)),
        ("Share of release images whose best match reaches a score", exceedance_figure(best, threshold)),
    ]
    if (counted := _counted(run, threshold)) is not None:
        figures.insert(0, ("Share of all comparisons that reach a score", counted))
    if evidence is None or not evidence["claim"]:
        return Drawings(figures, None)
    tested = evidence["persons"]["tested"]
    return Drawings(figures, roc_figure(evidence["roc"], tested["training"], tested["control"], evidence["operating"]))


def save(folder: Path, made: Drawings) -> None:
    """Write all figures into `figures/` of a folder, and remove those that an earlier report had and this has not."""
    files = made.files()
    for name, data in files.items():
        write_private(folder / FOLDER / name, data)
    for path in (folder / FOLDER).iterdir():
        if path.name not in files and path.suffix in (".svg", ".png"):
            path.unlink()


def best_matches(run: Run) -> dict[str, NDArray[np.float64]]:
    """The best cosine of every audited release image in each gallery set, in release row order."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    for block in results(run, NEIGHBOURS):
        first = block.filter(pc.equal(block["rank"], 1))
        for arm in pc.unique(first["arm"]).to_pylist():
            found.setdefault(arm, []).append(first.filter(pc.equal(first["arm"], arm))["cosine"].to_numpy())
    return {arm: np.concatenate(parts) for arm, parts in found.items()}


def coarse(values_Q: NDArray[np.float64], threshold: float, digits: int) -> NDArray[np.float64]:
    """Values rounded to decimals, each on its side of the threshold, so that as many are at or over it as before."""
    near_Q, step = np.round(values_Q, digits), 10.0**-digits
    near_Q = np.where((values_Q >= threshold) & (near_Q < threshold), threshold, near_Q)
    return np.where((values_Q < threshold) & (near_Q >= threshold), near_Q - step, near_Q)


def _counted(run: Run, threshold: float) -> Drawing | None:
    """The figure of all comparisons; None if the counts are of another search, as a version before this left them."""
    key, store = run.commit("search", "coverage").key, run.store.child("search")
    for name in ("scores-coverage", "sample"):
        made = store.find(name)
        if made is None or made.key != key:
            return None
    return score_figure(
        run.table("search", "scores-coverage", SCORES), run.table("search", "sample", SCORES), threshold
    )
