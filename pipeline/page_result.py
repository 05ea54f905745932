"""What the first screen says: the result in plain sentences, and warnings that follow from how the audit was set up.

The sentences follow the method's rules of wording: a count is given with the count that chance would give, and no
result is called privacy.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.page_evidence import claims, looks_sentence
from pipeline.wording import cosine, count, number, passed_over

SIZE_RATIO = 1.5
"""Ratio of comparisons from which arms of different size are called so."""


def result(summary: Mapping[str, Any]) -> list[str]:
    """The result in a few plain sentences: what was found, what chance would give, and what the control set gives."""
    training, control = summary["arms"]["training"], summary["arms"].get("control")
    if not training["comparisons"]:
        return ["Nothing was compared, so nothing is known: no image of one of the sets could be audited."]
    told, evidence = [_found(summary), _chance(training)], summary.get("evidence")
    if evidence is not None:
        told = claims(evidence) if evidence["claim"] else [*claims(evidence), *told]
    elif control:
        told.append(
            f"Against the control set, whom the generator never saw, the same threshold gives "
            f"{count(control['candidates'], 'candidate pair')} in {control['comparisons']:,} comparisons"
            f"{_times(ratio(training, control))}."
        )
    else:
        told.append("There is no control set, so nothing shows what people whom the generator never saw would give.")
    limit = summary["limit"]
    if limit is not None:
        over = summary["findings"] > limit
        told.append(
            f"The configured limit is {count(limit, 'finding')}: this result is {'over' if over else 'within'} it."
        )
    return told


def _found(summary: Mapping[str, Any]) -> str:
    training, threshold = summary["arms"]["training"], summary["calibration"]["threshold"]
    people = summary["sets"]["training"]["identities"]
    if not training["candidates"]:
        return (
            f"No pair of a release and a training image reaches the threshold of cosine {cosine(threshold)}; the "
            f"highest is {cosine(training['highest'])}. This does not show that the release is free of training faces."
        )
    whom = f"{people:,} training people" if people else f"{summary['sets']['training']['audited']:,} training images"
    verb = "has" if training["persons"] == 1 else "have"
    return f"{training['persons']:,} of {whom} {verb} at least one candidate pair in the release."


def _chance(training: Mapping[str, Any]) -> str:
    low, high = training["expected_false_low"], training["expected_false_high"]
    chance = (
        f"false matches alone would give about {number(training['expected_false'])} ({number(low)} to {number(high)}) "
        f"at this number of comparisons"
    )
    if not training["candidates"]:
        return f"If the release were like other real people, {chance}."
    verb = "is" if training["candidates"] == 1 else "are"
    told = f"There {verb} {count(training['candidates'], 'candidate pair')}; {chance}"
    return f"{told}." if training["candidates"] > high else f"{told}, so the count by itself is no sign of leakage."


def cautions(summary: Mapping[str, Any]) -> list[str]:
    """Warnings that follow from how this audit was set up."""
    arms, found = summary["arms"], list(summary.get("warnings", []))
    if not summary["calibration"]["labels"]:
        found.append(
            "The training set has no complete person labels. Pairs of one person then count as non-mated during "
            "calibration, which pushes the threshold up: real leaks can stay below it."
        )
    control = arms.get("control")
    evidence = summary.get("evidence")
    comparable = evidence is None or evidence["claim"]
    if comparable and control and control["comparisons"] and arms["training"]["comparisons"]:
        sizes = sorted((arms["training"]["comparisons"], control["comparisons"]))
        if sizes[1] > SIZE_RATIO * sizes[0]:
            found.append(
                "Training and control differ in size. A larger set gives higher best matches by chance alone: compare "
                "the numbers per comparison, not the curves."
            )
    lost = sum(sum(one["rejected"].values()) for one in summary["sets"].values())
    if lost:
        found.append(f"{count(lost, 'image')} could not be audited. Whom they show is unknown; see Coverage.")
    found += passed_over(summary["sets"])
    if noted := [role for role, one in summary["sets"].items() if one.get("notes")]:
        found.append(f"There are notes on {' and '.join(noted)}; see Coverage.")
    if evidence is not None and (looked := looks_sentence(evidence)):
        found.append(looked)
    return found


def ratio(training: Mapping[str, Any], control: Mapping[str, Any]) -> float | None:
    """Candidates per comparison of training over those of control; None where control has none."""
    if not control["candidates"] or not training["comparisons"]:
        return None
    return float(training["candidates"] / training["comparisons"] / (control["candidates"] / control["comparisons"]))


def _times(per_comparison: float | None) -> str:
    if per_comparison is None:
        return ""
    return f"; per comparison, training gives {number(per_comparison)} times as many as control"
