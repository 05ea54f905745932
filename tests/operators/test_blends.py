from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import beta

from operators import blends
from operators.blends import Shortlist, best_cosine, best_pairs, competition, decoy_partners, mean_cosine, mmpmr


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    raw = rng.standard_normal(shape)
    return raw / np.linalg.norm(raw, axis=-1, keepdims=True)


def listed(release_QD: np.ndarray, gallery_GD: np.ndarray, k: int) -> Shortlist:
    """The main search's lists, by plain sorting."""
    cosines = release_QD.astype(float) @ gallery_GD.astype(float).T
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return Shortlist(rows, np.take_along_axis(cosines, rows, 1))


@pytest.mark.parametrize("alike", [-0.6, 0.0, 0.7])
def test_formulas_are_cosines_of_vectors(alike: float) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        face, left, other = unit(rng, 3, 5)
        right = alike * left + np.sqrt(1 - alike**2) * (v := other - (other @ left) * left) / np.linalg.norm(v)

        def cosine(share: float, face=face, left=left, right=right) -> float:
            mix = share * left + (1 - share) * right
            return float(face @ mix / np.linalg.norm(mix))

        a, b, c = (np.array(v) for v in (face @ left, face @ right, left @ right))
        best = max(-minimize_scalar(lambda s: -cosine(s), bounds=(0, 1), options={"xatol": 1e-9}).fun, a, b)
        assert mean_cosine(a, b, c) == pytest.approx(cosine(0.5), abs=1e-12)
        assert best_cosine(a, b, c) == pytest.approx(best, abs=1e-7)


def test_formulas_at_their_edges() -> None:
    one, half = np.array(1.0), np.array(0.5)
    assert mean_cosine(half, half, -one) == -np.inf
    assert mean_cosine(half, half, one) == 0.5
    assert best_cosine(half, half, np.array(1.00006)) == 0.5  # a stored vector may be longer than 1
    assert best_cosine(half, half, np.array(1 - 1e-13)) == pytest.approx(0.5, abs=1e-9)
    assert best_cosine(-half, np.array(-0.2), np.array(0.0)) == -0.2


@pytest.mark.parametrize("score", [mean_cosine, best_cosine])
def test_certified_pairs_are_the_best_of_all_pairs(score: blends.Score, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    gallery = unit(rng, 60, 24).astype(np.float16)
    person = np.repeat(np.arange(30), 2)
    sources = rng.integers(0, 60, (40, 2))
    release = gallery[sources].astype(float).sum(axis=1) + 0.2 * unit(rng, 40, 24)
    release = (release / np.linalg.norm(release, axis=1, keepdims=True)).astype(np.float16)
    gram = gallery.astype(float) @ gallery.astype(float).T
    pairs = np.array([(i, j) for i, j in combinations(range(60), 2) if person[i] != person[j]])
    truth = np.stack(
        [score(a[pairs[:, 0]], a[pairs[:, 1]], gram[tuple(pairs.T)]) for a in release.astype(float) @ gallery.T]
    )
    monkeypatch.setattr(blends, "BLOCK_BYTES", 7 * 12 * 24 * 8)  # blocks of seven release images
    found = best_pairs(listed(release, gallery, 12), gallery, person, score=score, lowest=float(gram.min()))
    best = truth.max(axis=1)
    assert 5 < found.certified_Q.sum() < 40
    np.testing.assert_allclose(found.cosine_Q[found.certified_Q], best[found.certified_Q], rtol=1e-12)
    assert (found.cosine_Q <= best + 1e-12).all()
    for at in np.flatnonzero(found.certified_Q):
        assert sorted((found.first_Q[at], found.second_Q[at])) == pairs[truth[at].argmax()].tolist()
    everything = best_pairs(listed(release, gallery, 60), gallery, person, score=score)
    assert everything.certified_Q.all()
    np.testing.assert_allclose(everything.cosine_Q, best, rtol=1e-12)
    assert not best_pairs(listed(release, gallery, 12), gallery, person, score=score).certified_Q.any()


def test_two_photographs_of_one_person_are_no_pair() -> None:
    gallery = unit(np.random.default_rng(3), 3, 8).astype(np.float16)
    found = best_pairs(listed(gallery[:1], gallery, 2), gallery, np.zeros(3, np.int64))
    assert (found.first_Q, found.second_Q, found.cosine_Q) == (-1, -1, -np.inf)
    for fill in (np.nan, -np.inf):
        padded = Shortlist(np.array([[0, 1, 2, -1]]), np.array([[0.9, 0.1, 0.0, fill]]))
        for score in (mean_cosine, best_cosine):
            found = best_pairs(padded, gallery, np.arange(3), score=score, lowest=-0.9)
            assert found.certified_Q.tolist() == [True] and found.second_Q.min() >= 1
    assert best_pairs(Shortlist(np.array([[0]]), np.ones((1, 1))), gallery, np.arange(3)).first_Q.tolist() == [-1]


def test_a_short_list_is_certified_by_its_last_entry() -> None:
    """Filled up with -1, but not the whole gallery: what follows may be as near as the last one listed."""
    gallery = unit(np.random.default_rng(5), 6, 4).astype(np.float16)
    whole = listed(gallery[:1], gallery, 3)
    filled = Shortlist(
        np.pad(whole.rows_QK, ((0, 0), (0, 2)), constant_values=-1),
        np.pad(whole.cosines_QK, ((0, 0), (0, 2)), constant_values=-np.inf),
    )
    for lowest in np.linspace(-0.99, 0.99, 21):
        plain, short = (best_pairs(lists, gallery, np.arange(6), lowest=lowest) for lists in (whole, filled))
        assert plain == short


def test_competition_by_hand() -> None:
    ours = np.array([0.9, 0.8, 0.7, 0.1, 0.5, 0.4, 0.0, 0.3, -np.inf])
    decoys = np.array([0.1, 0.2, 0.3, 0.6, 0.2, 0.4, 0.0, 0.1, -np.inf])
    # By score: won .9, .8, .7, lost .6, won .5, a tie at .4, won .3: rates 1/1, 1/2, 1/3, 2/3, 2/4, 2/4, 2/5.
    expected = [1 / 3, 1 / 3, 1 / 3, 1.0, 0.4, 1.0, 1.0, 0.4, 1.0]
    np.testing.assert_allclose(competition(ours, decoys), expected)


def test_equal_scores_are_taken_together() -> None:
    np.testing.assert_allclose(competition(np.array([0.5, 0.1, 0.5]), np.array([0.1, 0.5, 0.1])), [1.0, 1.0, 1.0])


def trial(rng: np.random.Generator, controls: int = 150) -> tuple[float, float]:
    """False discovery proportion and power of one draw: a third of the release has a second source in the training."""
    width, training_n, half, blended = 32, 150, 90, 30
    training, control = unit(rng, training_n, width), unit(rng, controls, width)
    first, second = rng.integers(0, training_n, half), rng.integers(0, training_n, half)
    release = training[first] + 0.5 * unit(rng, half, width)  # one source, and nobody
    release[:blended] += training[second[:blended]]
    stored = [(v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float16) for v in (release, training, control)]
    release, training, control = stored
    lists = listed(release, training, 20), listed(release, control, 20)
    found = decoy_partners(*lists, training, control, np.arange(training_n), rng=rng, q=0.1).rejected_Q
    true = np.zeros(half, np.bool_)
    true[:blended] = first[:blended] != second[:blended]
    return (found & ~true).sum() / max(1, found.sum()), found[true].mean()


@pytest.mark.parametrize("controls", [150, 300])
def test_decoy_partners_keep_the_false_discovery_rate(controls: int) -> None:
    rng = np.random.default_rng(4)
    fdp, power = np.array([trial(rng, controls) for _ in range(60)]).T
    assert fdp.mean() <= 0.1 + 2.6 * fdp.std(ddof=1) / np.sqrt(60)
    assert power.mean() > 0.8


def test_partners_are_those_of_a_search_through_both_galleries() -> None:
    rng = np.random.default_rng(6)
    release, training, control = (unit(rng, n, 16).astype(np.float16) for n in (25, 40, 40))
    person = np.arange(40) // 2
    lists = listed(release, training, 40), listed(release, control, 40)
    found = decoy_partners(*lists, training, control, person, rng=rng)
    for at, face in enumerate(release.astype(float)):
        a, first = training.astype(float) @ face, lists[0].rows_QK[at, 0]
        gain = best_cosine(a[first], a, training.astype(float) @ training[first].astype(float)) - a[first]
        gain[person == person[first]] = -np.inf
        assert found.partner_Q[at] == gain.argmax() and found.gain_Q[at] == pytest.approx(gain.max(), abs=1e-12)
        rivals = lists[1].rows_QK[at, :38]  # as many as there are other training images
        b = control[rivals].astype(float) @ face
        gain = best_cosine(a[first], b, control[rivals].astype(float) @ training[first].astype(float)) - a[first]
        assert found.decoy_gain_Q[at] == pytest.approx(gain.max(), abs=1e-12)


def test_decoy_partners_need_lists() -> None:
    none = Shortlist(np.zeros((3, 0), np.int64), np.zeros((3, 0)))
    empty = np.zeros((0, 4), np.float16)
    with pytest.raises(ValueError, match=r"one neighbour or more. Got \(3, 0\)"):
        decoy_partners(none, none, empty, empty, np.zeros(0, np.int64), rng=np.random.default_rng(0))


def test_mmpmr_needs_both_sources() -> None:
    rate = mmpmr(np.array([[0.6, 0.5], [0.7, 0.3], [0.4, 0.4], [0.41, 0.9]]), 0.4)
    assert rate.value == 0.5
    assert (rate.low, rate.high) == pytest.approx((beta.ppf(0.025, 2, 3), beta.ppf(0.975, 3, 2)))
