"""The controlled audit against plain loops over persons, and on worlds where the answer is known."""

from dataclasses import replace

import numpy as np
import pytest

from operators.controlled import EvidenceConfig, Images, Matches, controlled, people, sensitivity
from operators.persons import CONTROL, MEMBER, Duplicates
from operators.statistic import image_hashes


def world(members: int = 120, controls: int = 150, leaked: int = 0, seed: int = 0, shots: tuple[int, int] = (1, 5)):
    """Persons of both arms whose best cosines are drawn alike; `leaked` members come closer to the release."""
    rng = np.random.default_rng(seed)
    images = rng.integers(*shots, members + controls)
    person_N = np.repeat(np.arange(members + controls), images)
    arm_N = np.where(person_N < members, MEMBER, CONTROL).astype(np.int8)
    near_N = rng.normal(0.4, 0.05, len(person_N)) + np.where(person_N < leaked, 0.4, 0.0)
    label_N = np.where(arm_N == MEMBER, person_N, person_N - members)
    hashes = image_hashes([f"{at}.jpg" for at in range(len(person_N))], 0)
    anchors = [rng.normal(0.4, 0.05, len(person_N)) for _ in range(2)]
    return person_N, Images(label_N, arm_N, hashes, None, [Matches(near_N, *anchors)])


def by_hand(person_N: np.ndarray, images: Images) -> dict[int, float]:
    near_N, anchor_N = images.matches[0].release_N, images.matches[0].anchor_N
    return {
        person: max(near_N[person_N == person]) - max(anchor_N[person_N == person])
        for person in np.unique(person_N).tolist()
    }


CONFIG = EvidenceConfig(source="hold_out", neutral=True)


def test_the_statistic_is_the_persons_best_match_less_the_best_with_the_anchor_set() -> None:
    person_N, images = world()
    found = people(images, Duplicates.none(), CONFIG)
    expected = by_hand(person_N, images)
    assert found.persons.unit_N.tolist() == person_N.tolist()
    np.testing.assert_array_equal(found.statistic_U, [expected[person] for person in sorted(expected)])
    assert found.eligible_U.all()
    for unit, row in enumerate(found.best.row_U.tolist()):
        assert images.matches[0].release_N[row] == max(images.matches[0].release_N[person_N == unit])


def test_images_that_were_not_audited_do_not_count_and_persons_without_any_take_no_part() -> None:
    person_N, images = world()
    images.matches[0].release_N[person_N == 3] = np.nan
    several = int(np.flatnonzero(np.bincount(person_N) > 2)[0])
    assert several < 120
    images.matches[0].release_N[np.flatnonzero(person_N == several)[0]] = np.nan
    found = people(images, Duplicates.none(), CONFIG)
    assert np.isnan(found.statistic_U[3])
    assert not found.eligible_U[3]
    assert len(found.scores(MEMBER)) == 119
    assert len(controlled(found, CONFIG).p_U[~np.isnan(controlled(found, CONFIG).p_U)]) == 119


def test_p_and_q_values_are_those_of_plain_counting() -> None:
    person_N, images = world(leaked=25)
    made = controlled(people(images, Duplicates.none(), CONFIG), CONFIG)
    statistic = by_hand(person_N, images)
    controls = [statistic[person] for person in range(120, 270)]
    for person in range(120):
        over = sum(control >= statistic[person] for control in controls)
        assert made.p_U[person] == pytest.approx((1 + over) / 151, abs=1e-15)
    assert np.isnan(made.p_U[120:]).all()
    listed = np.flatnonzero(made.q_U <= 0.05)
    assert set(range(25)) <= set(listed.tolist())
    assert (made.verdict.grade, made.verdict.claim) == ("A", True)
    assert made.excesses[0].member_hits >= 25
    assert made.excesses[0].p < 1e-6


def test_a_person_in_both_arms_leaves_both() -> None:
    person_N, images = world()
    left, right = np.flatnonzero(person_N == 0)[:1], np.flatnonzero(person_N == 130)[:1]
    found = people(images, Duplicates(left, right, np.array([0.9])), CONFIG)
    assert found.persons.straddlers == 1
    assert (found.persons.unit_N[np.isin(person_N, (0, 130))] == -1).all()
    assert (len(found.scores(MEMBER)), len(found.scores(CONTROL))) == (119, 149)


def test_arms_with_different_numbers_of_images_are_capped_alike() -> None:
    _, images = world(controls=400, members=400)
    more = np.concatenate([np.flatnonzero(images.arm_N == MEMBER)] * 6 + [np.flatnonzero(images.arm_N == CONTROL)])
    hashes = image_hashes([f"{at}.jpg" for at in range(len(more))], 1)
    matches = Matches(*(column[more] for column in images.matches[0]))
    found = people(Images(images.label_N[more], images.arm_N[more], hashes, None, [matches]), Duplicates.none(), CONFIG)
    assert found.capped
    counts = np.bincount(found.persons.unit_N[found.counted_N])
    assert counts.max() == CONFIG.cap
    assert people(images, Duplicates.none(), CONFIG).capped is False


def test_groups_are_matched_and_their_names_kept() -> None:
    person_N, images = world()
    group_N = np.where(person_N < 120, person_N % 3 == 0, person_N % 2 == 0).astype(np.int64)
    found = people(images._replace(group_N=group_N), Duplicates.none(), CONFIG)
    shares = [found.group_U[found.eligible_U & (found.persons.arm_U == arm)].mean() for arm in (MEMBER, CONTROL)]
    assert shares[0] == pytest.approx(shares[1], abs=0.02)
    assert 0 < found.eligible_U.sum() < len(found.eligible_U)


def test_two_models_are_combined_before_calibration() -> None:
    _, images = world(leaked=25)
    _, other = world(leaked=25, seed=0)
    second = other.matches[0]._replace(release_N=np.random.default_rng(9).permutation(other.matches[0].release_N))
    alone = controlled(people(images, Duplicates.none(), CONFIG), CONFIG)
    both = people(images._replace(matches=[images.matches[0], second]), Duplicates.none(), CONFIG)
    assert len(both.per_model_U) == 2
    np.testing.assert_array_equal(both.per_model_U[0], alone.people.statistic_U)
    assert (controlled(both, CONFIG).q_U <= 0.05).sum() < (alone.q_U <= 0.05).sum()


def test_the_placebo_is_the_same_audit_with_a_second_anchor_set_in_the_place_of_the_release() -> None:
    person_N, images = world(leaked=25)
    clean = controlled(people(images, Duplicates.none(), CONFIG), CONFIG)
    assert clean.placebo is not None
    assert clean.placebo.passed
    tilted = images.matches[0].placebo_N + np.where(person_N < 60, 0.3, 0.0)
    fooled = images._replace(matches=[images.matches[0]._replace(placebo_N=tilted)])
    made = controlled(people(fooled, Duplicates.none(), CONFIG), CONFIG)
    assert not made.placebo.passed
    assert not made.verdict.claim


def test_without_a_leak_lists_are_empty_nearly_always() -> None:
    """At q = 0.05 the chance of any list is at most 5 % for each of 60 worlds; 8 or more have a chance below 1 %."""
    lists = 0
    for seed in range(60):
        _, images = world(60, 90, seed=seed)
        lists += int((controlled(people(images, Duplicates.none(), CONFIG), CONFIG).q_U <= 0.05).any())
    assert lists < 8


def test_sensitivity_changes_one_option_at_a_time() -> None:
    person_N, images = world(leaked=25)
    pairs = Duplicates(np.flatnonzero(person_N == 0)[:1], np.flatnonzero(person_N == 1)[:1], np.array([0.72]))
    looks = sensitivity(images, pairs, CONFIG)
    assert [look.what for look in looks] == [
        "without the anchor set", "one person from cosine 0.65", "one person from cosine 0.75"
    ]  # fmt: skip
    raw = images._replace(matches=[images.matches[0]._replace(anchor_N=None)])
    again = controlled(people(raw, pairs, CONFIG), CONFIG)
    assert looks[0].listed == (again.q_U <= 0.05).sum()
    assert looks[0].p == again.excesses[0].p
    units = [
        people(images, pairs, replace(CONFIG, persons=replace(CONFIG.persons, tau_dup=tau))) for tau in (0.65, 0.75)
    ]
    assert [len(one.scores(MEMBER)) for one in units] == [119, 120]


@pytest.mark.parametrize(
    ("option", "value"), [("q", 0), ("alphas", []), ("source", "x"), ("combine", "max"), ("cap", 0), ("alphas", [1.0])]
)
def test_options_that_mean_nothing_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        EvidenceConfig(**{option: value})
