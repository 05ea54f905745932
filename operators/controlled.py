"""The controlled audit: from each real image's best matches to evidence for persons (docs/method.md).

The steps are those of the protocol in its order: units, matching, statistic, gate and placebo, evidence per person,
global test, membership metrics. Everything before the p-values is computed alike for both arms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from operators import comparability, conformal, excess, membership
from operators.comparability import Comparison, Evidence, GateConfig, Placebo, Source
from operators.excess import Excess
from operators.membership import Area, Operating
from operators.persons import CONTROL, MEMBER, Duplicates, Persons, PersonsConfig, Vectors, persons
from operators.statistic import Best, anchored, cap_images, combined, match_groups, unit_best, unit_hashes

SOURCES = ("hold_out", "other")
COMBINATIONS = ("min", "sum", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvidenceConfig:
    """From best matches to evidence for persons; used where there is a control set."""

    q: float = 0.05
    """False discovery rate of the list of persons."""
    alphas: list[float] = field(default_factory=lambda: [0.01, 0.001, 0.0001])
    """Shares of the controls over the threshold of the excess test, the first being the one that is reported first."""
    source: str = "other"
    """Where the controls come from: `hold_out`, a random hold-out of identities drawn before the generator was trained,
    or `other`."""
    neutral: bool = False
    """Whether the face model was trained on both of training and control set or on neither. Look at the model's and the
    sets' catalogue entries before you say so: a model that knows one of them favours it."""
    cap: int = 5
    """Images per person that count, chosen at random in both arms, if the arms differ in how many persons have."""
    group: str | None = None
    """Attribute that names each image's group; both arms are then matched by it, and all rates given for each."""
    near_duplicates: bool = True
    """Whether persons with several labels are looked for by comparing training and control set with themselves."""
    combine: str = "min"
    """How the statistics of several face models become one: `min` or `sum` of standardised values, which needs models
    of similar strength; `none`: the first decides, and a second confirms what is found (the tier of a finding)."""
    seed: int = 0
    persons: PersonsConfig = field(default_factory=PersonsConfig)
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        if not 0 < self.q < 1:
            raise ValueError(f"q must be between 0 and 1. Got {self.q}.")
        if not self.alphas or not all(0 < alpha < 1 for alpha in self.alphas):
            raise ValueError(f"alphas must be shares between 0 and 1. Got {self.alphas}.")
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}. Got {self.source!r}.")
        if self.combine not in COMBINATIONS:
            raise ValueError(f"combine must be one of {', '.join(COMBINATIONS)}. Got {self.combine!r}.")
        if self.cap < 1:
            raise ValueError(f"cap must be 1 or more. Got {self.cap}.")


class Matches(NamedTuple):
    """What one face model says of every image of both arms, training first; NaN for images that were not audited."""

    release_N: NDArray[np.float64]
    """Best cosine of each image with the release."""
    anchor_N: NDArray[np.float64] | None
    placebo_N: NDArray[np.float64] | None


class Images(NamedTuple):
    """Every image of both arms, training first."""

    label_N: NDArray[np.int64]
    """`operators.persons.label_codes`; the same number in both arms is not the same label."""
    arm_N: NDArray[np.int8]
    hash_N: NDArray[np.uint64]
    """`operators.statistic.image_hashes`."""
    group_N: NDArray[np.int64] | None
    """Number of each image's group, -1 for unknown; None if no groups are declared."""
    matches: Sequence[Matches]
    """Of each face model, the first being that whose pairs are shown."""


class People(NamedTuple):
    """The units with their statistic."""

    persons: Persons
    counted_N: NDArray[np.bool_]
    """Images that count."""
    capped: bool
    best: Best
    """Best match in the release under the first face model."""
    anchor_U: NDArray[np.float64] | None
    statistic_U: NDArray[np.float64]
    """NaN for units without an audited image."""
    per_model_U: Sequence[NDArray[np.float64]]
    placebo_U: NDArray[np.float64] | None
    group_U: NDArray[np.int64] | None
    eligible_U: NDArray[np.bool_]
    """Units that take part: they have a statistic, and matching kept them."""
    images: Comparison | None
    """Images per person that count, compared between the arms."""

    def scores(self, arm: int, of: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """The statistic (or `of`) of the eligible units of one arm."""
        chosen = self.eligible_U & (self.persons.arm_U == arm)
        return np.asarray((self.statistic_U if of is None else of)[chosen])


class Controlled(NamedTuple):
    """All that the controlled audit found."""

    people: People
    p_U: NDArray[np.float64]
    """Conformal p-value of each eligible member; NaN elsewhere."""
    q_U: NDArray[np.float64]
    verdict: Evidence
    gate: Comparison | None
    placebo: Placebo | None
    excesses: Sequence[Excess]
    area: Area | None
    operating: Sequence[Operating]
    """Where enough controls are over the threshold; the other rates are not estimable."""
    shortest: int
    """The shortest list that these controls can support."""
    detectable: Sequence[tuple[float, float]]
    """For each alpha, the least share of leaked members that its excess test would have found."""


def people(images: Images, pairs: Duplicates, config: EvidenceConfig, vectors: Vectors | None = None) -> People:
    """Units, matched between the arms, with their statistic.

    Parameters
    ----------
    images
        Both arms.
    pairs
        Pairs of their rows with a high cosine (`operators.persons.persons`).
    config
        Options.
    vectors
        Stored vectors, asked for only where a component spans too many labels.

    Raises
    ------
    ValueError
        If an arm has no audited image, or a component must be cut and `vectors` is None.
    """
    found = persons(images.label_N, images.arm_N, pairs, config.persons, vectors)
    units = len(found.arm_U)
    counted_N = (found.unit_N >= 0) & ~np.isnan(images.matches[0].release_N)
    compared = _images_per_person(found, counted_N, config)
    capped = compared is not None and not compared.passed
    if capped:
        counted_N &= cap_images(np.where(counted_N, found.unit_N, -1), images.hash_N, config.cap)
        compared = _images_per_person(found, counted_N, config)
    unit_N = np.where(counted_N, found.unit_N, -1)
    best = unit_best(unit_N, images.matches[0].release_N, units)
    each = [_statistic(unit_N, one.release_N, one.anchor_N, units) for one in images.matches]
    alone = len(each) == 1 or config.combine == "none"
    statistic_U = each[0] if alone else combined(each, cast("Literal['min', 'sum']", config.combine))
    first = images.matches[0]
    anchor_U = None if first.anchor_N is None else unit_best(unit_N, first.anchor_N, units).cosine_U
    placebo_U = None if first.placebo_N is None else _statistic(unit_N, first.placebo_N, first.anchor_N, units)
    eligible_U = ~np.isnan(statistic_U)
    group_U = None
    if images.group_N is not None:
        lowest = np.full(units, len(unit_N), np.int64)
        np.minimum.at(lowest, unit_N[counted_N], np.flatnonzero(counted_N))
        group_U = np.where(lowest < len(unit_N), images.group_N[np.minimum(lowest, len(unit_N) - 1)], -1)
        eligible_U &= match_groups(group_U, found.arm_U, unit_hashes(unit_N, images.hash_N, units))
    return People(found, counted_N, capped, best, anchor_U, statistic_U, each, placebo_U, group_U, eligible_U, compared)


def controlled(found: People, config: EvidenceConfig) -> Controlled:
    """The gate, the placebo, the evidence for each person and the tests over all.

    Raises
    ------
    ScoreError
        If no person of one arm takes part.
    """
    member_M, control_C = found.scores(MEMBER), found.scores(CONTROL)
    gated = comparability.gate(member_M, control_C, config.gate)
    tried = _placebo(found, config)
    verdict = comparability.evidence(
        cast("Source", config.source),
        gated,
        tried,
        found.images,
        neutral=config.neutral,
        groups_matched=None if config.group is None else True,
    )
    p_U, q_U = np.full((2, len(found.eligible_U)), np.nan)
    members = found.eligible_U & (found.persons.arm_U == MEMBER)
    p_U[members], q_U[members] = conformal.p_values(member_M, control_C), conformal.q_values(member_M, control_C)
    tests = [excess.excess(member_M, control_C, alpha) for alpha in config.alphas]
    points = [membership.operating(member_M, control_C, alpha) for alpha in config.alphas]
    sizes = len(member_M), len(control_C)
    return Controlled(
        people=found,
        p_U=p_U,
        q_U=q_U,
        verdict=verdict,
        gate=gated,
        placebo=tried,
        excesses=[one for one in tests if one is not None],
        area=membership.auc_interval(member_M, control_C, config.seed),
        operating=[one for one in points if one is not None],
        shortest=conformal.shortest_list(*sizes, config.q),
        detectable=[(alpha, excess.minimum_detectable(*sizes, alpha)) for alpha in config.alphas],
    )


class Look(NamedTuple):
    """The same audit with one option changed: how much the result hangs on it."""

    what: str
    listed: int
    p: float | None
    """Of the first excess test."""


def sensitivity(
    images: Images, pairs: Duplicates, config: EvidenceConfig, vectors: Vectors | None = None
) -> list[Look]:
    """The audit without the anchor set, and with other cosines for one person under two labels."""
    looks = []
    if images.matches[0].anchor_N is not None:
        raw = images._replace(matches=[one._replace(anchor_N=None) for one in images.matches])
        looks.append(_look("without the anchor set", people(raw, pairs, config, vectors), config))
    for change in (-SENSITIVITY, SENSITIVITY) if config.near_duplicates else ():
        tau = round(config.persons.tau_dup + change, 4)
        if tau < 1:
            moved = replace(config, persons=replace(config.persons, tau_dup=tau))
            looks.append(_look(f"one person from cosine {tau:.2f}", people(images, pairs, moved, vectors), config))
    return looks


SENSITIVITY = 0.05
"""How far the cosine of one person under two labels is moved to see whether results hang on it."""


def _look(what: str, found: People, config: EvidenceConfig) -> Look:
    member_M, control_C = found.scores(MEMBER), found.scores(CONTROL)
    test = excess.excess(member_M, control_C, config.alphas[0])
    listed = int((conformal.q_values(member_M, control_C) <= config.q).sum())
    return Look(what, listed, None if test is None else test.p)


def _images_per_person(found: Persons, counted_N: NDArray[np.bool_], config: EvidenceConfig) -> Comparison | None:
    """Whether persons of both arms have the same number of images that count; None if an arm has no such person."""
    images_U = np.bincount(found.unit_N[counted_N], minlength=len(found.arm_U)).astype(np.float64)
    member_M, control_C = (images_U[(found.arm_U == arm) & (images_U > 0)] for arm in (MEMBER, CONTROL))
    if not len(member_M) or not len(control_C):
        return None
    return comparability.gate(member_M, control_C, config.gate, images=True)


def _statistic(
    unit_N: NDArray[np.int64], near_N: NDArray[np.float64], anchor_N: NDArray[np.float64] | None, units: int
) -> NDArray[np.float64]:
    anchor_U = None if anchor_N is None else unit_best(unit_N, anchor_N, units).cosine_U
    return anchored(unit_best(unit_N, near_N, units).cosine_U, anchor_U)


def _placebo(found: People, config: EvidenceConfig) -> Placebo | None:
    if found.placebo_U is None:
        return None
    scores = found.scores(MEMBER, found.placebo_U), found.scores(CONTROL, found.placebo_U)
    return comparability.placebo(*scores, config.q, config.alphas[0], config.gate)
