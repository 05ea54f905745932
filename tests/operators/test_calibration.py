import numpy as np
import pytest

from operators import calibration
from operators.errors import CapacityError
from operators.vectors import normalise


def brute_scores(stored: np.ndarray, person: np.ndarray) -> list[float]:
    return sorted(
        (
            float(stored[i].astype(float) @ stored[j].astype(float))
            for i in range(len(stored))
            for j in range(i + 1, len(stored))
            if person[i] != person[j]
        ),
        reverse=True,
    )


@pytest.mark.parametrize("block", [7, 64, 2048])
def test_the_tail_holds_the_highest_non_mated_scores(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BLOCK", block)
    rng = np.random.default_rng(0)
    stored = normalise(rng.standard_normal((90, 8)))[0]
    person = rng.integers(0, 30, 90)
    truth = brute_scores(stored, person)
    tail = calibration.non_mated_tail(stored, person, keep=50)
    assert tail.pairs == len(truth)
    assert tail.mated == 90 * 89 // 2 - len(truth)
    assert tail.cosines.tolist() == truth[:50]


def tail(*cosines: float) -> calibration.Tail:
    return calibration.Tail(pairs=len(cosines), mated=0, cosines=np.array(sorted(cosines, reverse=True)))


@pytest.mark.parametrize(
    ("fmr", "over"),
    [(0.1, 1), (0.2, 2), (0.3, 2), (0.4, 2), (0.5, 5)],  # 0.7 three times: the group enters whole or not at all
)
def test_the_threshold_lets_at_most_the_rate_through(fmr: float, over: int) -> None:
    scores = (0.9, 0.8, 0.7, 0.7, 0.7, 0.4, 0.3, 0.2, 0.1, 0.0)
    found = calibration.threshold_at(tail(*scores), fmr)
    assert found.over == over == sum(score >= found.cosine for score in scores)
    assert found.fmr.value == over / 10
    assert sum(score >= np.nextafter(found.cosine, -1) for score in scores) > fmr * 10


def test_a_rate_that_the_sample_cannot_measure_is_refused_with_the_remedy() -> None:
    with pytest.raises(CapacityError, match=r"assess\.fmr=0\.01 cannot be measured with 10 non-mated pairs"):
        calibration.threshold_at(tail(*np.linspace(0, 0.9, 10)), 0.01)


def test_a_tail_that_was_cut_too_short_is_refused() -> None:
    short = calibration.Tail(pairs=1000, mated=0, cosines=np.array([0.9, 0.8]))
    with pytest.raises(CapacityError, match="needs 11"):
        calibration.threshold_at(short, 0.01)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (0, 10, 0.0, 1 - 0.025**0.1),  # closed forms at the ends
        (10, 10, 0.025**0.1, 1.0),
        (5, 10, 0.187086, 0.812914),  # Clopper and Pearson's table
        (1, 100, 0.000253, 0.054459),
    ],
)
def test_clopper_pearson_intervals(count: int, total: int, low: float, high: float) -> None:
    rate = calibration.proportion(count, total)
    assert rate.value == count / total
    assert (rate.low, rate.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_the_finest_rate_rests_on_ten_exceedances() -> None:
    assert calibration.finest_fmr(10_000, 1e-6) == 1e-3
    assert calibration.finest_fmr(10**9, 1e-6) == 1e-6
    assert calibration.finest_fmr(0, 1e-6) == 1.0
