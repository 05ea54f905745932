"""What the report says of a review by people (docs/review.md): what was confirmed beyond reviewers' own errors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from operators.tables import FINDINGS
from pipeline.page_evidence import SIGNIFICANT
from pipeline.page_sections import Fact
from pipeline.page_sensitivity import Grid
from pipeline.spreadsheet import values
from pipeline.wording import NOT_ESTIMABLE, count, known, measured, p_value, percent

Review = Mapping[str, Any]

EQUAL = 1.1
"""Ratio of the arms' people up to which the p-value of the pairs shown can be read at all."""
WORDS = {
    "near_copy": "near copy", "same_person": "same person", "look_alike": "look-alike", "different": "different",
    "unusable": "unusable", "undecided": "not settled",
}  # fmt: skip


class Section(NamedTuple):
    """The review as it is shown."""

    claims: list[str]
    facts: list[Fact]
    labels: Grid


def section(review: Review | None) -> Section | None:
    """The result of a review; None without one."""
    if review is None:
        return None
    return Section(claims(review), facts(review), labels(review))


def claims(review: Review) -> list[str]:
    """The sentences that docs/review.md allows."""
    made = review["outcome"]
    told = [
        f"Reviewers, who did not know which pairs were decoys, confirmed {made['member_confirmed']:,} of "
        f"{count(made['members'], 'training pair')} and {made['control_confirmed']:,} of "
        f"{count(made['controls'], 'decoy')}, whose people the generator never saw."
    ]
    told.append(_beyond(review))
    if review["complete"]:
        told.append("Every pair was settled before anybody saw which were decoys.")
    else:
        told.append(
            f"The review was ended early: {made['undecided']:,} of {2 * review['pairs']:,} pairs are not settled and "
            f"not counted."
        )
    return told


def _beyond(review: Review) -> str:
    """What was confirmed beyond the reviewers' own errors."""
    made, p = review["outcome"], review["outcome"]["bar"]["p"]
    if not known(p) or p >= SIGNIFICANT or made["excess"] <= 0:
        return (
            f"Reviewers’ errors alone could explain this (exact p = {p_value(p)}); it does not show that there is "
            f"nothing to find."
        )
    if not _same_size(review):
        return f"More was confirmed in the training set than reviewers’ errors explain (exact p = {p_value(p)})."
    return (
        f"At least {made['excess']:,} of {made['members']:,} reviewed pairs show the same person beyond the reviewers’ "
        f"false-alarm rate (exact p = {p_value(p)}). Which of the confirmed pairs these are, it does not say."
    )


def _same_size(review: Review) -> bool:
    """Whether as many pairs of both arms were counted, of arms of about one size: else counts cannot be subtracted."""
    sizes, made = sorted(review["tested"].values()), review["outcome"]
    return bool(sizes[0] > 0 and sizes[-1] <= EQUAL * sizes[0] and made["members"] == made["controls"])


def facts(review: Review) -> list[Fact]:
    """Rates with their intervals."""
    made, tested, bar = review["outcome"], review["tested"], review["outcome"]["bar"]
    shown = p_value(made["p_shown"])
    if not _same_size(review):
        shown += " – not valid here"
    found = [
        Fact(
            "Exact p",
            p_value(bar["p"]),
            hint=f"all people over a common bar: {bar['member_confirmed']:,} confirmed of {tested['training']:,} "
            f"training people, {bar['control_confirmed']:,} of {tested['control']:,} control people",
        ),
        Fact("Exact p of the pairs shown", shown, hint="needs sets of about equal size"),
        Fact("Reviewers’ false-alarm rate", measured(made["false_alarm"]), hint="confirmed decoys, 95 % interval"),
        Fact(
            "Excess confirmed",
            f"{made['excess']:,}".replace("-", "−"),
            measured(made["share"]),
            "training pairs less decoys; as a share with 95 % interval. Reviewers also miss some, so it is too low",
        ),
    ]
    return [*found, *_agreement(review)]


def _agreement(review: Review) -> list[Fact]:
    both, reviewers = review["agreement"], review["reviewers"]
    amount = reviewers if isinstance(reviewers, int) else len(reviewers)
    if both is None:
        return [Fact("Cohen’s kappa", "none", hint=f"{count(amount, 'reviewer')}: no pair has two labels to compare")]
    kappa = both["kappa"]
    told = NOT_ESTIMABLE
    if kappa is not None and known(kappa["value"]):
        value, low, high = (f"{kappa[name]:.2f}".replace("-", "−") for name in ("value", "low", "high"))
        told = f"{value} ({low} to {high})"
    return [
        Fact(
            "Cohen’s kappa",
            told,
            hint=f"agreement of the reviewers beyond chance, 95 % interval; the same label for "
            f"{percent(both['observed'])} of {count(both['pairs'], 'pair')}, {review['adjudicated']:,} to adjudicate",
        )
    ]


def labels(review: Review) -> Grid:
    """What was said how often."""
    training, control = (review["labels"][arm] for arm in ("training", "control"))
    rows = [[WORDS.get(name, name), f"{training[name]:,}", f"{control.get(name, 0):,}"] for name in training]
    return Grid(("Label", "Training", "Control (decoys)"), rows)


def outcomes(findings: pa.Table, review: Review, unit_of: Mapping[str, int]) -> dict[int, str]:
    """By rank of a finding: the label that its person's pair got in the review, for people who were shown.

    Parameters
    ----------
    findings
        Rows of the FINDINGS contract.
    review
        `review.json`, with its `persons`.
    unit_of
        Unit of the controlled audit by training image, of which the review's pairs have the number.
    """
    said = {one["unit"]: one["label"] for one in review["persons"] if one["arm"] == "training" and one["label"]}
    own = zip(*(values(FINDINGS.check(findings)[name]) for name in ("rank", "training_key")), strict=True)
    found = {rank: said.get(unit_of[key]) for rank, key in own if key in unit_of}
    return {rank: WORDS.get(label, label) for rank, label in found.items() if label is not None}
