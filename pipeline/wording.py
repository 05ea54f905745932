"""Numbers and names as the report and the terminal write them, the same everywhere.

A value that was not measured is null in `summary.json`, and infinite or not a number where a division failed: all three
are written as `not estimable`, never as a number.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

NOT_ESTIMABLE = "not estimable"

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SLASH = r"[/\\]"
_PATH = re.compile(r"(?:file:|~|[A-Za-z]:)?[/\\]")
_PATH_INSIDE = re.compile(r"(?<![\w./:\\~])(?:file:/*|~|[A-Za-z]:)?[/\\](?:[^/\\\s'\"]+[/\\])*([^/\\\s'\"]+)[/\\]?")


def known(value: float | None) -> bool:
    """Whether there is a value: not null, infinite or not a number."""
    return value is not None and math.isfinite(value)


def number(value: float | None) -> str:
    """A count or measure for reading: thousands separated, three significant digits for what is not whole."""
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else power(value)


def estimate(value: float | None) -> str:
    """`number` of something that was estimated."""
    return number(value) if known(value) else NOT_ESTIMABLE


def cosine(value: float | None) -> str:
    """A cosine for reading, always with four digits."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4f}"


def power(value: float) -> str:
    """A small rate as a power of ten, for example 1.0 × 10⁻⁶."""
    if not value or not math.isfinite(value):
        return number(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def percent(value: float | None) -> str:
    """A share in per cent, three significant digits."""
    if value is None or not math.isfinite(value):
        return NOT_ESTIMABLE
    scaled = 100 * value
    digits = f"{scaled:.3g}" if not scaled or abs(scaled) >= 0.001 else power(scaled)
    return f"{digits.replace('-', '−', 1) if scaled < 0 else digits} %"


def spread(low: float | None, high: float | None) -> str:
    """The limits of an interval of a share; empty where either is not known."""
    return f"{percent(low)} to {percent(high)}" if known(low) and known(high) else ""


def measured(rate: dict[str, float | None] | None) -> str:
    """A rate with its interval, for example `40 % (22.7 % to 59.4 %)`."""
    if rate is None or not known(rate["value"]):
        return NOT_ESTIMABLE
    limits = spread(rate["low"], rate["high"])
    return f"{percent(rate['value'])} ({limits})" if limits else percent(rate["value"])


def p_value(value: float | None) -> str:
    """A p-value or q-value: two significant digits, small ones as powers of ten."""
    if value is None or not math.isfinite(value):
        return NOT_ESTIMABLE
    if value <= 0:
        return "below 10⁻³⁰⁰"
    return f"{value:.2g}" if value >= 0.001 else power(value)


def count(amount: int, noun: str, plural: str = "") -> str:
    """A count with its noun in the right number."""
    return f"{amount:,} {noun if amount == 1 else plural or noun + 's'}"


def passed_over(sets: Mapping[str, Any]) -> list[str]:
    """A sentence on the faces beside the audited ones, from the sets of a summary; nothing where there are none."""
    told = [one["faces"] for one in sets.values() if one.get("faces")]
    faces, images = (sum(one[name] for one in told) for name in ("passed_over", "images_with_passed_over"))
    if not faces:
        return []
    return [
        f"{count(faces, 'further face')} in {count(images, 'image')} {'was' if faces == 1 else 'were'} found and not "
        f"audited (options faces.several, most_faces and min_face). Whom such faces show is unknown."
    ]


def without_folders(text: str) -> str:
    """`text` with local paths cut to their last part: folders tell who works where, and a reader does not need them."""
    if _PATH.match(text):
        return f"…/{re.split(_SLASH, text.rstrip(chr(92) + '/'))[-1]}"
    return _PATH_INSIDE.sub(r"…/\1", text)
