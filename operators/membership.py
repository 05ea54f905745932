"""How well closeness to the release tells members from controls: membership inference as it is usually reported.

Arrays hold one score per person: `member` of the training set, `control` of the control set; higher is closer to the
release. A person is the unit of all intervals, because images of one person are not independent.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.conformal import between, checked, positive
from operators.excess import control_rate, cut, rank_at

FEWEST = 10
"""Controls over a threshold below which its false positive rate is called not estimable."""
LARGE = 1_000_000
"""Persons in the smaller set from which the interval of the area is DeLong's. There the two differ by less than the
random error of 1,000 replicates (about 3 % of the interval's width), and a bootstrap takes much longer."""
BOX = 0.975
"""Level of either side of the box of `operating`, so that both hold together at 95 % (Bonferroni)."""


class Area(NamedTuple):
    """Area under the ROC curve with its interval."""

    value: float
    low: float
    high: float
    method: str
    """How the interval was made, in words for the report."""


class Operating(NamedTuple):
    """True positive rate at one false positive rate, with a box that holds both true rates at 95 %."""

    fpr: float
    """Nominal false positive rate."""
    k: int
    """Controls at or over the threshold: floor(fpr * controls), or fewer where scores are tied."""
    threshold: float
    tpr: float
    tpr_low: float
    tpr_high: float
    fpr_low: float
    fpr_high: float


def auc(member: NDArray[np.float64], control: NDArray[np.float64]) -> float:
    """Probability that a member scores above a control, equal scores counted half (Mann and Whitney 1947; Bamber 1975).

    Counted in whole numbers, so exact up to one rounding. Time O((M + C) log C).

    Raises
    ------
    ScoreError
        If either array is empty or not finite.
    """
    below_M, upto_M = _ranks(checked("member", member), np.sort(checked("control", control)))
    return int(below_M.sum() + upto_M.sum()) / (2 * len(member) * len(control))


def auc_interval(
    member: NDArray[np.float64],
    control: NDArray[np.float64],
    seed: int,
    replicates: int = 1000,
    level: float = 0.95,
) -> Area:
    """`auc` with its percentile interval from a bootstrap of persons, each set drawn by itself.

    A replicate draws M members and C controls with replacement (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, ch. 13). Scores are sorted once; a replicate needs the running sum of the controls' multiplicities only. From
    `LARGE` persons in the smaller set on, the interval is value +- z standard errors of DeLong, DeLong and
    Clarke-Pearson (Biometrics 44, 1988) instead, clipped to [0, 1]. If the sets do not overlap, both methods would
    claim certainty; then the limit is that of Clopper and Pearson for min(M, C) disjoint pairs, all of them in order.

    Raises
    ------
    ScoreError
        If either array is empty or not finite.
    ValueError
        If `replicates` is below 1, or `level` is not between 0 and 1.
    """
    positive("replicates", replicates)
    between("level", level)
    below_M, upto_M = _ranks(checked("member", member), np.sort(checked("control", control)))
    pairs, persons, tail = len(member) * len(control), min(len(member), len(control)), (1 - level) / 2
    value = int(below_M.sum() + upto_M.sum()) / (2 * pairs)
    if value in (0.0, 1.0):
        certain = tail ** (1 / persons)
        low, high = (certain, 1.0) if value else (0.0, 1 - certain)
        return Area(value, low, high, f"Clopper-Pearson on {persons:,} disjoint pairs, as the sets do not overlap")
    if persons >= LARGE:
        reach = _quantile(1 - tail) * _delong(below_M, upto_M, len(control))
        return Area(value, max(value - reach, 0.0), min(value + reach, 1.0), "DeLong, as both sets are large")
    areas_B = _bootstrap(below_M, upto_M, len(control), replicates, np.random.default_rng(seed))
    low, high = np.quantile(areas_B, [tail, 1 - tail])
    return Area(value, float(low), float(high), f"bootstrap of persons, {replicates:,} replicates")


def operating(member: NDArray[np.float64], control: NDArray[np.float64], fpr: float) -> Operating | None:
    """Share of members at or over the k-th highest control, k = floor(fpr C); None (not estimable) if k < 10.

    The share of members has its Clopper-Pearson (1934) interval. The threshold was estimated, so its true false
    positive rate is not the nominal one: it is Beta(k, C - k + 1), the law of the k-th order statistic. Both sides are
    at 97.5 %, together 95 %. An interval at the nominal rate alone would be too narrow. Where the k-th control shares
    its score, the group falls below the threshold (see `operators.excess.cut`), and None follows if fewer than 10 stay.

    Raises
    ------
    ScoreError
        If either array is empty or not finite.
    ValueError
        If `fpr` is not between 0 and 1.
    """
    from scipy.stats import beta

    member, control = checked("member", member), checked("control", control)
    rank = rank_at(len(control), fpr)
    if rank < FEWEST:
        return None
    at = cut(member, control, rank)
    if at.control_hits < FEWEST:
        return None
    hits, missed = at.member_hits, len(member) - at.member_hits
    low = float(beta.ppf((1 - BOX) / 2, hits, missed + 1)) if hits else 0.0
    high = float(beta.ppf((1 + BOX) / 2, hits + 1, missed)) if missed else 1.0
    false = control_rate(at, len(control), BOX)
    return Operating(fpr, at.control_hits, at.threshold, hits / len(member), low, high, false.low, false.high)


def roc(
    member: NDArray[np.float64], control: NDArray[np.float64], points: int = 512
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true positive rates along the ROC curve, ascending from (0, 0) to (1, 1); two arrays, at most `points`.

    Each point but the first is the bar at a score that occurs, so it can be reached; equal scores make one slanted
    step (Fawcett, Pattern Recognition Letters 27, 2006). The area under all points is `auc`. Where there are more,
    the foot and the head of the steps at control counts in geometric progression are kept, for logarithmic axes.

    Raises
    ------
    ScoreError
        If either array is empty or not finite.
    ValueError
        If `points` is below 4.
    """
    member, control = checked("member", member), checked("control", control)
    if points < 4:
        raise ValueError(f"points must be at least 4, got {points!r}")
    scores_N = np.concatenate([member, control])
    order_N = np.argsort(scores_N)[::-1]
    scores_N, of_member_N = scores_N[order_N], order_N < len(member)
    last_N = np.append(scores_N[1:] != scores_N[:-1], True)
    found_P = np.insert(np.cumsum(of_member_N)[last_N], 0, 0)
    false_P = np.insert(np.cumsum(~of_member_N)[last_N], 0, 0)
    if len(found_P) > points:
        wanted = np.concatenate([[0], np.geomspace(1, len(control), (points - 4) // 2)])
        feet, heads = np.searchsorted(false_P, wanted, "left"), np.searchsorted(false_P, wanted, "right") - 1
        kept = np.unique(np.concatenate([[0, len(false_P) - 1], feet, heads]))
        found_P, false_P = found_P[kept], false_P[kept]
    return false_P / len(control), found_P / len(member)


def _ranks(member_M: NDArray[np.float64], sorted_C: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each member in ascending order, how many controls score below it, and how many at or below it."""
    ordered_M = np.sort(member_M)
    return np.searchsorted(sorted_C, ordered_M, "left"), np.searchsorted(sorted_C, ordered_M, "right")


def _bootstrap(
    below_M: NDArray[np.int64], upto_M: NDArray[np.int64], controls: int, replicates: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Areas of `replicates` resampled pairs of sets; memory for one replicate."""
    members = len(below_M)
    areas_B = np.empty(replicates)
    running_C = np.zeros(controls + 1, np.int64)
    for replicate in range(replicates):
        drawn_C = np.bincount(rng.integers(0, controls, controls), minlength=controls)
        np.cumsum(drawn_C, out=running_C[1:])
        drawn_M = np.bincount(rng.integers(0, members, members), minlength=members)
        twice = int(drawn_M @ (running_C[below_M] + running_C[upto_M]))
        areas_B[replicate] = twice / (2 * members * controls)
    return areas_B


def _delong(below_M: NDArray[np.int64], upto_M: NDArray[np.int64], controls: int) -> float:
    """Standard error of the area from the placements of either set in the other."""
    members = len(below_M)
    placed_M = (below_M + upto_M) / (2 * controls)
    ranks_C = np.arange(controls)
    # Control c, in ascending order, is at or below a member if the member's counts exceed c.
    at_or_over = members - np.searchsorted(upto_M, ranks_C, "right")
    over = members - np.searchsorted(below_M, ranks_C, "right")
    placed_C = (at_or_over + over) / (2 * members)
    return float(np.sqrt(placed_M.var(ddof=1) / members + placed_C.var(ddof=1) / controls))


def _quantile(share: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(share))
