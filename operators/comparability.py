"""Whether training set and control set may be compared at all, and which claims follow.

A controlled claim rests on exchangeability: a person whom the generator never saw must have the same distribution of
the statistic whether listed in the training set or in the control set. It cannot be proven, only refuted: by the bodies
of the two distributions, where leaks are rare (the gate), and by the same test against faces that cannot have leaked
(the placebo).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators import conformal
from operators.excess import excess

MANY = 20_000
"""Controls from which the gate judges by distance: a p-value would reject differences that do not matter."""
EXACT = 2_000
"""Persons per arm up to which the Kolmogorov-Smirnov p-value is computed exactly."""

Source = Literal["hold_out", "other", "none"]
Grade = Literal["A", "B", "C"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """When the two arms are refused as not comparable."""

    body: float = 0.80
    """Pooled quantile of the statistic under which the two arms must agree; leaks sit above it."""
    p: float = 0.01
    """The gate and the placebo fail below this p-value."""
    distance: float = 0.03
    """With more than 20,000 controls the gate fails above this Kolmogorov-Smirnov distance instead."""

    def __post_init__(self) -> None:
        for name in ("body", "p", "distance"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1. Got {value}.")


class Comparison(NamedTuple):
    """Two samples compared by the Kolmogorov-Smirnov test."""

    distance: float
    """Largest difference of the two distribution functions."""
    p: float
    members: int
    controls: int
    passed: bool
    warned: bool
    """Passed by distance although the p-value is below the limit."""
    rule: Literal["p", "distance"]


class Placebo(NamedTuple):
    """The audit of a set that cannot have leaked from the training set."""

    discoveries: int
    p: float | None
    """P-value of the excess test; None where it is not defined for so few controls."""
    passed: bool


class Evidence(NamedTuple):
    """What the audit may claim, and why."""

    grade: Grade
    claim: bool
    """Whether error rates may be stated at all."""
    reasons: list[str]


def gate(
    member_M: NDArray[np.float64], control_C: NDArray[np.float64], config: GateConfig, images: bool = False
) -> Comparison:
    """Compare the bodies of the statistic in the two arms; NaN (persons without an audited image) is left out.

    The body is what lies under the pooled `body` quantile. The rule of distance for many controls was chosen, not
    simulated. With `images=True` the values are numbers of images per person, compared whole: they have no tail of
    leaks.

    Raises
    ------
    ValueError
        If an arm has no value in the body.
    """
    from scipy.stats import ks_2samp

    member, control = member_M[~np.isnan(member_M)], control_C[~np.isnan(control_C)]
    many = len(control) > MANY
    if not images:
        cut = np.quantile(np.concatenate([member, control]), config.body) if len(member) + len(control) else 0.0
        member, control = member[member < cut], control[control < cut]
    if not len(member) or not len(control):
        raise ValueError(f"member_M and control_C must have a body. Got {len(member)} and {len(control)} values.")
    method = "exact" if max(len(member), len(control)) <= EXACT else "asymp"
    found = ks_2samp(member, control, method=method)
    distance, p = float(found.statistic), float(found.pvalue)
    passed = distance <= config.distance if many else p >= config.p
    rule: Literal["p", "distance"] = "distance" if many else "p"
    return Comparison(distance, p, len(member), len(control), passed, passed and p < config.p, rule)


def placebo(
    member_M: NDArray[np.float64], control_C: NDArray[np.float64], q: float, alpha: float, config: GateConfig
) -> Placebo:
    """Run the audit's tests on statistics taken with a second anchor set in the place of the release.

    Any discovery at `q`, or an excess with a p-value below `config.p`, shows that the two arms differ by themselves.
    """
    member, control = member_M[~np.isnan(member_M)], control_C[~np.isnan(control_C)]
    listed = int(conformal.benjamini_hochberg(conformal.p_values(member, control), q).sum())
    found = excess(member, control, alpha)
    p = None if found is None else found.p
    return Placebo(listed, p, listed == 0 and (p is None or p >= config.p))


def evidence(
    source: Source,
    gated: Comparison | None,
    tried: Placebo | None,
    images: Comparison | None,
    *,
    neutral: bool,
    groups_matched: bool | None,
) -> Evidence:
    """The evidence grade, whether a controlled claim is allowed, and the reasons in plain sentences.

    Parameters
    ----------
    source
        Where the controls come from: a random hold-out of identities drawn before the generator was trained, another
        source, or nowhere.
    gated, tried
        `gate` of the statistic and `placebo`; None where not run.
    images
        `gate(..., images=True)` of the images per person that count; None where not compared.
    neutral
        Whether the face model was trained on both sets or on neither.
    groups_matched
        Whether groups of persons have the same proportions in both arms; None if no groups are known.
    """
    if source == "none" or gated is None:
        return Evidence("C", False, ["There is no control set: the list is for human review, without error rates."])
    faults = _placebo_faults(tried)
    if not neutral:
        faults.append(
            "The face model is not known to be trained on both or on neither of the training set and the control set."
        )
    if source == "hold_out":
        return _hold_out(gated, tried, faults)
    faults += [] if gated.passed else [_failed(gated) + " Choose controls of the same kind as the training set."]
    faults += _unmatched(images, groups_matched)
    if tried is None:
        faults.append(
            "No placebo was run. Give a second anchor set, or split the anchor set in two, so that the audit can be "
            "tried on faces that cannot have leaked."
        )
    if faults:
        return Evidence("C", False, faults)
    reasons = [
        "The controls come from another source; every statement is conditional on comparability.",
        _agree(gated),
        "The placebo found nothing.",
    ]
    if groups_matched is None:
        reasons.append("No groups of persons are known, so their proportions were not matched.")
    return Evidence("B", True, reasons)


def _hold_out(gated: Comparison, tried: Placebo | None, faults: list[str]) -> Evidence:
    """The verdict on a random hold-out: its comparability is by design, so a failed gate speaks of the leakage."""
    reasons = ["The controls are declared a random hold-out of identities, drawn before the generator was trained."]
    if gated.passed:
        reasons.append(_agree(gated))
    else:
        reasons.append(
            _failed(gated) + " With a random hold-out and a neutral face model that means leakage of many persons."
        )
    if tried is None:
        reasons.append("No placebo was run.")
    if faults and not gated.passed:
        faults = [*faults, _failed(gated)]
    return Evidence("A", not faults, faults or reasons)


def _placebo_faults(tried: Placebo | None) -> list[str]:
    if tried is None or tried.passed:
        return []
    p = "" if tried.p is None else f" and an excess with p = {tried.p:.2g}"
    return [f"The placebo, where nothing can have leaked, gave {tried.discoveries} discoveries{p}."]


def _unmatched(images: Comparison | None, groups_matched: bool | None) -> list[str]:
    faults = []
    if images is None or not images.passed:
        faults.append("Persons do not have the same number of images in both arms. Cap the images per person.")
    if groups_matched is False:
        faults.append("Groups of persons do not have the same proportions in both arms. Match them.")
    return faults


def _failed(gated: Comparison) -> str:
    return (
        f"The statistic's body differs between training set and control set (Kolmogorov-Smirnov distance "
        f"{gated.distance:.3f}, p = {gated.p:.2g}): either the controls are not comparable or many persons leaked."
    )


def _agree(gated: Comparison) -> str:
    warning = " (p is low; at this size only the distance counts)" if gated.warned else ""
    return (
        f"The statistic's body agrees in both arms (Kolmogorov-Smirnov distance {gated.distance:.3f}, "
        f"p = {gated.p:.2g}){warning}."
    )
