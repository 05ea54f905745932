"""The figure of all comparisons: which share of them reaches a cosine, for every gallery set.

Counts are those of the search (`SCORES`): of all comparisons, exactly, from the floor up (or over the whole range with
`search.counts=all`), and of a random sample of comparisons below. The two are drawn unlike, because a share of the
sample has an error that an exact one has not, and nothing below one in the sample's size can be seen in it.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators.tables import SCORES
from pipeline.figures import STYLES, Drawing, axes_of, finish, line_of, style, svg

FULL = 0.9995
"""Share from which a curve is left out: there it is flat, and the room is for the tail."""


class Curve(NamedTuple):
    """The share of the comparisons of one gallery set at or over each cosine; both fall to the right."""

    arm: str
    cosine: NDArray[np.float64]
    share: NDArray[np.float64]
    comparisons: int
    """Of which the shares are."""


def curves(scores: pa.Table) -> list[Curve]:
    """The curves in rows of the SCORES contract, gallery sets in the order in which they are always drawn."""
    arms = pc.unique(SCORES.check(scores)["arm"]).to_pylist()
    found = []
    for arm in sorted(arms, key=lambda one: [*STYLES, one].index(one)):
        own = scores.filter(pc.equal(scores["arm"], arm)).sort_by("cosine")
        total = own["comparisons"][0].as_py()
        pairs = own["pairs"].to_numpy()
        some = pairs > 0
        if total and some.any():
            found.append(Curve(arm, own["cosine"].to_numpy()[some], pairs[some] / total, total))
    return found


def score_figure(exact: pa.Table, sample: pa.Table, threshold: float) -> Drawing:
    """The share of comparisons at or over a cosine, on a logarithmic scale: one curve per gallery set and basis.

    Parameters
    ----------
    exact, sample
        Rows of the SCORES contract with the basis `all` and `sample`; the sample is drawn below the first exact count.
    threshold
        Cosine from which a pair is a candidate.
    """
    told = curves(exact)
    first = {one.arm: float(one.cosine[0]) for one in told}
    below = [one for one in (_below(one, first.get(one.arm)) for one in curves(sample)) if len(one.cosine) > 1]
    below = [one for one in below if (one.share < FULL).any()]
    with style("scores"):
        figure, axes = axes_of("Share of all comparisons at or over x", "cosine of a comparison", len(told + below))
        for one in told:
            axes.plot(one.cosine, one.share, label=_label(one, first), **line_of(one.arm))
        for one in below:
            thin = {**line_of(one.arm), "linewidth": 0.9, "alpha": 0.75}
            axes.plot(one.cosine, one.share, label=_label(one, None), **thin)
        left, right, lowest = _limits([*told, *below], threshold)
        finish(figure, axes, left, right, lowest, threshold)
        labels = [*(_label(one, first) for one in told), *(_label(one, None) for one in below)]
        facts = " ".join(f"{label}." for label in labels)
        says = f"Share of all comparisons at or over x, by gallery set. Threshold {threshold:.3f}. {facts}"
        return svg(figure, "scores", "All comparisons at or over a cosine", says)


def _below(sample: Curve, first: float | None) -> Curve:
    """The part of a sample's curve up to the first exact count; all of it where there is none."""
    some = sample.cosine <= (np.inf if first is None else first)
    start = max(0, int((sample.share >= FULL).sum()) - 1)
    some[:start] = False
    return sample._replace(cosine=sample.cosine[some], share=sample.share[some])


def _label(one: Curve, exact_from: dict[str, float] | None) -> str:
    if exact_from is None:
        return f"{one.arm}: a random sample of {one.comparisons:,}"
    return f"{one.arm}: {one.comparisons:,} comparisons, exactly, from {exact_from[one.arm]:.2f} up"


def _limits(drawn: list[Curve], threshold: float) -> tuple[float, float, float]:
    """Lowest and highest cosine, and the smallest share."""
    if not drawn:
        return threshold - 0.25, threshold + 0.25, 1e-3
    left = min(float(one.cosine[0]) for one in drawn)
    right = max(float(one.cosine[-1]) for one in drawn)
    lowest = min(float(one.share[-1]) for one in drawn)
    return min(left, threshold) - 0.02, max(right, threshold) + 0.03, lowest
