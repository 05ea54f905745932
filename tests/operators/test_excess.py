import math
from fractions import Fraction
from functools import cache
from itertools import combinations, combinations_with_replacement

import numpy as np
import pytest
from scipy.stats import binomtest

from operators import excess
from operators.calibration import Rate, proportion
from operators.errors import ScoreError
from operators.excess import Cut, Excess


def run(member: list[float], control: list[float], alpha: float) -> Excess:
    found = excess.excess(np.array(member, float), np.array(control, float), alpha)
    assert found is not None
    return found


@cache
def p(member: tuple[float, ...], control: tuple[float, ...], alpha: float) -> float:
    return run(list(member), list(control), alpha).p


def splits(values: list[float], members: int) -> list[tuple[list[float], list[float]]]:
    """All ways to call so many of the persons members: equally likely under the null."""
    places = range(len(values))
    return [
        ([values[i] for i in chosen], [values[i] for i in places if i not in chosen])
        for chosen in combinations(places, members)
    ]


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_without_ties_p_is_the_share_of_arrangements_with_as_many_members_over_the_threshold(alpha: float) -> None:
    found = [run(member, control, alpha) for member, control in splits([float(v) for v in range(9)], 5)]
    for one in found:
        assert one.control_hits == int(alpha * 4)
        assert one.p == pytest.approx(sum(o.member_hits >= one.member_hits for o in found) / len(found), rel=1e-12)


@pytest.mark.parametrize("members", [3, 5])
def test_with_ties_the_test_stays_valid(members: int) -> None:
    """All sets of 8 scores with 3 values and all their arrangements: p falls to x or below no oftener than x."""
    for values in combinations_with_replacement([0.0, 1.0, 2.0], 8):
        for alpha in (0.34, 0.6, 0.99):
            found = np.sort([p(tuple(m), tuple(c), alpha) for m, c in splits(list(values), members)])
            upto = np.arange(1, len(found) + 1) / len(found)
            last = np.append(found[1:] > found[:-1] + 1e-12, True)
            assert (upto[last] <= found[last] + 1e-12).all()


def test_with_many_ties_large_samples_do_not_alarm() -> None:
    rng = np.random.default_rng(0)
    alarms = [run(rng.poisson(1, 300), rng.poisson(1, 200), 0.05).p <= 0.05 for _ in range(1000)]
    assert np.mean(alarms) <= 0.05


def test_by_hand() -> None:
    found = run([9, 8, 7, 1, 0, 0, 0, 0], [6.5, 5, 4, 3, 2], 0.2)
    assert (found.threshold, found.member_hits, found.control_hits) == (6.5, 3, 1)
    assert (found.delta, found.ratio) == (pytest.approx(3 / 8 - 1 / 5), pytest.approx(15 / 8))
    assert found.p == pytest.approx(8 * 7 * 6 / (13 * 12 * 11))  # the three highest of 13 are all members
    assert (found.members, found.controls, found.alpha) == (8, 5, 0.2)
    assert found.delta_low < found.delta < found.delta_high
    assert found.ratio_low < found.ratio < found.ratio_high


def test_a_shared_score_falls_below_the_threshold_whole() -> None:
    member_at_the_bar = run([9, 6, 0], [7, 6, 5, 4], 0.5)
    assert (member_at_the_bar.member_hits, member_at_the_bar.control_hits) == (1, 1)
    assert 6 < member_at_the_bar.threshold < 6.1
    constant = run([1, 1, 1], [1, 1, 1, 1], 0.5)
    assert (constant.member_hits, constant.control_hits, constant.delta, constant.p) == (0, 0, 0, 1)
    assert math.isnan(constant.ratio)
    only_members = run([2, 2, 0], [1, 1, 1, 1], 0.5)
    assert (only_members.member_hits, only_members.control_hits) == (2, 0)
    assert (only_members.ratio, only_members.ratio_high) == (math.inf, math.inf)
    assert 0 < only_members.ratio_low < math.inf


def test_the_order_of_rows_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    member, control = rng.poisson(3, 60).astype(float), rng.poisson(3, 50).astype(float)
    assert run(rng.permutation(member), rng.permutation(control), 0.1) == run(member, control, 0.1)


def test_too_few_controls_measure_nothing() -> None:
    assert excess.excess(np.zeros(5), np.arange(99.0), 0.01) is None
    assert run([0.0], list(range(100)), 0.29).control_hits == 29  # 0.29 * 100 < 29 in floating point
    with pytest.raises(ScoreError, match="member_M must be finite"):
        excess.excess(np.array([math.nan]), np.zeros(9), 0.5)
    with pytest.raises(ScoreError, match="control_C must be a row"):
        excess.excess(np.zeros(9), np.zeros(0), 0.5)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 1"):
        excess.excess(np.zeros(9), np.zeros(9), 1)


@pytest.mark.parametrize(
    ("members", "controls", "alpha", "leaked"),
    [(300, 300, 0.01, 0.0), (3000, 200, 0.02, 0.03), (200, 1000, 0.01, 0.05)],
)
def test_intervals_cover_the_truth_at_the_threshold_used(
    members: int, controls: int, alpha: float, leaked: float
) -> None:
    rng, covered = np.random.default_rng(2), np.zeros(2)
    for _ in range(800):
        member, control = rng.random(members), rng.random(controls)
        member[rng.random(members) < leaked] += 1
        found = excess.excess(member, control, alpha)
        assert found is not None
        false = 1 - found.threshold
        true = leaked + (1 - leaked) * false
        covered += [
            found.delta_low <= true - false <= found.delta_high,
            found.ratio_low <= true / false <= found.ratio_high,
        ]
    assert (covered / 800 >= 0.93).all()  # 95 % less two and a half standard errors of the simulation


def test_the_false_positive_rate_at_an_order_statistic() -> None:
    """Beta(k, C - k + 1) is at most f with the chance of k or more successes in C trials at rate f."""
    sure = excess.control_rate(Cut(7, 0.5, 0, 7), 90)
    assert sure.value == 7 / 90
    assert binomtest(7, 90, sure.low, "greater").pvalue == pytest.approx(0.025)
    assert binomtest(7, 90, sure.high, "greater").pvalue == pytest.approx(0.975)
    moved = excess.control_rate(Cut(7, 0.5, 0, 4), 90)  # by ties: Clopper and Pearson's limits of 4 in 90
    assert moved == pytest.approx(proportion(4, 90))
    assert excess.control_rate(Cut(7, 0.5, 0, 0), 90) == pytest.approx(proportion(0, 90))


def test_joined_limits_by_hand() -> None:
    first, second = Rate(0.5, 0.4, 0.7), Rate(0.2, 0.1, 0.35)
    joined = excess.difference(first, second)
    assert joined == pytest.approx((0.3, 0.3 - math.hypot(0.1, 0.15), 0.3 + math.hypot(0.2, 0.1)))
    low = (0.1 - math.sqrt(0.01 - 0.4 * 0.35 * 0.6 * 0.05)) / (0.35 * 0.05)  # as Donner and Zou print it
    high = (0.1 + math.sqrt(0.01 - 0.7 * 0.1 * 0.3 * 0.3)) / (0.1 * 0.3)
    assert excess.quotient(first, second) == pytest.approx((2.5, low, high))
    assert excess.quotient(Rate(0, 0, 0.1), second) == pytest.approx((0, 0, 0.1 / math.sqrt(0.03)))
    assert excess.quotient(first, Rate(0.2, 0.1, 0.4))[1] > 0  # the printed form divides by zero here


@pytest.mark.parametrize(("members", "bounds"), [(1500, [4, 6, 9, 19]), (15_000, [31, 49, 79, 172])])
def test_known_bounds_on_false_entries(members: int, bounds: list[int]) -> None:
    assert [excess.fdp_bound(members - 20, hits, members, 1500) for hits in (0, 1, 3, 10)] == bounds


def test_the_bound_is_the_largest_number_that_is_not_rejected() -> None:
    members, controls = 12, 9
    for hits in range(controls + 1):
        kept = []
        for false in range(members + 1):
            ways = sum(Fraction(math.comb(controls, d) * math.comb(members, false + hits - d)) for d in range(hits + 1))
            kept += [false] if ways / math.comb(members + controls, false + hits) >= Fraction(1, 10) else []
        for found in range(members + 1):
            assert excess.fdp_bound(found, hits, members, controls, 0.9) == min(found, max(kept))
    with pytest.raises(ValueError, match="member_hits must be between 0 and 12, got 13"):
        excess.fdp_bound(13, 0, 12, 9)
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        excess.fdp_bound(3, 0, 12, 9, 95)


def test_the_bound_holds_in_nineteen_of_twenty_audits() -> None:
    rng = np.random.default_rng(3)
    member, control = rng.random((1000, 100)) > 0.95, rng.random((1000, 50)) > 0.95
    held = [
        excess.fdp_bound(false + 10, hits, 110, 50) >= false
        for false, hits in zip(member.sum(1).tolist(), control.sum(1).tolist(), strict=True)
    ]
    assert np.mean(held) >= 0.95


@pytest.mark.parametrize(
    ("members", "controls", "alpha", "percent"),
    [
        (10_000, 10_000, 0.01, 0.40),
        (10_000, 10_000, 0.001, 0.15),
        (100_000, 100_000, 0.01, 0.12),
        (100_000, 100_000, 0.001, 0.039),
        (1_000_000, 100_000, 0.01, 0.085),
        (1_000_000, 100_000, 0.001, 0.029),
        (1_000_000, 100_000, 0.0001, 0.011),
    ],
)
def test_least_detectable_excess_is_near_earlier_figures(
    members: int, controls: int, alpha: float, percent: float
) -> None:
    """Earlier approximations, 2 to 20 % above the exact figures, which the next test checks on smaller sets."""
    assert 0.8 * percent <= 100 * excess.minimum_detectable(members, controls, alpha) <= percent


def above(hits: int, rank: int, members: int, controls: int) -> Fraction:
    """P(at least `hits` of `members` above the `rank`-th control), from the law of each single number."""
    ways = sum(
        math.comb(y + rank - 1, rank - 1) * math.comb(members - y + controls - rank, controls - rank)
        for y in range(max(hits, 0), members + 1)
    )
    return Fraction(ways, math.comb(members + controls, controls))


@pytest.mark.parametrize(
    ("members", "controls", "rank", "power"), [(60, 50, 5, 0.8), (40, 90, 2, 0.9), (200, 30, 1, 0.5)]
)
def test_least_detectable_excess_is_exact(members: int, controls: int, rank: int, power: float) -> None:
    needed = next(x for x in range(members + 1) if above(x, rank, members, controls) <= Fraction(1, 20))
    leaked = next(n for n in range(members + 1) if above(needed - n, rank, members - n, controls) >= power)
    assert excess.minimum_detectable(members, controls, rank / controls, power) == leaked / members


def test_what_no_audit_could_detect() -> None:
    assert excess.minimum_detectable(1, 1, 0.5) == math.inf
    assert excess.minimum_detectable(2, 2, 0.5) == math.inf  # the least p-value is 1 in 6
    with pytest.raises(ValueError, match="power must be between 0 and 1, got 80"):
        excess.minimum_detectable(10, 10, 0.5, power=80)
    with pytest.raises(ValueError, match="members must be at least 1, got 0"):
        excess.minimum_detectable(0, 10, 0.5)


def test_upper_bound_on_leaks_when_none_was_confirmed() -> None:
    assert excess.upper_bound(10_000, 1) == pytest.approx(2.995e-4, rel=1e-3)
    assert excess.upper_bound(10_000, 0.9) == pytest.approx(2.995e-4 / 0.9, rel=1e-3)
    assert (1 - excess.upper_bound(37, 1)) ** 37 == pytest.approx(0.05)
    assert excess.upper_bound(1, 0.5) == excess.upper_bound(100, 0) == 1
    with pytest.raises(ValueError, match="persons must be at least 1, got 0"):
        excess.upper_bound(0, 1)
    with pytest.raises(ValueError, match="recall_low must be between 0 and 1, got 2"):
        excess.upper_bound(10, 2)
