import numpy as np
import pytest
from scipy.stats import chisquare, median_abs_deviation

from operators.errors import CapacityError
from operators.statistic import (
    anchored,
    cap_images,
    combined,
    image_hashes,
    match_groups,
    unit_best,
    unit_hashes,
)


def test_a_units_best_is_that_of_its_audited_images() -> None:
    unit = np.array([1, 0, 1, 0, 2, -1, 1])
    cosine = np.array([0.4, 0.2, 0.6, np.nan, np.nan, 0.9, 0.6])
    found = unit_best(unit, cosine, 4)
    np.testing.assert_array_equal(found.cosine_U, [0.2, 0.6, np.nan, np.nan])
    assert found.row_U.tolist() == [1, 2, -1, -1]  # of rows 2 and 6, which tie, the lower


def test_negative_cosines_are_kept() -> None:
    found = unit_best(np.array([0, 0]), np.array([-0.5, -0.3]), 1)
    assert (found.cosine_U.tolist(), found.row_U.tolist()) == ([-0.3], [1])


def test_the_statistic_is_the_difference_or_raw() -> None:
    release, anchor = np.array([0.7, np.nan, 0.5]), np.array([0.4, 0.3, np.nan])
    np.testing.assert_allclose(anchored(release, anchor), [0.3, np.nan, np.nan])
    raw = anchored(release, None)
    np.testing.assert_array_equal(raw, release)
    assert raw is not release


@pytest.mark.parametrize(("how", "join"), [("min", np.min), ("sum", np.sum)])
def test_models_are_combined_standardised(how: str, join: object) -> None:
    rng = np.random.default_rng(0)
    scores = [rng.normal(0.1, 0.02, 101), rng.normal(3, 5, 101)]
    scores[0][4], scores[1][7] = np.nan, np.nan
    known = ~np.isnan(scores[0] + scores[1])
    z = np.stack([(s[known] - np.median(s[known])) / median_abs_deviation(s[known]) for s in scores])
    found = combined(scores, how)  # type: ignore[arg-type]
    np.testing.assert_allclose(found[known], join(z, axis=0))  # type: ignore[operator]
    assert np.isnan(found[[4, 7]]).all()
    assert scores[0][0] < 1, "the inputs stay as they were"


def test_a_statistic_without_scale_cannot_be_combined() -> None:
    with pytest.raises(CapacityError, match="statistic of face model 2 has the same value for half"):
        combined([np.arange(5.0), np.array([0, 0, 0, 0, 1.0])], "min")
    with pytest.raises(ValueError, match="how must be min or sum"):
        combined([np.arange(5.0)], "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="statistics must hold"):
        combined([], "min")


def test_hashes_follow_key_and_seed_alone() -> None:
    keys = [f"person/{n}.jpg" for n in range(50)]
    first = image_hashes(keys, 1)
    assert first.dtype == np.uint64
    assert image_hashes(keys[::-1], 1).tolist() == first[::-1].tolist()
    assert not set(first.tolist()) & set(image_hashes(keys, 2).tolist())
    assert len(image_hashes([], 1)) == 0


def test_the_cap_keeps_the_same_images_in_any_order() -> None:
    rng = np.random.default_rng(1)
    keys = np.array([f"{n}.jpg" for n in range(200)])
    unit = rng.integers(-1, 20, 200)
    kept = cap_images(unit, image_hashes(keys.tolist(), 0), 5)
    counts = np.bincount(unit[unit >= 0], minlength=20)
    assert np.bincount(unit[kept], minlength=20).tolist() == np.minimum(counts, 5).tolist()
    assert not kept[unit < 0].any()
    order = rng.permutation(200)
    again = cap_images(unit[order], image_hashes(keys[order].tolist(), 0), 5)
    assert set(keys[order][again]) == set(keys[kept])
    other = cap_images(unit, image_hashes(keys.tolist(), 1), 5)
    assert set(keys[other]) != set(keys[kept])
    with pytest.raises(ValueError, match="k must be 1 or more"):
        cap_images(unit, image_hashes(keys.tolist(), 0), 0)


def test_the_cap_draws_every_image_equally_often() -> None:
    unit, keys = np.zeros(8, np.int64), [f"{n}" for n in range(8)]
    drawn = sum(cap_images(unit, image_hashes(keys, seed), 3).astype(int) for seed in range(800))
    assert chisquare(drawn).pvalue > 1e-3


def test_unit_hashes_do_not_favour_units_of_many_images() -> None:
    sizes = np.repeat([1, 30], 400)
    unit = np.repeat(np.arange(800), sizes)
    found = unit_hashes(unit, image_hashes([str(n) for n in range(len(unit))], 0), 800)
    half = found < np.uint64(2**63)
    assert abs(half[:400].mean() - 0.5) < 0.08
    assert abs(half[400:].mean() - 0.5) < 0.08
    assert len(set(found.tolist())) == 800


def test_matching_gives_every_group_the_same_proportion() -> None:
    rng = np.random.default_rng(2)
    group = np.concatenate([np.repeat([0, 1, 2, -1], [400, 100, 50, 10]), np.repeat([0, 1, 3], [100, 200, 40])])
    arm = np.repeat([0, 1], [560, 340]).astype(np.int8)
    kept = match_groups(group, arm, rng.integers(0, 2**63, 900).astype(np.uint64))
    members = {g: int((kept & (arm == 0) & (group == g)).sum()) for g in (-1, 0, 1, 2, 3)}
    controls = {g: int((kept & (arm == 1) & (group == g)).sum()) for g in (-1, 0, 1, 2, 3)}
    # 560 members to 340 controls: 1.647 members per control; 400 to 100 keeps 164 : 100, 100 to 200 keeps 98 or so : 60
    assert members == {-1: 0, 0: 164, 1: 98, 2: 0, 3: 0}
    assert controls == {-1: 0, 0: 100, 1: 60, 2: 0, 3: 0}


def test_matching_depends_on_hashes_and_not_on_order() -> None:
    rng = np.random.default_rng(4)
    group, arm = rng.integers(0, 3, 300), (rng.random(300) < 0.4).astype(np.int8)
    hashes = rng.permutation(300).astype(np.uint64)
    kept = match_groups(group, arm, hashes)
    order = rng.permutation(300)
    assert match_groups(group[order], arm[order], hashes[order]).tolist() == kept[order].tolist()
    for g in range(3):
        for a in (0, 1):
            cell = (group == g) & (arm == a)
            assert sorted(hashes[cell])[: kept[cell].sum()] == sorted(hashes[cell & kept]), "the lowest hashes stay"
    ratio = [(kept & (group == g) & (arm == 0)).sum() / (kept & (group == g) & (arm == 1)).sum() for g in range(3)]
    assert max(ratio) - min(ratio) < 0.1


def test_matching_keeps_everything_where_nothing_differs() -> None:
    group, arm = np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.repeat([0, 1], 4).astype(np.int8)
    assert match_groups(group, arm, np.arange(8, dtype=np.uint64)).all()
    assert not match_groups(group[:4], arm[:4], np.arange(4, dtype=np.uint64)).any(), "no controls, no match"
