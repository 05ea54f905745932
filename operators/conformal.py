"""Evidence for single persons: rank among the controls, and lists whose share of false entries is held in check.

Arrays hold one score per person: `member_M` of the training set, `control_C` of the control set; higher is closer to
the release. All that is asked of a score is that it be computed alike for both sets. If the controls are exchangeable
with those members that did not leak (docs/method.md, Control), the p-values are valid whatever the score is, and the
Benjamini-Hochberg list has at most a share `q` of false entries on average (Bates, Candès, Lei, Romano and Sesia,
"Testing for outliers with conformal p-values", Annals of Statistics 51, 2023).
"""

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from operators.errors import ScoreError

ROUNDING = 8 * np.finfo(np.float64).eps
"""Relative slack where a p-value meets its bar exactly, as sums of fractions such as 0.05 often do."""


def checked(name: str, scores_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """`scores_N` as float64, shape (N,).

    Raises
    ------
    ScoreError
        If there is no score, or one is NaN or infinite.
    """
    array_N = np.asarray(scores_N, np.float64)
    if array_N.ndim != 1 or not len(array_N):
        raise ScoreError(
            f"{name} must be a row of scores, one per person; got shape {array_N.shape}. "
            f"Check that this set has images with status ok."
        )
    bad = len(array_N) - int(np.isfinite(array_N).sum())
    if bad:
        raise ScoreError(
            f"{name} must be finite; {bad:,} of {len(array_N):,} scores are NaN or infinite. "
            f"Leave out, and count, the persons who have no embedded image."
        )
    return array_N


def at_least(scores_N: NDArray[np.float64], bars_B: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many of `scores_N` are at or over each of `bars_B`; shape (B,)."""
    return len(scores_N) - np.searchsorted(np.sort(scores_N), bars_B, side="left").astype(np.int64)


def p_values(member_M: NDArray[np.float64], control_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """Conformal p-value of each member, (1 + controls at or over its score) / (1 + controls); shape (M,).

    Equal scores count against the member, so ties make the p-values larger, never too small. None is below
    1 / (1 + C). Valid for each person, and positively dependent in the way that Benjamini-Hochberg allows (PRDS; Bates
    et al. 2023). Time O((M + C) log C).

    Raises
    ------
    ScoreError
        If either array is empty or not finite.
    """
    member_M, control_C = checked("member_M", member_M), checked("control_C", control_C)
    return (1 + at_least(control_C, member_M)) / (1 + len(control_C))


def benjamini_hochberg(p_M: NDArray[np.float64], q: float) -> NDArray[np.bool_]:
    """Which hypotheses Benjamini and Hochberg reject at false discovery rate `q`; shape (M,).

    The i-th smallest of M p-values is compared with q i / M, and all up to the last one that passes are rejected
    (J. R. Statist. Soc. B 57, 1995). With conformal p-values of controls and members that are exchangeable, the
    expected share of false rejections is at most q times the share of true nulls (Bates et al. 2023).

    Raises
    ------
    ScoreError
        If there is no p-value, or one is not finite.
    ValueError
        If `q` is not between 0 and 1, or a p-value is outside [0, 1].
    """
    p_M = checked("p_M", p_M)
    between("q", q)
    if p_M.min() < 0 or p_M.max() > 1:
        raise ValueError(f"p_M must lie in [0, 1], got values from {p_M.min():g} to {p_M.max():g}")
    ordered_M = np.sort(p_M)
    bars_M = q * np.arange(1, len(p_M) + 1) / len(p_M)
    passing = np.flatnonzero(ordered_M <= bars_M * (1 + ROUNDING))
    return p_M <= (ordered_M[passing[-1]] if len(passing) else -1.0)


def q_values(member_M: NDArray[np.float64], control_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smallest false discovery rate at which each member enters the list; shape (M,), in [0, 1].

    For a member with score s it is the minimum over bars t <= s of

        M / (C + 1) * (1 + controls at or over t) / (members at or over t),

    which is the Benjamini-Hochberg adjusted conformal p-value (Benjamini and Hochberg 1995; Bates et al. 2023). The
    minimum is reached at members' scores, because between two of them only the count of controls changes. A member
    with a higher score never has a larger value. Each quotient is of whole numbers and rounded once, so that
    `q_values(...) <= 0.05` means what it says at exact equality too. Time O((M + C) log (M + C)).

    Raises
    ------
    ScoreError
        If either array is empty or not finite.
    """
    member_M, control_C = checked("member_M", member_M), checked("control_C", control_C)
    bars_B, inverse_M, counts_B = np.unique(member_M, return_inverse=True, return_counts=True)
    members_B = np.cumsum(counts_B[::-1])[::-1]
    controls_B = at_least(control_C, bars_B)
    share_B = len(member_M) * (1 + controls_B) / ((len(control_C) + 1) * members_B)
    return np.minimum(np.minimum.accumulate(share_B), 1.0)[inverse_M]


def shortest_list(members: int, controls: int, q: float) -> int:
    """The least number of persons that a list at false discovery rate `q` can have with so many controls.

    No p-value is below 1 / (controls + 1), so k members can pass only if members <= q k (controls + 1) (Bates et al.
    2023; the same order as the optimal boundary of Mary and Roquain, Electronic J. Statist. 16, 2022).
    Greater than `members` where no list is possible at all: then q (controls + 1) < 1.

    Raises
    ------
    ValueError
        If a count is below 1, or `q` is not between 0 and 1.
    """
    positive("members", members)
    positive("controls", controls)
    return -int(-Fraction(members) // (_fraction("q", q) * (controls + 1)))


def controls_needed(members: int, discoveries: int, q: float) -> int:
    """The least number of controls with which a list of `discoveries` persons is possible at rate `q`.

    The inverse of `shortest_list`: members / (q discoveries) - 1, rounded up.

    Raises
    ------
    ValueError
        If a count is below 1, or `q` is not between 0 and 1.
    """
    positive("members", members)
    positive("discoveries", discoveries)
    return max(-int(-Fraction(members) // (_fraction("q", q) * discoveries)) - 1, 1)


def _fraction(name: str, value: float) -> Fraction:
    """`value`, between 0 and 1, as the fraction that it stands for: 0.05 is 1/20, which no float is exactly."""
    between(name, value)
    return Fraction(value).limit_denominator(10**12) or Fraction(value)


def between(name: str, value: float) -> None:
    """Raise ValueError unless 0 < `value` < 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")


def positive(name: str, value: int) -> None:
    """Raise ValueError unless `value` is a count of at least 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
