"""The trend page of a watch folder: one file without scripts or requests, aggregates only.

For each audit: its newest result, and how people listed, their excess over controls and the images audited went.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from cluster.storage import write_private
from pipeline.spreadsheet import visible
from pipeline.watch_ledger import WatchLedger
from pipeline.watchlist import WatchConfig

PAGE = "trend.html"
SHOWN = 60
"""Newest results of an audit that its charts show; its table has the newest ten."""
ROWS = 10
WIDE, HIGH, EDGE = 260, 64, 6
"""Of a chart, in its own units."""


class Chart(NamedTuple):
    """One quantity over the results."""

    title: str
    newest: str
    points: list[tuple[float, float]]
    """Where the values stand in the drawing; results that do not state it are left out."""
    label: str
    """All that it shows, in words."""


def write_trend(folder: Path, config: WatchConfig, ledger: WatchLedger) -> None:
    """Write the page of all audits of the watchlist."""
    audits = []
    for one in config.audits:
        state, results = ledger.state(one.name), ledger.of(one.name, "result")
        audits.append(
            {
                "name": one.name,
                "looked": state.get("looked"),
                "failed": state.get("failed"),
                "over": bool(state.get("over")),
                "newest": results[-1] if results else None,
                "charts": charts(results[-SHOWN:]),
                "rows": results[: -ROWS - 1 : -1],
                "count": len(results),
            }
        )
    environment = Environment(
        loader=PackageLoader("pipeline"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_shown,
    )  # fmt: skip
    environment.filters["share"] = share
    environment.filters["changes"] = changes
    page = environment.get_template("trend.html.j2").render(audits=audits, wide=WIDE, high=HIGH)
    write_private(folder / PAGE, page.encode())


def charts(results: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """People, excess and images over some results, oldest first."""
    people = [one["findings"] if one["listed"] is None else one["listed"] for one in results]
    name = "People listed" if any(one["listed"] is not None for one in results) else "People over the threshold"
    excess = [None if one["excess"] is None else one["excess"]["delta"] for one in results]
    images = [one["sets"]["release"]["audited"] for one in results]
    made = [_chart(name, people, _count), _chart("Excess over controls", excess, share)]
    return [chart for chart in (*made, _chart("Release images audited", images, _count)) if chart.points]


def _chart(title: str, values: Sequence[float | None], text: Any) -> Chart:
    known = [(at, value) for at, value in enumerate(values) if value is not None]
    if not known:
        return Chart(title, "", [], "")
    lowest, highest = min(0.0, *(value for _, value in known)), max(value for _, value in known)
    across, up = max(1, len(values) - 1), (highest - lowest) or 1.0
    points = [
        (
            round(EDGE + (WIDE - 2 * EDGE) * at / across, 1),
            round(HIGH - EDGE - (HIGH - 2 * EDGE) * (value - lowest) / up, 1),
        )
        for at, value in known
    ]
    return Chart(title, text(known[-1][1]), points, f"{title}: {', '.join(text(value) for _, value in known)}")


def share(value: float | None) -> str:
    """A share in per cent."""
    return "not stated" if value is None else f"{100 * value:.1f} %"


def changes(found: Mapping[str, Any] | None) -> str:
    """What is new and gone among the findings."""
    if found is None:
        return "first result"
    text = f"{found['new']:,} new, {found['gone']:,} gone, {found['moved']:,} moved, {found['unchanged']:,} as before"
    return text if found["comparable"] else f"{text}; not comparable"


def _count(value: float) -> str:
    return f"{int(value):,}"


def _shown(value: Any) -> Any:
    """Numbers with separators, and text with whatever is not drawn as itself written out."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return visible(value) if type(value) is str else value
