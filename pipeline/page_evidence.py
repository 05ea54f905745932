"""What the first screen says of a controlled audit: its grade, the claims that it allows, and what is not claimed.

The sentences are those of the method (docs/method.md, Claims): a list is stated with its share of errors, an excess
with its interval and exact p-value, and everything at grade B under its condition. Where a check failed there are no
rates, and at no grade is a result called privacy. `evidence` is that part of `summary.json`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.wording import NOT_ESTIMABLE, count, estimate, known, p_value, percent, spread

Evidence = Mapping[str, Any]

SIGNIFICANT = 0.05
"""P-value of the excess test from which on no excess is claimed; its power is stated for the same level."""
REVIEWABLE = 10
"""Controls over a threshold below which no rate at it is stated (`operators.membership.FEWEST`)."""
CONDITION = "Conditional on comparability: "

MEANINGS = {
    "A": "The controls are declared a random hold-out of people, drawn before the generator was trained, so that both "
    "sets are alike by design. The rates below may be claimed.",
    "B": "The controls come from another source. They passed every check of comparability, so the rates below may be "
    "claimed on the condition that the two sets of people are alike.",
    "C": "The control set cannot carry a claim. This is a ranked list for human review, without rates of error.",
}
NO_CLAIM = (
    "The controls are declared a random hold-out of people, but a check failed. This is a ranked list for human review "
    "without rates of error."
)

NO_CONTROL = "No control set was tested. This is a ranked list for human review, without rates of error."


class Grade(NamedTuple):
    """The evidence grade as it is shown."""

    letter: str
    claim: bool
    meaning: str
    reasons: Sequence[str]


class Stat(NamedTuple):
    """One number of the first screen."""

    value: str
    says: str


def grade(evidence: Evidence | None) -> Grade:
    """The grade with its meaning and reasons; C where no control set was tested."""
    if evidence is None:
        return Grade("C", False, NO_CONTROL, [])
    claim = bool(evidence["claim"])
    letter = str(evidence["grade"])
    meaning = MEANINGS.get(letter, MEANINGS["C"]) if claim or letter == "C" else NO_CLAIM
    return Grade(letter, claim, meaning, evidence["reasons"])


def claims(evidence: Evidence) -> list[str]:
    """The sentences that the grade allows; one that says that there are none, where a check failed."""
    if not evidence["claim"]:
        return ["Ranked list only: this audit claims no rates, because a check that they rest on failed."]
    told = [_listed(evidence), excess_sentence(evidence)]
    if evidence["grade"] != "B":
        return told
    return [f"{CONDITION}{sentence[0].lower()}{sentence[1:]}" for sentence in told]


def _listed(evidence: Evidence) -> str:
    listed, tested, q = evidence["listed"], evidence["persons"]["tested"]["training"], percent(evidence["q"])
    if not listed:
        return (
            f"None of {tested:,} tested training people is listed at a false discovery rate of {q}; with this control "
            f"set {shortest_sentence(evidence)}."
        )
    verb = "is" if listed == 1 else "are"
    return (
        f"{listed:,} of {tested:,} tested training people {verb} listed. Of those listed, an expected {q} or fewer are "
        f"not linked to training membership."
    )


def shortest_sentence(evidence: Evidence) -> str:
    """The shortest list that the controls can support, which can be longer than there are people."""
    shortest, tested = evidence["shortest_list"], evidence["persons"]["tested"]["training"]
    if not known(shortest) or shortest > tested:
        return "no list can be supported"
    return f"the shortest list that can be supported has {count(shortest, 'person', 'people')}"


def excess_sentence(evidence: Evidence) -> str:
    """The excess test at the first level, with the excess that it would have found where it found none."""
    if not evidence["excess"]:
        return f"The excess rate is {NOT_ESTIMABLE}: there are too few controls."
    test = evidence["excess"][0]
    members, controls = test["member_hits"] / test["members"], test["control_hits"] / test["controls"]
    excess = f"an excess of {percent(test['delta'])}"
    if limits := spread(test["delta_low"], test["delta_high"]):
        excess += f" (95 % interval {limits})"
    shares = (
        f"{percent(members)} of members and {percent(controls)} of controls are over the bar that was set for "
        f"{percent(test['alpha'])} of controls (exact p = {p_value(test['p'])}), {excess}"
    )
    if test["p"] < SIGNIFICANT:
        return f"Members match the release more closely than controls: {shares}."
    least = _detectable(evidence, test["alpha"])
    power = (
        f"with 80 % power it would have found {percent(least)} or more" if known(least) else "its power is not known"
    )
    return (
        f"No excess found of members over controls: {shares}. This test sees only people whose leak reaches the bar; "
        f"if all did, {power}."
    )


def _detectable(evidence: Evidence, alpha: float) -> float | None:
    return next((one["share"] for one in evidence["detectable"] if one["alpha"] == alpha), None)


def stats(evidence: Evidence) -> list[Stat]:
    """The four numbers of the first screen of an audit that makes claims."""
    test = evidence["excess"][0] if evidence["excess"] else None
    limits = spread(test["delta_low"], test["delta_high"]) if test else ""
    low, high = recall_range(evidence)
    found = NOT_ESTIMABLE if low is None else percent(low) if low == high else f"{percent(low)} to {percent(high)}"
    condition = ", conditional on comparability" if evidence["grade"] == "B" else ""
    return [
        Stat(
            f"{evidence['listed']:,}",
            f"training people listed at a false discovery rate of {percent(evidence['q'])}{condition}",
        ),
        Stat(
            percent(test["delta"]) if test else NOT_ESTIMABLE,
            f"excess of members over controls{condition}" + (f"; 95 % interval {limits}" if limits else ""),
        ),
        Stat(p_value(test["p"]) if test else NOT_ESTIMABLE, "exact p-value of the excess"),
        Stat(found, "of planted copies found, by class")
        if evidence["recall"]
        else Stat("Not measured", "sensitivity; run unveil plant CONFIG"),
    ]


def main_bar(evidence: Evidence) -> str:
    """The bar at which recall is told first: that of the excess test, or the plain threshold where that has none."""
    classes = evidence["recall"] or []
    full = bool(classes) and all(one["recall"].get("excess") is not None for one in classes)
    return "excess" if evidence["claim"] and full else "over_threshold"


BARS = {
    "over_threshold": "the threshold of candidates",
    "excess": "the bar of the excess test",
    "listed": "the last place of the list",
}


def recall_range(evidence: Evidence) -> tuple[float | None, float | None]:
    """Lowest and highest recall of any class of planted copies; None where it was not measured."""
    rates = [one["recall"].get(main_bar(evidence)) for one in evidence["recall"] or []]
    values = [rate["value"] for rate in rates if rate is not None and known(rate["value"])]
    return (min(values), max(values)) if values else (None, None)


def sensitivity_sentence(evidence: Evidence) -> str:
    """Whether it was measured what this audit misses."""
    low, high = recall_range(evidence)
    if low is None:
        return (
            "Sensitivity was not measured: run `unveil plant CONFIG`. Until then nothing says how many leaks it misses."
        )
    found = percent(low) if low == high else f"between {percent(low)} and {percent(high)}"
    classes = count(len(evidence["recall"]), "class", "classes")
    return (
        f"Sensitivity was measured on copies of control people, planted in {classes}: {found} of a class reach "
        f"{BARS[main_bar(evidence)]}. Leaks of other kinds were not tried."
    )


def looks_sentence(evidence: Evidence) -> str:
    """Says that results were looked at under other options too; empty for the only look."""
    looks, look = evidence["frozen"]["looks"], evidence["frozen"]["look"]
    if looks <= 1:
        return ""
    return (
        f"The results were looked at under {looks} sets of options; this is number {look}."
        + " The rates hold for options that were fixed before the first look, not for the best of several."
        * bool(evidence["claim"])
    )


def not_claimed(evidence: Evidence) -> list[str]:
    """What must not be read into this report, in plain words."""
    told = []
    if evidence["claim"]:
        told.append(
            "That everybody listed is in the release: the list has a share of errors, and a person who looks at the "
            "images has to judge each pair. It names no real person."
        )
    else:
        told.append("Any rate: no false discovery rate of the list, no excess over the controls, no p-value.")
        told.append("That the people at the top are in the release: look-alikes are expected among them.")
    told.append("That a pair is a leak because its cosine is high.")
    told.append(
        "That the generator memorised a photo: at most a finding of the tier “same photo” speaks of a picture, all "
        "others of the likeness of a person."
    )
    told.append(
        "That the release is private, anonymous, lawful or free of training faces, whatever the counts. Leaks that the "
        "face model cannot see and images that could not be audited stay unseen."
    )
    controls = evidence["persons"]["tested"]["control"]
    if evidence["claim"] and controls:
        told.append(
            f"A true positive rate at a false positive rate under {percent(min(REVIEWABLE / controls, 1.0))}, which "
            f"{controls:,} controls cannot measure, or a bound of differential privacy."
        )
    return told


def terminal_lines(evidence: Evidence) -> list[tuple[str, str]]:
    """Name and text of the lines at the end of a run."""
    shown = grade(evidence)
    source = {"A": "random hold-out", "B": "conditional on comparability"}.get(shown.letter, "ranked list only")
    if not shown.claim:
        lines = [("evidence", f"grade {shown.letter}, no rates are claimed")]
        lines += [("", reason) for reason in shown.reasons]
    else:
        listed, persons = evidence["listed"], evidence["persons"]["tested"]["training"]
        lines = [("evidence", f"grade {shown.letter}, {source}")]
        lines.append(("listed", f"{listed:,} of {persons:,} persons at a false discovery rate of {evidence['q']:g}"))
        lines.append(("excess", _terminal_excess(evidence)))
    low, high = recall_range(evidence)
    found = "not measured: run `unveil plant CONFIG`"
    if low is not None:
        found = f"{percent(low)} to {percent(high)} of planted copies, in {len(evidence['recall'])} classes"
    return [*lines, ("recall", found)]


def _terminal_excess(evidence: Evidence) -> str:
    if not evidence["excess"]:
        return NOT_ESTIMABLE
    test = evidence["excess"][0]
    p = f"{test['p']:.2g}" if known(test["p"]) else NOT_ESTIMABLE
    limits = spread(test["delta_low"], test["delta_high"])
    return f"{percent(test['delta'])} of members over controls{f' ({limits})' if limits else ''}, exact p {p}"


def ratio_text(test: Mapping[str, Any]) -> str:
    """The ratio of members' to controls' rate with its interval."""
    if not known(test["ratio"]):
        return NOT_ESTIMABLE
    high = estimate(test["ratio_high"])
    return f"{estimate(test['ratio'])} ({estimate(test['ratio_low'])} to {high})"
