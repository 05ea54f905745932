import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import skew

from operators.hubs import HubConfig, k_occurrence, low_limit, remaining, screen, shared_hubs
from operators.vectors import exact_matrix, normalise

LISTS = Path(__file__).parents[3] / "shared" / "data" / "brf_top100"


@pytest.fixture(scope="module")
def lists() -> dict[str, list[tuple[str, float]]]:
    """Published closest pairs of 17 releases with CASIA-WebFace: (person, cosine) by release."""
    if not LISTS.is_dir():
        pytest.skip("the published lists are not on this machine")
    read = {path.name.split("_Top100")[0]: json.loads(path.read_text()) for path in LISTS.glob("*.json")}
    return {name: [(r["casia_identity"], r["similarity_score"]) for r in one["results"]] for name, one in read.items()}


def pairs(cosine_QG: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best pairs of every query, with those that tie with the k-th, in any order."""
    limit = np.sort(cosine_QG, axis=1)[:, -k][:, None]
    q, g = np.nonzero(cosine_QG >= limit)
    order = np.random.default_rng(0).permutation(len(q))
    return q[order], g[order], cosine_QG[q, g][order]


@pytest.mark.parametrize("k", [1, 5])
def test_occurrences_are_those_of_brute_force(k: int) -> None:
    rng = np.random.default_rng(0)
    queries, gallery = (normalise(rng.normal(0.4, 1, (n, 6)))[0] for n in (80, 120))
    cosine = exact_matrix(queries, gallery)
    expected = np.zeros(120, int)
    for row in cosine:
        expected[np.argsort(-row)[:k]] += 1
    found = k_occurrence(*pairs(cosine, k + 3), k, 120)
    assert found.count_G.tolist() == expected.tolist()
    assert (found.queries, found.expected) == (80, pytest.approx(80 * k / 120))
    assert found.skewness == pytest.approx(skew(expected))
    assert found.share().max() == pytest.approx(expected.max() / 80)


def test_all_that_tie_with_the_last_neighbour_count() -> None:
    query, gallery = np.array([0, 0, 0, 1]), np.array([3, 1, 2, 0])
    assert k_occurrence(query, gallery, np.array([0.5, 0.9, 0.5, 0.1]), 2, 5).count_G.tolist() == [1, 1, 1, 1, 0]
    assert k_occurrence(query, gallery, np.array([0.5, 0.9, 0.5, 0.1]), 1, 5).count_G.tolist() == [1, 1, 0, 0, 0]


def test_no_pairs_give_no_occurrences() -> None:
    none = np.zeros(0, np.int64)
    found = k_occurrence(none, none, np.zeros(0), 3, 4)
    assert (found.count_G.tolist(), found.queries, found.expected) == ([0, 0, 0, 0], 0, 0.0)
    assert np.isnan(found.skewness)
    assert not screen(found, {}, HubConfig()).flagged_N.any()


def test_hubs_and_poor_images_are_flagged_with_reasons() -> None:
    # 40 queries: gallery image 7 is near to all, the others take turns
    rng = np.random.default_rng(1)
    cosine = rng.uniform(0, 0.3, (40, 500))
    cosine[:, 7] = 0.9
    found = k_occurrence(*pairs(cosine, 10), 10, 500)
    sharpness = rng.normal(100, 5, 500)
    sharpness[[7, 9]] = 20
    sharpness[11] = np.nan
    screened = screen(found, {"sharpness": sharpness}, HubConfig(times=20, least=10))
    assert screened.limit == 20 * 0.8
    assert np.flatnonzero(screened.flagged_N).tolist() == [7, 9] == list(screened.reasons)
    assert screened.reasons[7][0] == "near to 40 of 40 release images (0.8 expected)"
    assert len(screened.reasons[7]) == 2
    assert screened.reasons[9][0].startswith("sharpness 20 is below ")


def test_screening_follows_the_images_whatever_their_order() -> None:
    """The rule is told no arm, and the same images in another order, so in other arms, have the same flags."""
    rng = np.random.default_rng(2)
    cosine = rng.uniform(0, 1, (60, 90)) * rng.lognormal(0, 0.6, 90)
    norm = rng.standard_t(2, 90)
    order = rng.permutation(90)
    config = HubConfig(k=5, times=3, least=5)
    one = screen(k_occurrence(*pairs(cosine, 5), 5, 90), {"norm": norm}, config)
    other = screen(k_occurrence(*pairs(cosine[:, order], 5), 5, 90), {"norm": norm[order]}, config)
    assert 0 < one.flagged_N.sum() < 90
    assert other.flagged_N.tolist() == one.flagged_N[order].tolist()


def test_the_low_limit_is_robust() -> None:
    values = np.random.default_rng(3).normal(10, 2, 20_001)
    values[:200] = -1e6
    assert low_limit(values, 3.0) == pytest.approx(10 - 3 * 2, abs=0.15)
    assert low_limit(np.ones(10), 3.0) == low_limit(np.full(3, np.nan), 3.0) == float("-inf")


def test_wrong_values_are_refused() -> None:
    found = k_occurrence(np.array([0]), np.array([0]), np.array([0.5]), 1, 3)
    with pytest.raises(ValueError, match=r"qualities must have one norm per gallery image \(3\). Got 2"):
        screen(found, {"norm": np.ones(2)}, HubConfig())
    with pytest.raises(ValueError, match="times must be 1 or more"):
        HubConfig(times=0.5)


def test_shared_hubs_are_persons_of_several_lists() -> None:
    given = {"a": ["x", "y", "x"], "b": ["y", "z"], "c": ["y", "z", "w"]}
    assert shared_hubs(given) == {"y": ["a", "b", "c"], "z": ["b", "c"]}
    assert shared_hubs(given, least=3) == {"y": ["a", "b", "c"]}


def test_releases_are_ranked_by_what_remains() -> None:
    ranked = remaining({"a": [("x", 0.9), ("y", 0.5)], "b": [("x", 0.8), ("z", 0.7)], "c": [("x", 0.99)]})
    assert [(r.name, r.pairs, r.kept) for r in ranked] == [("b", 2, 1), ("a", 2, 1), ("c", 1, 0)]
    assert ranked[0].best == 0.7
    assert np.isnan(ranked[2].best)


def test_shares_of_shared_hubs_in_published_lists(lists: dict[str, list[tuple[str, float]]]) -> None:
    """Numbers of a count made by other code (docs/method.md)."""
    hubs = shared_hubs({name: [person for person, _ in own] for name, own in lists.items()})
    share = {name: sum(person in hubs for person, _ in own) for name, own in lists.items()}
    known = {"GanDiffFace": 100, "DIGIFACE_1M_1": 99, "DCFace": 21, "Vec2Face": 3, "CemiFace": 0}
    assert {name: share[name] for name in known} == known


def test_a_rendered_release_does_not_outrank_a_trained_one(lists: dict[str, list[tuple[str, float]]]) -> None:
    """DigiFace-1M is rendered; DCFace was trained on the very set. Raw closest pairs say the opposite."""
    raw = {name: max(cosine for _, cosine in own) for name, own in lists.items()}
    assert raw["DIGIFACE_1M_1"] > raw["DCFace"]
    place = {one.name: number for number, one in enumerate(remaining(lists))}
    assert place["DCFace"] < place["DIGIFACE_1M_1"]
    assert {one for one in place if place[one] < 2} == {"CemiFace", "Vec2Face"}
