from datetime import UTC, datetime, timedelta, timezone

import pytest

from cluster.schedules import due, interval, utc

NOON = datetime(2030, 1, 7, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "minutes"), [("30min", 30), ("12h", 720), ("7d", 10_080), ("2w", 20_160), ("0", 0), ("1 d", 1440)]
)
def test_intervals(text: str, minutes: int) -> None:
    assert interval(text) == timedelta(minutes=minutes)


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1.5d", "7 days", "1y", "9999999d"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"every must be a number of min, h, d, w.* Got "):
        interval(text)


@pytest.mark.parametrize(
    ("passed", "expected"),
    [
        (timedelta(hours=23), False),
        (timedelta(hours=23, minutes=50), True),  # a timer that starts ten minutes early
        (timedelta(days=1), True),
        (timedelta(days=90), True),
        (timedelta(minutes=-5), True),  # a clock that was put back must not stop audits for ever
    ],
)
def test_due_is_what_was_looked_at_long_enough_ago(passed: timedelta, expected: bool) -> None:
    assert due(utc(NOON - passed), timedelta(days=1), NOON) is expected


def test_due_is_also_what_was_never_looked_at_or_is_wanted_every_time() -> None:
    assert due(None, timedelta(weeks=1), NOON) and due(utc(NOON), timedelta(), NOON)


def test_times_are_written_in_utc() -> None:
    assert utc(datetime(2030, 1, 7, 14, tzinfo=timezone(timedelta(hours=2)))) == "2030-01-07T12:00:00+00:00"
    assert utc().endswith("+00:00")
