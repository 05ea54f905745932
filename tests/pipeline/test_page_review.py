"""What the report says of a review, from results that `operators.reviewing` makes of hand-made labels."""

import re
from typing import Any

import pytest
from scipy.stats import fisher_exact

from operators import reviewing
from operators.reviewing import Judged, Label
from operators.tables import FINDINGS
from pipeline.page_review import claims, facts, labels, outcomes, section


def review(confirmed: int, false: int, pairs: int = 50, undecided: int = 0, **changes: Any) -> dict[str, Any]:
    """A review of so many pairs of each arm; the first ones of each arm are confirmed, the last ones undecided."""
    given: dict[str, Any] = {"tested": {"training": 200, "control": 200}, "reviewers": 2, "adjudicated": 3} | changes
    judged = [
        Judged(
            arm == 0,
            1 - n / 100,
            None if n >= pairs - undecided else Label.SAME_PERSON if n < sure else Label.DIFFERENT,
        )
        for arm, sure in enumerate((confirmed, false))
        for n in range(pairs)
    ]
    made = reviewing.outcome(judged, given["tested"]["training"], given["tested"]["control"])
    plain = {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in made._asdict().items()}
    plain["bar"] = plain["bar"] | {"delta": made.bar.delta._asdict()}
    counts = {str(label): 0 for label in Label} | {"undecided": undecided}
    said = {arm: counts | {"same_person": n} for arm, n in (("training", confirmed), ("control", false))}
    kappa = {"pairs": 100, "observed": 0.9, "kappa": {"value": 0.8, "low": -0.1, "high": 0.9}}
    return {"complete": not undecided, "pairs": pairs, "labels": said, "outcome": plain, "agreement": kappa} | given


def test_a_clear_excess_is_told_as_the_rules_allow() -> None:
    told = claims(review(30, 5))
    assert told[0].startswith(
        "Reviewers, who did not know which pairs were decoys, confirmed 30 of 50 training pairs and 5"
    )
    p = fisher_exact([[30, 170], [5, 195]], alternative="greater").pvalue
    assert "At least 25 of 50 reviewed pairs show the same person beyond the reviewers’ false-alarm rate" in told[1]
    mantissa, exponent = f"{p:.1e}".split("e-")
    assert f"exact p = {mantissa} × 10" in told[1] and int(exponent) > 3
    assert told[2] == "Every pair was settled before anybody saw which were decoys."
    rows = {one.label: one for one in facts(review(30, 5))}
    assert rows["Reviewers’ false-alarm rate"].value.startswith("10 % (3.33 % to 21.8 %)")  # Clopper-Pearson
    assert rows["Excess confirmed"].value == "25" and rows["Excess confirmed"].detail.startswith("50 % (")
    assert rows["Cohen’s kappa"].value == "0.80 (−0.10 to 0.90)" and "90 % of 100 pairs" in rows["Cohen’s kappa"].hint


@pytest.mark.parametrize(("confirmed", "false"), [(6, 5), (5, 5), (3, 9)])
def test_what_errors_explain_is_not_called_an_excess_nor_the_absence_of_one(confirmed: int, false: int) -> None:
    told = " ".join(claims(review(confirmed, false)))
    assert "errors alone could explain this" in told and "does not show that there is nothing to find" in told
    assert "At least" not in told and not re.search(r"private|safe|leaked|no leak", told)


def test_an_early_end_unequal_sets_and_a_single_reviewer_are_said() -> None:
    early = review(30, 5, undecided=4)
    assert "ended early: 8 of 100 pairs are not settled" in claims(early)[-1]
    unequal = review(30, 5, tested={"training": 150, "control": 200}, agreement=None, reviewers=1)
    assert "At least" not in claims(unequal)[1] and "reviewers’ errors" in claims(unequal)[1]
    rows = {one.label: one for one in facts(unequal)}
    assert "not valid here" in rows["Exact p of the pairs shown"].value
    assert "1 reviewer: no pair has two labels" in rows["Cohen’s kappa"].hint
    assert labels(early).rows[1] == ["same person", "30", "5"] and section(None) is None


def test_labels_reach_the_findings_by_the_person() -> None:
    findings = FINDINGS.from_rows([{"rank": n, "training_key": key} for n, key in enumerate("abcd", 1)])
    shown = [("training", 7, "near_copy"), ("training", 8, None), ("control", 9, "same_person"), ("training", 5, "odd")]
    persons = [{"arm": arm, "unit": unit, "label": label} for arm, unit, label in shown]
    units = {"a": 7, "a2": 7, "b": 8, "c": 9}
    assert outcomes(findings, {"persons": persons}, units) == {1: "near copy"}
