"""The ROC curve of the report.

Both axes are logarithmic, because what counts is how many members are found at a very low false positive rate (Carlini
et al., Membership Inference Attacks From First Principles, IEEE S&P 2022): on linear axes that corner is invisible.
Where fewer than 10 controls are over a bar the curve is drawn, on grey: its rates there are not estimable.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.figures import INK, MUTED, ROW_INCHES, RULE, STYLES, WIDTH_INCHES, Drawing, style, svg
from pipeline.wording import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOW = 0.01
"""False positive rate up to which the region is called low."""
FEWEST = 10
"""Controls over a bar below which its rates are not estimable (`operators.membership.FEWEST`)."""
GREY = "#e8ecf0"
BOX = "box of both rates, 95 %"


def roc_figure(
    curve: Sequence[Sequence[float]], members: int, controls: int, operating: Sequence[Mapping[str, Any]] = ()
) -> Drawing:
    """SVG of the ROC curve on logarithmic axes.

    Parameters
    ----------
    curve
        False and true positive rates, both ascending from 0 to 1, of the same length.
    members, controls
        Persons behind the rates: one of them is the smallest rate that can be drawn.
    operating
        Rates with the box of their uncertainty (`operators.membership.Operating`), drawn as boxes.

    Raises
    ------
    ValueError
        If the two lists differ in length, or a count is below 1.
    """
    if len(curve) != 2 or len(curve[0]) != len(curve[1]):
        raise ValueError("curve must hold as many false as true positive rates.")
    if members < 1 or controls < 1:
        raise ValueError(f"members and controls must be at least 1. Got {members} and {controls}.")
    left, bottom = min(0.5 / controls, LOW / 2), 0.5 / members
    limit = min(FEWEST / controls, 1.0)
    with style("roc"):
        figure, axes = _axes(left, bottom, 4 if operating else 3)
        _regions(axes, left, limit)
        x, y = drawn(np.asarray(curve, np.float64), left, bottom)
        line, box = STYLES["training"].colour, STYLES["control"].colour
        axes.plot([left, 1], [left, 1], color=MUTED, linestyle="dotted", linewidth=1.2, label="chance")
        axes.plot(x, y, color=line, linewidth=1.8, label="training against control people")
        for one in operating:
            axes.plot(*_box(one), color=box, linewidth=1.1, label=BOX if one is operating[0] else None)
        colours = [MUTED, MUTED, line, box] if operating else [MUTED, MUTED, line]
        figure.legend(
            loc="upper left", bbox_to_anchor=(0, 1 - 0.21 / figure.get_figheight()), labelcolor=colours, fontsize=10,
            frameon=False, borderaxespad=0, handlelength=2.4, labelspacing=0.35,
        )  # fmt: skip
        return svg(figure, "roc", "ROC curve", _told(x, y, limit, controls, operating))


def drawn(curve: NDArray[np.float64], left: float, bottom: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The curve's corners on logarithmic axes: rates below the axes lie on them, so that nothing is lost.

    The step at no control at all is the highest on such axes. A curve that was thinned has lost it and gets it back,
    from the first rate that it has.
    """
    false, found = curve
    if not (false[1:] == 0).any():
        false, found = np.insert(false, 1, 0.0), np.insert(found, 1, found[1] if len(found) > 1 else 0.0)
    return np.maximum(false, left), np.maximum(found, bottom)


def _axes(left: float, bottom: float, rows: int) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(WIDTH_INCHES, 4.15 + ROW_INCHES * rows))
    figure.patch.set_visible(False)
    total = figure.get_figheight()
    axes = figure.add_axes((0.088, 0.5 / total, 0.87, (total - 0.95 - ROW_INCHES * rows) / total))
    figure.text(0, 1 - 0.03 / total, "True positive rate: training people over the bar", color=MUTED, va="top")
    axes.set_xlabel("false positive rate: control people over the bar", color=MUTED, labelpad=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, 1.02)
    axes.set_ylim(bottom, 1.15)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{share * 100:g} %"))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(which="both", length=0, colors=MUTED, labelsize=9.5, pad=6)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _regions(axes: "Axes", left: float, limit: float) -> None:
    """Grey where rates are not estimable, and the end of the low-FPR region."""
    place = axes.get_xaxis_transform()
    axes.axvspan(left, limit, color=GREY, linewidth=0, zorder=0, label=f"under {FEWEST} controls: not estimable")
    axes.axvline(LOW, color=INK, linewidth=1.1)
    axes.text(LOW, 1.03, f"low region: {percent(LOW)} or less ", transform=place, color=INK, ha="right", size=10)


def _box(one: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Corners of the box that holds both true rates at 95 %."""
    left, right, low, high = (float(one[name]) for name in ("fpr_low", "fpr_high", "tpr_low", "tpr_high"))
    return [left, right, right, left, left], [low, low, high, high, low]


def _told(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    limit: float,
    controls: int,
    operating: Sequence[Mapping[str, Any]],
) -> str:
    reached = float(y[x <= limit].max(initial=0.0))
    boxes = "".join(f" At {percent(one['fpr'])}: {percent(one['tpr'])}." for one in operating)
    return (
        f"ROC curve with both axes logarithmic. Below a false positive rate of {percent(limit)}, where fewer than "
        f"{FEWEST} of {controls} controls are over the bar, rates are not estimable; up to there the curve reaches "
        f"{percent(reached)}.{boxes}"
    )
