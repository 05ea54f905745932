import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy.stats import chi2_contingency, fisher_exact

from operators import groups
from operators.calibration import proportion
from operators.errors import ScoreError
from operators.groups import GroupRate


def test_rates_by_hand() -> None:
    member = np.array([0.9, 0.8, 0.7, 0.1, 0.6, 0.2])
    control = np.array([0.9, 0.1, 0.2, 0.3, 0.65, 0.1])
    rates = groups.by_group(member, ["b", "b", "b", "b", "a", None], control, ["b", "b", "b", "b", "c", "a"], 0.7)
    assert [(r.group, r.members, r.controls, r.member_hits, r.control_hits) for r in rates] == [
        ("a", 1, 1, 0, 0),
        ("b", 4, 4, 3, 1),
        ("c", 0, 1, 0, 0),
        ("not given", 1, 0, 0, 0),
    ]
    a, b, c, unknown = rates
    assert (b.member_rate, b.control_rate) == (proportion(3, 4), proportion(1, 4))
    assert b.fdp == pytest.approx(4 / 5 * 2 / 3)
    assert b.excess is not None
    assert b.excess.value == 0.5
    assert b.excess.low == pytest.approx(0.5 - math.hypot(0.75 - proportion(3, 4).low, proportion(1, 4).high - 0.25))
    assert a.fdp is None
    assert a.excess is not None
    assert (c.excess, unknown.excess, unknown.fdp) == (None, None, None)
    assert math.isnan(c.member_rate.value)
    assert c.member_rate[1:] == unknown.control_rate[1:] == (0, 1)


def test_groups_add_up_to_the_whole_whatever_holds_the_labels() -> None:
    rng = np.random.default_rng(0)
    member, control = rng.random(500), rng.random(300)
    of_member, of_control = rng.choice(["x", "y", "z"], 500), rng.choice(["x", "y", "z"], 300)
    rates = groups.by_group(member, of_member, control, of_control, 0.9)
    assert rates == groups.by_group(member, of_member.tolist(), control, of_control.astype(object), 0.9)
    assert sum(r.members for r in rates) == 500
    assert sum(r.control_hits for r in rates) == (control >= 0.9).sum()
    for r in rates:
        assert r.member_hits == (member[of_member == r.group] >= 0.9).sum()
        assert r.fdp is not None
        assert 0 < r.fdp <= 1


def test_the_excess_of_a_group_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(1), 0
    for _ in range(600):
        one = groups.by_group(rng.random(150), ["g"] * 150, rng.random(60) - 0.05, ["g"] * 60, 0.9)[0]
        assert one.excess is not None
        covered += one.excess.low <= 0.05 <= one.excess.high
    assert covered / 600 >= 0.93


def freeman_halton(hits: list[int], totals: list[int]) -> float:
    def ways(table: tuple[int, ...]) -> int:
        return math.prod(math.comb(n, x) for n, x in zip(totals, table, strict=True))

    tables = [t for t in product(*(range(n + 1) for n in totals)) if sum(t) == sum(hits)]
    return float(Fraction(sum(ways(t) for t in tables if ways(t) <= ways(tuple(hits))), sum(map(ways, tables))))


@pytest.mark.parametrize(
    ("hits", "totals"),
    [([1, 4, 0], [6, 5, 9]), ([0, 3, 3, 2], [4, 4, 7, 3]), ([2, 2], [5, 5]), ([5, 0, 1], [5, 5, 5]), ([0, 0], [3, 4])],
)
def test_homogeneity_is_exact_on_small_tables(hits: list[int], totals: list[int]) -> None:
    assert groups.homogeneity(hits, totals) == pytest.approx(freeman_halton(hits, totals), rel=1e-9)


def test_homogeneity_of_two_groups_is_fisher_s_test() -> None:
    for hits, totals in [([3, 9], [40, 35]), ([120, 60], [9000, 8000]), ([0, 7], [500, 900])]:
        table = [hits, [n - x for n, x in zip(totals, hits, strict=True)]]
        assert groups.homogeneity(hits, totals) == pytest.approx(fisher_exact(table).pvalue, rel=1e-6)


def test_drawn_tables_agree_with_all_tables_and_with_chi_squared(monkeypatch: pytest.MonkeyPatch) -> None:
    hits, totals = [110, 90, 85, 130], [9000, 9000, 8000, 10_000]
    table = [hits, [n - x for n, x in zip(totals, hits, strict=True)]]
    found = groups.homogeneity(hits, totals)
    assert found == groups.homogeneity(hits, totals)
    assert found != groups.homogeneity(hits, totals, seed=1)
    assert found == pytest.approx(chi2_contingency(table).pvalue, abs=0.02)
    hits, totals = [8, 3, 9], [100, 90, 95]
    whole = groups.homogeneity(hits, totals)
    monkeypatch.setattr(groups, "_count", lambda drawn, totals_G: groups.TABLES + 1)
    assert groups.homogeneity(hits, totals) == pytest.approx(whole, abs=0.012)
    assert groups.homogeneity([900, 10, 10], [1000, 1000, 1000]) == 1 / (groups.TABLES + 1)


@pytest.mark.parametrize(("drawn", "totals"), [(4, [2, 3, 4]), (0, [3, 3]), (9, [5, 2, 8, 1]), (7, [7])])
def test_tables_are_counted_as_they_are_listed(drawn: int, totals: list[int]) -> None:
    listed = [t for t in product(*(range(n + 1) for n in totals)) if sum(t) == drawn]
    assert sorted(map(tuple, groups._tables(drawn, totals))) == listed
    assert groups._count(drawn, np.array(totals)) == len(listed)


def test_homogeneity_without_anything_to_compare() -> None:
    assert groups.homogeneity([3], [10]) == groups.homogeneity([], []) == groups.homogeneity([3, 0], [10, 0]) == 1
    for hits, totals in [([3], [2]), ([-1, 2], [5, 5]), ([1], [2, 3])]:
        with pytest.raises(ValueError, match="hits must be between 0 and the group's total, got"):
            groups.homogeneity(hits, totals)


def rate(control_hits: int, controls: int) -> GroupRate:
    return GroupRate(
        "g", 0, controls, 0, control_hits, proportion(0, 0), proportion(control_hits, controls), None, None
    )


def test_the_ratio_of_rates_needs_ten_hits_in_two_groups() -> None:
    assert groups.ratio_max_min([rate(10, 1000), rate(40, 1000), rate(9, 10)]) == pytest.approx(4)
    assert groups.ratio_max_min([rate(10, 1000), rate(9, 1000)]) is None
    assert groups.ratio_max_min([]) is None


def test_bad_input_is_named() -> None:
    fine = np.array([1.0, 2.0])
    with pytest.raises(ScoreError, match="control_group must hold one label per score; got 1 labels for 2 scores"):
        groups.by_group(fine, ["a", "b"], fine, ["a"], 1)
    with pytest.raises(ScoreError, match="member must be finite"):
        groups.by_group(np.array([np.nan]), ["a"], fine, ["a", "a"], 1)
