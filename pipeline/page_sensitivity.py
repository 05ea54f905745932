"""The report's tables on sensitivity: other options, planted copies, and what follows where nothing was found."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from operators.excess import upper_bound
from pipeline.page_evidence import SIGNIFICANT, Evidence
from pipeline.wording import NOT_ESTIMABLE, count, estimate, known, measured, p_value, percent


class Grid(NamedTuple):
    """A table of text: names of its columns, and rows whose first cell names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def looks(evidence: Evidence) -> Grid:
    """The same audit with one option changed."""
    rows = [[look["what"], f"{look['listed']:,}", p_value(look["p"])] for look in evidence["sensitivity"]]
    test = evidence["excess"][0] if evidence["excess"] else None
    own = ["this report", f"{evidence['listed']:,}", p_value(test["p"] if test else None)]
    return Grid(("Audit", "Listed", "Exact p of the excess"), [own, *rows])


def recall(evidence: Evidence) -> Grid | None:
    """Recall of planted copies by class; without claim only at the plain threshold."""
    if not evidence["recall"]:
        return None
    bars = ("over_threshold", "excess", "listed") if evidence["claim"] else ("over_threshold",)
    names = {"over_threshold": "Over the threshold", "excess": "At the bar of the excess test", "listed": "On the list"}
    rows = []
    for one in evidence["recall"]:
        planted = f"{one['planted']:,}" + (f" ({one['not_audited']:,} not audited)" if one["not_audited"] else "")
        found = [measured(one["recall"].get(bar)) for bar in bars]
        rows.append([f"{one['transform'].replace('_', ' ')}: {one['does']}", planted, *found])
    return Grid(("Planted copies", "Planted", *(names[bar] for bar in bars)), rows)


def bounds(evidence: Evidence) -> Grid | None:
    """Where nobody is over the threshold: how many people can have leaked in each planted way, with 95 % confidence.

    `operators.excess.upper_bound` at the lower limit of the recall.
    """
    tested, over = evidence["persons"]["tested"]["training"], evidence["over_threshold"]["training"]
    if not evidence["recall"] or over or not tested:
        return None
    rows = []
    for one in evidence["recall"]:
        rate = one["recall"].get("over_threshold")
        share = upper_bound(tested, rate["low"]) if rate is not None and known(rate["low"]) else None
        rows.append([one["transform"].replace("_", " "), percent(share)])
    return Grid(("Planted copies", "Leaked in this way, at most"), rows)


def power(evidence: Evidence) -> str:
    """Where no excess was found: the excess that would have been, by the recall of planted copies.

    The least detectable excess holds for people who all reach the bar; divided by the lower limit of a recall it holds
    for leaks of that class.
    """
    if not evidence["recall"] or not evidence["excess"] or evidence["excess"][0]["p"] < SIGNIFICANT:
        return ""
    least = evidence["detectable"][0]["share"]
    lows = [one["recall"]["excess"]["low"] for one in evidence["recall"] if one["recall"].get("excess") is not None]
    lows = sorted({low for low in lows if known(low) and low > 0})
    if not known(least) or not lows or least / lows[-1] > 1:
        return f"How large an excess would have been found is {NOT_ESTIMABLE}."
    told = [f"{percent(least / low)} or more for leak classes with recall {percent(low)} or more" for low in lows[::-1]]
    told = [one for one, low in zip(told, lows[::-1], strict=True) if least / low <= 1]
    chosen = dict.fromkeys([told[0], told[-1]])
    return f"With 80 % power this audit would have found an excess of {', and of '.join(chosen)}."


def alignment(found: Mapping[str, Any] | None) -> str:
    """Whether release labels follow those of the training set."""
    if found is None:
        return ""
    p, tries = p_value(found["p_value"]), f"{found['permutations']:,} permutations"
    identities = count(found["identities"], "release identity", "release identities")
    if found["test"] == "alignment":
        told = (
            f"Of {identities}, {found['aligned']:,} are closest to a training person within {found['within']:,} places "
            f"of their own label: {measured(found['share'])}, against {percent(found['expected'])} by chance (p = {p}, "
            f"{tries})."
        )
    else:
        told = (
            f"The order of {identities} and that of their closest training people have a rank correlation of "
            f"{estimate(found['correlation'])} (p = {p}, {tries})."
        )
    if not known(found["p_value"]) or found["p_value"] >= SIGNIFICANT:
        return f"{told} That is no sign that labels of the release follow those of the training set."
    return (
        f"{told} Labels that follow each other speak for a generator that was conditioned on the training labels; both "
        f"orders may also follow something else that faces show."
    )
