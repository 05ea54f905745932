"""Figures of the report as SVG and PNG; `pipeline.score_figure` and `pipeline.roc` have further ones.

Those here show, for every gallery set, the best cosine of each release image. The histogram shows whether sets are
comparable at all: the bodies of training and control should lie on each other, and only then does a heavier training
tail mean anything. The exceedance curve shows what the one number at the threshold hides: whether the gap between
training and control holds over a range of thresholds, or rests on where the line was drawn.

The same input gives the same bytes. Text stays text (selectable, searchable, in the reader's own font).
"""

import html
import io
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.wording import power

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BIN = 0.02
"""Width of a histogram bin in cosine."""

POINTS = 400
"""Points of an exceedance curve; more cannot be told apart at the size of the figure."""

BEST = "best cosine of a release image"
WIDTH_INCHES, ROW_INCHES = 7.6, 0.2
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, MUTED, RULE = "#1f2933", "#52606d", "#d9dee4"


class Style(NamedTuple):
    """How a gallery set is drawn: told apart by hue, by lightness and by dash, so also in print."""

    colour: str
    dash: str


STYLES = {
    "training": Style("#c2410c", "solid"),
    "control": Style("#0b6fb8", "dashed"),
    "anchor": Style("#5b6470", "dotted"),
}
OTHER = Style("#7a3e9d", "dashdot")


PNG_DPI = 192
"""Dots of a PNG per inch: two for each CSS pixel."""


class Drawing(str):
    """A figure as one `<svg>` element, for a page or a file, which can also be had as a PNG."""

    __slots__ = ("_figure", "name")

    def __new__(cls, text: str, name: str, figure: "Figure") -> "Drawing":  # noqa: D102
        made = super().__new__(cls, text)
        made.name, made._figure = name, figure
        return made

    name: str
    """What its file is called, without a suffix."""
    _figure: "Figure"

    def png(self) -> bytes:
        """The figure on white, `PNG_DPI` dots per inch; the same figure gives the same bytes, without metadata."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        out = io.BytesIO()
        with style(self.name):
            self._figure.patch.set(visible=True, facecolor="white")
            self._figure.set_dpi(PNG_DPI)
            FigureCanvasAgg(self._figure).print_png(out, metadata={"Software": None})
        return out.getvalue()


def best_match_figure(best: Mapping[str, NDArray[np.float64]], threshold: float) -> Drawing:
    """SVG of the distribution of best cosines: one histogram outline per gallery set, on a logarithmic scale.

    Parameters
    ----------
    best
        Best cosine of each release image, shape (Q,), by gallery set. Values that are not finite are left out.
    threshold
        Cosine from which a pair is a candidate.
    """
    given = _finite(best)
    edges = bin_edges(given, threshold)
    with style("best-match"):
        figure, axes = axes_of("Share of release images per bin", BEST, len(given))
        for arm, values_Q in given.items():
            shares = np.histogram(values_Q, edges)[0] / len(values_Q)
            axes.stairs(
                np.where(shares > 0, shares, np.nan), edges, label=_label(arm, values_Q, threshold), **line_of(arm)
            )
        lowest = min((1 / len(values_Q) for values_Q in given.values()), default=1e-3)
        finish(figure, axes, edges[0], edges[-1], lowest, threshold)
        told = "Distribution of the best cosine of each release image, by gallery set, on a logarithmic scale."
        return svg(figure, "best-match", "Best match of each release image", _told(told, given, threshold))


def exceedance_figure(best: Mapping[str, NDArray[np.float64]], threshold: float) -> Drawing:
    """SVG of the share of release images whose best cosine is at least x: one curve per gallery set.

    Parameters as for `best_match_figure`. A gap between training and control is what leakage looks like; curves of
    sets of different size differ by chance as well, because a larger set offers more chances for a high best match.
    """
    given = _finite(best)
    edges = bin_edges(given, threshold)
    with style("exceedance"):
        figure, axes = axes_of("Share of release images at or over x", BEST, len(given))
        for arm, values_Q in given.items():
            cosines, shares = exceedance(values_Q)
            x, y = np.concatenate([edges[:1], cosines]), np.concatenate([[1.0], shares])
            # The share is that of the next point to the right: between neighbouring values nothing changes.
            axes.step(x, y, where="pre", label=_label(arm, values_Q, threshold), **line_of(arm))
        lowest = min((1 / len(values_Q) for values_Q in given.values()), default=1e-3)
        finish(figure, axes, edges[0], edges[-1], lowest, threshold)
        told = "Share of release images whose best cosine is at least x, by gallery set, on a logarithmic scale."
        return svg(figure, "exceedance", "Release images at or over a cosine", _told(told, given, threshold))


def exceedance(values_Q: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distinct cosines, ascending, and the share of values at or over each.

    Of more than `POINTS` values, points evenly spaced in the logarithm of the rank are kept, the highest always.
    """
    falling = np.sort(values_Q)[::-1]
    ranks = np.unique(np.geomspace(1, len(falling), POINTS).round().astype(np.int64))
    cosines = np.unique(falling[ranks - 1] if len(falling) > POINTS else falling)
    over = len(falling) - np.searchsorted(falling[::-1], cosines, side="left")
    return cosines, over / len(falling)


def bin_edges(best: Mapping[str, NDArray[np.float64]], threshold: float) -> NDArray[np.float64]:
    """Edges of bins of width `BIN` at multiples of `BIN` that hold all values and the threshold."""
    everything = np.concatenate([*best.values(), [threshold]])
    first, last = np.floor(everything.min() / BIN - 0.5), np.floor(everything.max() / BIN + 0.5) + 1
    return np.arange(int(first), int(last) + 1, dtype=np.float64) * np.float64(BIN)


def _finite(best: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Gallery sets that have values, in the order in which they are always drawn."""
    kept = {arm: np.asarray(one, np.float64)[np.isfinite(one)] for arm, one in best.items()}
    order = [*(arm for arm in STYLES if arm in kept), *(arm for arm in kept if arm not in STYLES)]
    return {arm: kept[arm] for arm in order if len(kept[arm])}


def _label(arm: str, values_Q: NDArray[np.float64], threshold: float) -> str:
    over = int((values_Q >= threshold).sum())
    return f"{arm}: {over:,} of {len(values_Q):,} at or over, highest {values_Q.max():.3f}"


def line_of(arm: str) -> dict[str, Any]:
    """How the curve of a gallery set is drawn."""
    style = STYLES.get(arm, OTHER)
    return {"color": style.colour, "linestyle": style.dash, "linewidth": 1.8}


def style(name: str) -> AbstractContextManager[None]:
    """Matplotlib's own defaults, whatever the user's settings are, and what makes the bytes repeatable."""
    from matplotlib import style as matplotlib_style

    own = {"svg.hashsalt": name, "svg.fonttype": "none", "font.family": ["DejaVu Sans"]}
    return matplotlib_style.context(["default", own])  # type: ignore[no-any-return, unused-ignore]


def axes_of(ylabel: str, xlabel: str, rows: int) -> "tuple[Figure, Axes]":
    """A figure with empty axes, logarithmic in y, below room for a legend of `rows` rows."""
    from matplotlib.figure import Figure

    # Rows from the top, so that nothing can lie on a curve: what y is, one per gallery set, the threshold, the axes.
    figure = Figure(figsize=(WIDTH_INCHES, 3.55 + ROW_INCHES * rows))
    figure.patch.set_visible(False)
    total = figure.get_figheight()
    axes = figure.add_axes((0.088, 0.5 / total, 0.9, 2.6 / total))
    axes.set_xlabel(xlabel, color=MUTED, labelpad=6)
    figure.text(0, 1 - 0.03 / total, ylabel, color=MUTED, va="top")
    axes.set_yscale("log")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(which="both", length=0, colors=MUTED, labelsize=9.5, pad=6)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def finish(figure: "Figure", axes: "Axes", left: float, right: float, lowest: float, threshold: float) -> None:
    """Set limits, ticks, threshold line and labels; `lowest` is the smallest share that can be drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator

    axes.set_xlim(left, right)
    axes.set_ylim(lowest * 0.6, 1.25)
    axes.yaxis.set_major_locator(LogLocator(10))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: _tick(share)))
    axes.xaxis.set_major_locator(MultipleLocator(0.1 if right - left > 0.5 else 0.05))
    axes.axvline(threshold, color=INK, linewidth=1.1)
    far = (threshold - left) / (right - left)
    side = "right" if far > 0.85 else "left" if far < 0.15 else "center"
    place = axes.get_xaxis_transform()
    axes.text(threshold, 1.04, f"threshold {threshold:.3f}", transform=place, color=INK, ha=side, size=10)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(
            loc="upper left", bbox_to_anchor=(0, 1 - 0.21 / figure.get_figheight()), labelcolor="linecolor",
            fontsize=10, frameon=False, borderaxespad=0, handlelength=2.4, labelspacing=0.35,
        )  # fmt: skip
    else:
        axes.text(0.5, 0.5, "nothing was compared", transform=axes.transAxes, ha="center", color=MUTED, size=12)


def _tick(share: float) -> str:
    """A share that is a power of ten as a label in per cent: 0.01 %, 10⁻³ %."""
    return f"{share * 100:g} %" if share > 5e-5 else f"{power(share * 100).rpartition(' ')[2]} %"


def _told(told: str, given: Mapping[str, NDArray[np.float64]], threshold: float) -> str:
    """The description with what the figure shows of every gallery set."""
    facts = " ".join(f"{_label(arm, values_Q, threshold)}." for arm, values_Q in given.items())
    return f"{told} Threshold {threshold:.3f}. {facts}"


def svg(figure: "Figure", name: str, title: str, told: str) -> Drawing:
    """The figure as one `<svg>` element that scales with its column, names itself to screen readers and has own ids.

    `name` is the start of every id; `title` goes in as it is, `told` is escaped.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    text = out.getvalue()
    text = re.sub(r"'DejaVu Sans'[^;\"]*", FONTS, text[text.index("<svg") :])
    # An inline style sheet would apply to the whole page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, count=1, flags=re.DOTALL)
    text = text.replace("xlink:href=", "href=").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    head = f'<title id="{name}-title">{title}</title><desc id="{name}-desc">{html.escape(told)}</desc>'
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', _role(name), text, count=1)
    text = re.sub(r"(<svg[^>]*>)", lambda found: found[1] + head, text, count=1).strip()
    return Drawing(text, name, figure)


def _role(name: str) -> str:
    return f'width="100%" style="stroke-linejoin: round" role="img" aria-labelledby="{name}-title {name}-desc"'
