"""When something is due: the least time between two looks at it, kept by whoever is started often enough (cron)."""

import re
from datetime import UTC, datetime, timedelta

UNITS = {"min": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
"""What an interval may be counted in."""
EARLY = 0.01
"""Share of an interval by which it may fall short: a timer that starts a little earlier than yesterday is still due."""


def interval(text: str) -> timedelta:
    """`30min`, `12h`, `7d` or `2w` as a duration; `0` for always.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    found = re.fullmatch(rf"(\d{{1,6}})\s*({'|'.join(UNITS)})", text.strip())
    if found is not None:
        return int(found[1]) * UNITS[found[2]]
    if text.strip() == "0":
        return timedelta()
    raise ValueError(f"every must be a number of {', '.join(UNITS)}, such as 7d, or 0 for every time. Got {text!r}.")


def due(last: str | None, every: timedelta, now: datetime) -> bool:
    """Whether `every` has passed since `last`, a time as `utc` writes it; also if there is none, or it is to come."""
    if last is None:
        return True
    passed = now - datetime.fromisoformat(last)
    return passed < timedelta() or passed >= every * (1 - EARLY)


def utc(now: datetime | None = None) -> str:
    """A time, or this moment, as text in UTC to the second."""
    return (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
