import numpy as np
import pytest
from scipy.stats import false_discovery_control

from operators import conformal
from operators.errors import AuditError, ScoreError


def scores(seed: int, members: int = 40, controls: int = 25, levels: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Members shifted upwards; rounded to so many levels, which ties them, unless 0."""
    rng = np.random.default_rng(seed)
    member, control = rng.normal(1, 1, members), rng.normal(0, 1, controls)
    return (np.round(member * levels), np.round(control * levels)) if levels else (member, control)


def test_p_values_by_hand() -> None:
    found = conformal.p_values(np.array([9.0, 3.0, 2.5, -1.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert found.tolist() == [1 / 5, 3 / 5, 3 / 5, 5 / 5]  # the control equal to 3 counts against the member


@pytest.mark.parametrize("levels", [0, 2, 1])
@pytest.mark.parametrize("seed", range(5))
def test_p_and_q_values_equal_their_definitions(seed: int, levels: int) -> None:
    member, control = scores(seed, levels=levels)
    p = [(1 + sum(c >= m for c in control)) / (1 + len(control)) for m in member]
    assert conformal.p_values(member, control).tolist() == p
    bars = sorted({*member, *control, min(*member, *control) - 1})
    q = []
    for m in member:
        shares = [len(member) / (len(control) + 1) * (1 + sum(control >= t)) / sum(member >= t) for t in bars if t <= m]
        q.append(min(1.0, *shares))
    assert conformal.q_values(member, control) == pytest.approx(q, rel=1e-12)
    assert conformal.q_values(member, control) == pytest.approx(false_discovery_control(p), rel=1e-12)


@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("q", [0.05, 0.1, 0.2, 0.5, 0.9])
def test_both_ways_to_the_list_agree_with_scipy(q: float, levels: int) -> None:
    for seed in range(20):
        member, control = scores(seed, 30, 99, levels)
        p = conformal.p_values(member, control)
        listed = conformal.benjamini_hochberg(p, q)
        assert listed.tolist() == (false_discovery_control(p) <= q + 1e-12).tolist()
        assert listed.tolist() == (conformal.q_values(member, control) <= q).tolist()
        ordered = conformal.q_values(np.sort(member), control)
        assert (np.diff(ordered) <= 0).all()
        assert ordered.max() <= 1


def test_benjamini_and_hochberg_s_own_example() -> None:
    p = np.array([1, 4, 19, 95, 201, 278, 298, 344, 459, 3240, 4262, 5719, 6528, 7590, 10000]) / 10000
    assert conformal.benjamini_hochberg(p[::-1], 0.05).tolist() == [False] * 11 + [True] * 4
    assert not conformal.benjamini_hochberg(np.array([0.06, 0.9]), 0.05).any()


@pytest.mark.parametrize("levels", [0, 2])
def test_lists_keep_to_their_rate_of_false_entries(levels: int) -> None:
    """Of 120 members 20 leaked; with ties and without, the mean share of others on the list is at most q."""
    rng, shares = np.random.default_rng(0), []
    for _ in range(1500):
        control, member = rng.standard_normal(120), rng.standard_normal(120)
        member[:20] += 3
        if levels:
            member, control = np.round(member * levels), np.round(control * levels)
        listed = conformal.q_values(member, control) <= 0.2
        shares.append(listed[20:].sum() / max(listed.sum(), 1))
    assert 0.05 < np.mean(shares) <= 0.2 * 100 / 120 + 3 * np.std(shares) / 1500**0.5


@pytest.mark.parametrize(
    ("members", "controls", "q", "length"),
    [
        (100_000, 100_000, 0.05, 20),
        (100_000, 10_000, 0.05, 200),
        (100, 19, 0.05, 100),
        (100, 18, 0.05, 106),
        (5, 999, 0.05, 1),
        (7, 20, 1 / 3, 1),  # meets its bar exactly
    ],
)
def test_the_shortest_list_can_be_had_but_none_shorter(members: int, controls: int, q: float, length: int) -> None:
    assert conformal.shortest_list(members, controls, q) == length
    if length <= members:
        member = np.concatenate([np.ones(length), np.zeros(members - length)])
        listed = conformal.q_values(member, np.zeros(controls)) <= q
        assert listed.tolist() == member.astype(bool).tolist()
        member[0] = 0
        assert length == 1 or not (conformal.q_values(member, np.zeros(controls)) <= q).any()


def test_controls_needed_is_the_inverse_of_the_shortest_list() -> None:
    assert conformal.controls_needed(100_000, 20, 0.05) == 99_999
    assert conformal.controls_needed(10, 10, 0.9) == 1
    for members, discoveries, q in [(1000, 7, 0.05), (1500, 15, 0.1), (333, 1, 0.3), (50, 50, 0.05)]:
        needed = conformal.controls_needed(members, discoveries, q)
        assert conformal.shortest_list(members, needed, q) <= discoveries
        assert conformal.shortest_list(members, needed - 1, q) > discoveries


def test_bad_input_is_named_with_the_remedy() -> None:
    fine = np.array([1.0, 2.0])
    for call in (conformal.p_values, conformal.q_values):
        with pytest.raises(ScoreError, match=r"member_M must be a row of scores.*got shape \(0,\).*status ok"):
            call(np.array([]), fine)
        with pytest.raises(ScoreError, match=r"control_C must be finite; 1 of 2 .* Leave out"):
            call(fine, np.array([1.0, np.nan]))
    with pytest.raises(ScoreError, match="infinite"):
        conformal.p_values(np.array([np.inf]), fine)
    assert issubclass(ScoreError, AuditError)
    assert issubclass(ScoreError, ValueError)
    for q in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="q must be between 0 and 1, got"):
            conformal.benjamini_hochberg(np.array([0.1]), q)
    with pytest.raises(ValueError, match=r"p_M must lie in \[0, 1\], got"):
        conformal.benjamini_hochberg(fine, 0.05)
    with pytest.raises(ValueError, match="controls must be at least 1, got 0"):
        conformal.shortest_list(5, 0, 0.05)
    with pytest.raises(ValueError, match="discoveries must be at least 1, got 0"):
        conformal.controls_needed(5, 0, 0.05)
