import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, spearmanr

from operators.class_alignment import alignment_test, nearest_class, order_test


def test_the_person_nearest_to_most_images() -> None:
    release = np.array([7, 7, 7, 2, 2, 2, 2, 5])
    training = np.array([9, 4, 9, 8, 3, 3, 8, 1])
    identities, nearest = nearest_class(release, training)
    assert (identities.tolist(), nearest.tolist()) == ([2, 5, 7], [3, 1, 9])


def test_a_small_table_by_hand() -> None:
    # Five classes, reach of one: identities 0 and 3 resemble 1 and 3, identity 4 resembles 1 as well.
    own, nearest = np.array([0, 3, 4]), np.array([1, 3, 1])
    found = alignment_test(own, nearest, 5, seed=1, within=1, permutations=20_000)
    assert (found.identities, found.aligned, found.share.value) == (3, 2, 2 / 3)
    assert found.expected == pytest.approx((2 + 3 + 2) / 5 / 3)
    counts = [(abs(n[1] - 0) <= 1) + (abs(n[3] - 3) <= 1) + (abs(n[1] - 4) <= 1) for n in permutations(range(5))]
    assert found.expected == pytest.approx(np.mean(counts) / 3)
    assert found.p_value == pytest.approx(np.mean(np.array(counts) >= 2), abs=0.012)
    interval = binomtest(2, 3).proportion_ci(0.95)
    assert (found.share.low, found.share.high) == pytest.approx((interval.low, interval.high))


def test_planted_alignment_is_found_and_chance_is_not() -> None:
    rng = np.random.default_rng(2)
    own = rng.permutation(10_000)[:300]
    nearest = rng.integers(0, 10_000, 300)
    chance = alignment_test(own, nearest, 10_000, seed=3, permutations=199)
    assert chance.p_value > 0.05 and chance.expected == pytest.approx(11 / 10_000, rel=0.02)
    nearest[:60] = np.clip(own[:60] - rng.integers(0, 5, 60), 0, 9_999)
    planted = alignment_test(own, nearest, 10_000, seed=3, permutations=199)
    assert planted.share.value >= 0.2 and planted.p_value == 1 / 200
    assert planted == alignment_test(own, nearest, 10_000, seed=3, permutations=199)


def test_one_person_near_all_identities_is_no_evidence() -> None:
    """A hub within reach of eleven labels: as eleven independent trials this would be overwhelming."""
    found = alignment_test(np.arange(45, 56), np.full(11, 50), 100, seed=4, permutations=999)
    assert found.aligned == 11
    assert found.p_value == pytest.approx(0.01, abs=0.01)  # the hub must get label 50 of 100


def test_p_values_under_the_null_are_not_too_small() -> None:
    rng = np.random.default_rng(5)
    p = np.array(
        [
            alignment_test(
                np.arange(40), rng.permutation(40)[rng.integers(0, 12, 40)], 40, seed=s, permutations=99
            ).p_value
            for s in range(300)
        ]
    )
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).mean() <= level + 2.6 * np.sqrt(level * (1 - level) / 300)


def test_order_is_spearmans_correlation() -> None:
    rng = np.random.default_rng(6)
    own = rng.permutation(30)
    nearest = (own // 3) * 100 + rng.integers(0, 250, 30)
    found = order_test(own, nearest, seed=7, permutations=999)
    assert found.correlation == pytest.approx(spearmanr(own, nearest).statistic)
    assert found.p_value <= 0.002
    assert order_test(own, np.full(30, 4), seed=7, permutations=99)[1:3] == (0.0, 1.0)
    by_hand = spearmanr(range(5), [2, 1, 3, 5, 4]).statistic
    exact = np.mean([spearmanr(range(5), p).statistic >= by_hand - 1e-9 for p in permutations(range(5))])
    assert order_test(np.arange(5), np.array([2, 1, 3, 5, 4]), seed=8, permutations=4000).p_value == pytest.approx(
        exact, abs=0.015
    )


@pytest.mark.parametrize(
    ("own", "nearest", "options", "message"),
    [
        ([], [], {}, "Got 0 labels"),
        ([1, 1], [0, 2], {}, "Got 2 labels, 1 of them different"),
        ([0, 5], [0, 2], {}, "release_class_N must lie between 0 and 4. Got 0 to 5"),
        ([0, 4], [0, -1], {}, "training_class_N must lie between 0 and 4"),
        ([0], [0], {"within": -1}, "within must be 0 or more. Got -1"),
        ([0], [0], {"permutations": 0}, "permutations must be 1 or more. Got 0"),
    ],
)
def test_wrong_input_is_refused(own: list[int], nearest: list[int], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alignment_test(np.array(own, int), np.array(nearest, int), 5, seed=0, **options)


def published(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Release labels of a published list of the 100 nearest pairs, and the place of the real person in CASIA-WebFace.

    The images of CASIA-WebFace are numbered through in the order of its persons.
    """
    found = list((root.parent / "shared" / "data" / "brf_top100").glob(f"{name}_Top100Global_*.json"))
    if not found:
        pytest.skip("the published lists are not here")
    rows = json.loads(found[0].read_text())["results"]
    labels = np.array([int(row["query_identity"]) for row in rows])
    return nearest_class(labels, np.array([int(row["casia_identity"]) for row in rows]))


def test_published_list_of_a_class_conditional_generator(root: Path) -> None:
    """SFace2's generator was conditioned on the classes of CASIA-WebFace; DCFace's was not."""
    kept = order_test(*published(root, "SFace2"), seed=9, permutations=999)
    assert kept.identities > 15 and kept.correlation > 0.95 and kept.p_value == 0.001
    assert order_test(*published(root, "DCFace"), seed=9, permutations=999).p_value > 0.01
