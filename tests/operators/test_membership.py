import math

import numpy as np
import pytest
from scipy.stats import binomtest, mannwhitneyu, norm

from operators import membership
from operators.errors import ScoreError
from operators.membership import Operating


def brute(member: np.ndarray, control: np.ndarray) -> float:
    return float(((member[:, None] > control).mean() + (member[:, None] >= control).mean()) / 2)


def normal(seed: int, members: int, controls: int, shift: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, members), rng.normal(0, 1, controls)


def test_auc_by_hand() -> None:
    assert membership.auc(np.array([3.0, 1.0]), np.array([2.0, 1.0])) == (1 + 1 + 0 + 0.5) / 4
    assert membership.auc(np.array([2.0]), np.array([1.0])) == 1
    assert membership.auc(np.ones(3), np.ones(4)) == 0.5


@pytest.mark.parametrize("decimals", [9, 0])
@pytest.mark.parametrize("sizes", [(50, 31), (7, 200)])
def test_auc_agrees_with_mann_and_whitney(sizes: tuple[int, int], decimals: int) -> None:
    member, control = (np.round(side, decimals) for side in normal(1, *sizes))
    pairs = len(member) * len(control)
    assert membership.auc(member, control) == pytest.approx(mannwhitneyu(member, control).statistic / pairs, rel=1e-14)
    assert membership.auc(member, control) == pytest.approx(brute(member, control), rel=1e-12)


@pytest.mark.parametrize("decimals", [9, 0])
def test_the_bootstrap_is_one_that_sorts_every_replicate(decimals: int) -> None:
    member, control = (np.round(side, decimals) for side in normal(2, 70, 50))
    rng = np.random.default_rng(5)
    areas = [brute(rng.choice(member, 70), rng.choice(control, 50)) for _ in range(3000)]
    found = membership.auc_interval(member, control, seed=0, replicates=3000)
    assert (found.low, found.high) == pytest.approx(np.quantile(areas, [0.025, 0.975]), abs=0.006)
    assert found.value == membership.auc(member, control)
    assert found == membership.auc_interval(np.sort(member), control[::-1], seed=0, replicates=3000)
    assert found.method == "bootstrap of persons, 3,000 replicates"


def test_one_replicate_weighs_every_person_by_its_draws() -> None:
    """The same draws, made by hand: first the controls', then the members', by ascending score."""
    member, control = (np.round(np.sort(side)) for side in normal(3, 40, 30))
    rng = np.random.default_rng(9)
    drawn = control[rng.integers(0, 30, 30)]
    area = brute(member[rng.integers(0, 40, 40)], drawn)
    found = membership.auc_interval(member, control, seed=9, replicates=1)
    assert found.low == found.high == pytest.approx(area, rel=1e-12)


def test_large_sets_take_delong_s_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    member, control = (np.round(side, 1) for side in normal(4, 400, 300))
    resampled = membership.auc_interval(member, control, seed=0)
    monkeypatch.setattr(membership, "LARGE", 300)
    found = membership.auc_interval(member, control, seed=0)
    wins = (member[:, None] > control) + 0.5 * (member[:, None] == control)
    error = math.sqrt(wins.mean(1).var(ddof=1) / 400 + wins.mean(0).var(ddof=1) / 300)
    assert (found.low, found.high) == pytest.approx((found.value - 1.959964 * error, found.value + 1.959964 * error))
    assert (found.low, found.high) == pytest.approx((resampled.low, resampled.high), abs=0.005)
    assert found.method.startswith("DeLong")


def test_the_interval_covers_the_true_area() -> None:
    truth, rng = norm.cdf(0.5 / 2**0.5), np.random.default_rng(6)
    covered = 0
    for seed in range(250):
        found = membership.auc_interval(rng.normal(0.5, 1, 80), rng.normal(0, 1, 60), seed, replicates=150)
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / 250 <= 0.99


def test_sets_that_do_not_overlap_are_no_certainty() -> None:
    above = membership.auc_interval(np.arange(5.0) + 10, np.arange(8.0), seed=0)
    assert (above.value, above.low, above.high) == (1, pytest.approx(0.025**0.2), 1)
    below = membership.auc_interval(np.arange(8.0), np.arange(5.0) + 10, seed=0, level=0.9)
    assert (below.value, below.low, below.high) == (0, 0, pytest.approx(1 - 0.05**0.2))


def test_operating_point_by_hand() -> None:
    control = np.arange(1000.0)
    member = np.concatenate([np.full(30, 5000.0), np.full(5, 980.5), np.full(165, 3.0)])
    found = membership.operating(member, control, 0.02)
    assert found is not None
    assert found[:4] == (0.02, 20, 980, 35 / 200)
    exact = binomtest(35, 200).proportion_ci(0.975, "exact")
    assert (found.tpr_low, found.tpr_high) == pytest.approx((exact.low, exact.high))
    # P(Beta(k, C - k + 1) <= f) is the chance of at least k of C at rate f.
    assert binomtest(20, 1000, found.fpr_low, "greater").pvalue == pytest.approx(0.0125, rel=1e-6)
    assert binomtest(20, 1000, found.fpr_high, "greater").pvalue == pytest.approx(0.9875, rel=1e-6)


def test_operating_points_that_cannot_be_estimated() -> None:
    member = np.arange(50.0)
    assert membership.operating(member, np.arange(999.0), 0.01) is None
    assert isinstance(membership.operating(member, np.arange(1000.0), 0.01), Operating)
    tied = np.concatenate([np.zeros(985), np.full(6, 1000.0), np.arange(2000.0, 2009.0)])
    assert membership.operating(member, tied, 0.01) is None  # the bar falls among equal controls, and 9 stay
    found = membership.operating(member, np.append(tied, 3000.0), 0.012)
    assert found is not None
    assert (found.k, found.tpr, found.tpr_low) == (10, 0, 0)
    assert 1000 < found.threshold < 1001
    everyone = membership.operating(member + 9000, np.arange(1000.0), 0.01)
    assert everyone is not None
    assert (everyone.tpr, everyone.tpr_high) == (1, 1)


def test_the_box_holds_both_true_rates() -> None:
    rng, held = np.random.default_rng(7), 0
    for _ in range(1000):
        found = membership.operating(rng.normal(1, 1, 300), rng.normal(0, 1, 500), 0.04)
        assert found is not None
        false, true = norm.sf(found.threshold), norm.sf(found.threshold - 1)
        held += found.fpr_low <= false <= found.fpr_high and found.tpr_low <= true <= found.tpr_high
    assert held / 1000 >= 0.94


@pytest.mark.parametrize("decimals", [9, 0])
def test_the_whole_curve_is_every_bar_and_encloses_the_area(decimals: int) -> None:
    member, control = (np.round(side, decimals) for side in normal(8, 60, 45))
    fpr, tpr = membership.roc(member, control)
    bars = [np.inf, *sorted({*member, *control}, reverse=True)]
    assert fpr.tolist() == [(control >= bar).sum() / 45 for bar in bars]
    assert tpr.tolist() == [(member >= bar).sum() / 60 for bar in bars]
    assert np.trapezoid(tpr, fpr) == pytest.approx(membership.auc(member, control), rel=1e-12)


@pytest.mark.parametrize("points", [4, 40, 512])
def test_a_thinned_curve_keeps_its_ends_and_lies_on_the_whole_one(points: int) -> None:
    member, control = (np.round(side, 4) for side in normal(9, 3000, 2000))
    fpr, tpr = membership.roc(member, control, points)
    assert len(fpr) == len(tpr) <= points
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()
    whole = set(zip(*(side.tolist() for side in membership.roc(member, control, 10**6)), strict=True))
    assert set(zip(fpr.tolist(), tpr.tolist(), strict=True)) <= whole
    if points == 512:
        assert np.interp(0.001, fpr, tpr) == pytest.approx((member >= np.sort(control)[-2]).mean(), abs=0.01)
        assert np.trapezoid(tpr, fpr) == pytest.approx(membership.auc(member, control), abs=0.002)


def test_bad_input_is_named() -> None:
    fine, nan = np.arange(2000.0), np.array([np.nan])
    for call in (
        lambda m, c: membership.auc(m, c),
        lambda m, c: membership.auc_interval(m, c, 0),
        lambda m, c: membership.operating(m, c, 0.5),
        lambda m, c: membership.roc(m, c),
    ):
        with pytest.raises(ScoreError, match="member must be finite"):
            call(nan, fine)
        with pytest.raises(ScoreError, match="control must be a row of scores"):
            call(fine, np.zeros(0))
    with pytest.raises(ValueError, match="points must be at least 4, got 3"):
        membership.roc(fine, fine, 3)
    with pytest.raises(ValueError, match="replicates must be at least 1, got 0"):
        membership.auc_interval(fine, fine, 0, 0)
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 95"):
        membership.auc_interval(fine, fine, 0, level=95)
