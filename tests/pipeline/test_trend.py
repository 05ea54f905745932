"""The trend page shows aggregates, escaped, from one file."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.trend import HIGH, WIDE, charts, write_trend
from pipeline.watch_ledger import WatchLedger
from pipeline.watchlist import WatchConfig, WatchedAudit


def result(at: int, **given: Any) -> dict[str, Any]:
    base = {"id": str(at), "findings": 10 * at, "listed": 5 * at, "grade": "A", "limit": 3, "reasons": ["new: x"]}
    sets = {"release": {"images": 100 + at, "audited": 99 + at}}
    changed = {"comparable": True, "new": 1, "gone": 2, "moved": 0, "unchanged": 3}
    return {**base, "sets": sets, "excess": {"delta": 0.01 * at}, "changes": changed if at else None, **given}


@pytest.fixture
def page(tmp_path: Path) -> str:
    ledger = WatchLedger(tmp_path)
    for at in range(3):
        ledger.add("result", f"2030-01-0{at + 1}T00:00:00+00:00", "faces", result(at))
    ledger.add("result", "2030-01-04T00:00:00+00:00", "faces", result(3, reasons=["<script>alert(1)</script>\u202e"]))
    ledger.keep("faces", {"looked": "2030-01-05T00:00:00+00:00", "over": True, "failed": "FormatError"})
    audits = [WatchedAudit(name=name, config="x") for name in ("faces", "later")]
    write_trend(tmp_path, WatchConfig(out=str(tmp_path), audits=audits), ledger)
    return (tmp_path / "trend.html").read_text()


def test_the_page_shows_each_audit_with_its_charts_and_is_safe_to_open(page: str) -> None:
    assert page.count("<polyline") == 3 and page.count("<circle") == 12
    assert "Over the limit: 30 people" in page and "failed (FormatError)" in page and "No result yet" in page
    assert "<script" not in page and "\u202e" not in page and "&lt;script&gt;" in page
    assert not re.search(r"""(src|href)=|url\(|https?://""", page)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    assert "1 new, 2 gone, 0 moved, 3 as before" in page and "first result" in page


def test_charts_leave_out_what_a_result_does_not_state_and_stay_inside(page: str) -> None:
    del page
    made = charts([result(0), result(1, excess=None), result(4)])
    people, excess, images = made
    assert (people.title, people.newest, excess.newest, images.newest) == ("People listed", "20", "4.0 %", "103")
    assert len(people.points) == 3 and len(excess.points) == 2
    assert all(0 <= x <= WIDE and 0 <= y <= HIGH for chart in made for x, y in chart.points)
    heights = [y for _, y in people.points]
    assert heights == sorted(heights, reverse=True)  # more is higher up
    plain = charts([result(1, listed=None, excess=None)])
    assert [chart.title for chart in plain] == ["People over the threshold", "Release images audited"]
    assert charts([]) == []


def test_a_torn_line_of_the_ledger_costs_that_line_only(tmp_path: Path) -> None:
    ledger = WatchLedger(tmp_path)
    ledger.add("result", "2030-01-01T00:00:00+00:00", "faces", {"id": "a"})
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "resu')
    again = WatchLedger(tmp_path)
    again.add("told", "2030-01-02T00:00:00+00:00", "faces", {"id": "a"})
    assert [line["event"] for line in WatchLedger(tmp_path).of("faces", "result", "told")] == ["result", "told"]
