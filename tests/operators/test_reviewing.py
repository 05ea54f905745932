"""Agreement, excess and exact p-values of a blinded review, against published values, scipy and plain counting."""

import io

import numpy as np
import PIL.Image
import pytest
from scipy.stats import binomtest, fisher_exact

from operators.reviewing import (
    Judged,
    Label,
    agreement,
    cohen_kappa,
    disagree,
    fisher_p,
    framed,
    outcome,
    ranked,
    settled,
)

NEAR, SAME, ALIKE, OTHER, BAD = Label


def test_kappa_is_that_of_the_published_example() -> None:
    """Fleiss, Cohen and Everitt (1969): 200 subjects, kappa 0.429, standard error 0.054."""
    found = cohen_kappa(np.array([[106, 10, 4], [22, 28, 10], [2, 12, 6]]))
    assert found is not None and found.value == pytest.approx(0.429, abs=5e-4)
    assert (found.low, found.high) == pytest.approx((0.429 - 1.96 * 0.054, 0.429 + 1.96 * 0.054), abs=0.03)


def test_the_interval_of_kappa_covers_the_true_value() -> None:
    rng = np.random.default_rng(1)
    accuracy, prior = np.full((3, 3), 0.03) + np.eye(3) * 0.91, np.array([0.2, 0.3, 0.5])
    shares = np.einsum("k,ki,kj->ij", prior, accuracy, accuracy)
    chance = shares.sum(axis=1) @ shares.sum(axis=0)
    true = (np.trace(shares) - chance) / (1 - chance)
    found = [cohen_kappa(rng.multinomial(40, shares.ravel()).reshape(3, 3)) for _ in range(400)]
    assert np.mean([one is not None and one.low <= true <= one.high for one in found]) >= 0.94


def test_perfect_agreement_is_not_certain_and_one_label_alone_says_nothing() -> None:
    found = cohen_kappa(np.diag([5, 5]))
    assert found is not None and found.value == 1 == found.high
    assert found.low == pytest.approx((binomtest(10, 10).proportion_ci(0.95, "exact").low - 0.5) / 0.5)
    assert cohen_kappa(np.array([[7, 0], [0, 0]])) is None
    for wrong in (np.zeros((2, 2), np.int64), np.ones((2, 3), np.int64)):
        with pytest.raises(ValueError, match="table_KK"):
            cohen_kappa(wrong)


def test_agreement_counts_equal_labels() -> None:
    found = agreement([NEAR, SAME, OTHER, OTHER], [NEAR, ALIKE, OTHER, BAD])
    assert found is not None and (found.pairs, found.observed) == (4, 0.5)
    chance = (1 * 1 + 2 * 1) / 16  # near copy by each once; different by the first twice and by the second once
    assert found.kappa is not None and found.kappa.value == pytest.approx((0.5 - chance) / (1 - chance))
    assert agreement([], []) is None


@pytest.mark.parametrize(
    ("labels", "ruled", "reviewers", "final", "disputed"),
    [
        ([SAME], None, 1, SAME, False),
        ([SAME], NEAR, 2, None, False),
        ([SAME, None], NEAR, 2, None, False),
        ([SAME, SAME], NEAR, 2, SAME, False),
        ([SAME, NEAR], None, 2, None, True),
        ([SAME, NEAR], OTHER, 2, OTHER, True),
        ([], None, 1, None, False),
    ],
)
def test_a_label_is_final_when_all_agree_or_the_adjudicator_has_spoken(
    labels: list[Label | None], ruled: Label | None, reviewers: int, final: Label | None, disputed: bool
) -> None:
    assert settled(labels, ruled, reviewers) is final
    assert disagree(labels, reviewers) is disputed


@pytest.mark.parametrize("counts", [(0, 0, 5, 5), (3, 0, 5, 7), (4, 2, 10, 10), (10, 10, 10, 10), (1, 0, 300, 20)])
def test_the_p_value_is_fishers(counts: tuple[int, int, int, int]) -> None:
    hits, false, members, controls = counts
    table = [[hits, false], [members - hits, controls - false]]
    assert fisher_p(*counts) == pytest.approx(fisher_exact(table, alternative="greater").pvalue)


def review(members: str, controls: str) -> list[Judged]:
    """Pairs by falling score 9, 8, ...: `+` confirmed, `-` not, `?` undecided; controls half a step lower."""
    label = {"+": SAME, "-": OTHER, "?": None}
    pairs = [Judged(True, 9.0 - at, label[sign]) for at, sign in enumerate(members)]
    return pairs + [Judged(False, 8.5 - at, label[sign]) for at, sign in enumerate(controls)]


def test_counts_and_rates_are_those_of_hand_counting() -> None:
    found = outcome(review("+++-?", "-+-?-"), 50, 40)
    assert (found.members, found.controls, found.undecided) == (4, 4, 2)
    assert (found.member_confirmed, found.control_confirmed, found.excess) == (3, 1, 2)
    exact = binomtest(1, 4).proportion_ci(0.95, "exact")
    assert found.false_alarm == pytest.approx((0.25, exact.low, exact.high))
    assert found.share.value == pytest.approx(0.5) and found.share.low < 0.5 < found.share.high
    assert found.p_shown == pytest.approx(fisher_exact([[3, 1], [1, 3]], alternative="greater").pvalue)


def test_the_bar_is_where_the_first_list_ends_and_counts_everybody() -> None:
    judged = review("+++-+", "-+-+-")  # members end at 5.0, controls at 4.5: the bar is 5.0
    found = outcome(judged, 50, 40).bar
    assert (found.score, found.member_shown, found.control_shown) == (5.0, 5, 4)
    assert (found.member_confirmed, found.control_confirmed) == (4, 2)
    assert found.delta.value == pytest.approx(4 / 50 - 2 / 40)
    assert found.p == pytest.approx(fisher_exact([[4, 2], [46, 38]], alternative="greater").pvalue)


def test_nothing_decided_is_no_result_and_no_crash() -> None:
    found = outcome(review("??", "??"), 5, 5)
    assert (found.members, found.excess, found.undecided) == (0, 0, 4)
    assert np.isnan(found.share.value) and found.p_shown == found.bar.p == 1
    with pytest.raises(ValueError, match="judged"):
        outcome(review("+", ""), 5, 5)
    with pytest.raises(ValueError, match="judged"):
        outcome(review("++", "+"), 1, 5)


def test_without_leaks_a_ten_times_larger_training_set_fools_only_the_test_of_the_pairs_shown() -> None:
    """Reviewers confirm strangers the more often the closer they are, and of more people the closest are closer."""
    rng = np.random.default_rng(5)
    over_bar = shown = 0
    for _ in range(150):
        judged = []
        for member, people in ((True, 3000), (False, 300)):
            for score in np.sort(rng.normal(size=people))[-40:].tolist():
                judged.append(Judged(member, score, SAME if rng.random() < 0.7 * (score > 2.3) else OTHER))
        found = outcome(judged, 3000, 300)
        over_bar += found.bar.p <= 0.05
        shown += found.p_shown <= 0.05
    assert over_bar <= 14 and shown >= 130


def test_ranking_is_by_score_and_then_by_row() -> None:
    assert ranked(np.array([0.1, 0.5, 0.5, 0.9])).tolist() == [3, 1, 2, 0]


def test_pictures_have_one_size_and_nothing_but_pixels() -> None:
    wide = np.zeros((50, 200, 3), np.uint8)
    wide[:, :100], wide[:, 100:] = (250, 0, 0), (0, 0, 250)
    for pixels in (wide, wide.transpose(1, 0, 2), wide[:1, :1]):
        data = framed(pixels, 64)
        image = PIL.Image.open(io.BytesIO(data))
        assert (image.format, image.size, image.mode, image.info) == ("PNG", (64, 64), "RGB", {})
        kinds, at = [], 8
        while at < len(data):
            kinds.append(data[at + 4 : at + 8])
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}
    shown = np.asarray(PIL.Image.open(io.BytesIO(framed(wide, 64))))
    assert (shown[:20] == 128).all() and (shown[-20:] == 128).all()
    assert (shown[30, 5] == (250, 0, 0)).all() and (shown[30, -5] == (0, 0, 250)).all()
    with pytest.raises(ValueError, match="image_HWC"):
        framed(np.zeros((4, 4), np.uint8), 64)
