import numpy as np
import pytest

from operators.conformal import q_values
from operators.membership import auc
from operators.persons import CONTROL, MEMBER, PersonsConfig, persons
from operators.simulation import FLOOR, QS, WorldConfig, audit, draw
from operators.statistic import anchored, unit_best
from operators.vectors import exact_matrix

SMALL = {"members": 60, "controls": 40, "identities": 20, "per_identity": 3}


def test_a_world_is_its_seed() -> None:
    config = WorldConfig(**SMALL, leak=0.1)
    one, same, other = draw(config, (1, 2)), draw(config, (1, 2)), draw(config, (1, 3))
    for name in ("label_N", "arm_N", "vectors_ND", "release_N", "anchor_N", "leaked_N", "group_N"):
        assert getattr(one, name).tobytes() == getattr(same, name).tobytes()
    assert one.release_N.tobytes() != other.release_N.tobytes()


def test_pairs_are_all_close_pairs() -> None:
    world = draw(WorldConfig(**SMALL), (0,))
    cosine = exact_matrix(world.vectors_ND, world.vectors_ND)
    i, j = np.nonzero(np.triu(cosine >= FLOOR, 1))
    assert set(zip(world.pairs.left_P.tolist(), world.pairs.right_P.tolist(), strict=True)) == set(
        zip(i.tolist(), j.tolist(), strict=True)
    )
    np.testing.assert_allclose(np.sort(world.pairs.cosine_P), np.sort(cosine[i, j]), atol=1e-6)


def test_images_show_persons_and_leaks_are_near() -> None:
    world = draw(WorldConfig(**(SMALL | {"images": (4, 2)}), leak=0.2, likeness=(0.9, 0.9)), (5,))
    counts = np.bincount(world.label_N)
    assert counts[:60].tolist() == [4] * 60
    assert counts[60:].tolist() == [2] * 40
    cosine = exact_matrix(world.vectors_ND, world.vectors_ND)
    same = (world.label_N[:, None] == world.label_N[None]) & ~np.eye(len(cosine), dtype=bool)
    assert 0.6 < cosine[same].mean() < 0.8
    assert cosine[world.label_N[:, None] != world.label_N[None]].mean() < 0.2
    assert len(np.unique(world.label_N[world.leaked_N])) == 12
    assert (world.arm_N[world.leaked_N] == MEMBER).all()
    assert world.release_N[world.leaked_N].mean() > world.release_N[~world.leaked_N].mean() + 0.15
    assert abs(world.anchor_N[world.leaked_N].mean() - world.anchor_N[~world.leaked_N].mean()) < 0.05


def test_without_its_copies_the_world_is_the_same() -> None:
    copies, clean = (draw(WorldConfig(**SMALL, copies=count), (3,)) for count in (10, 0))
    assert copies.vectors_ND.tobytes() == clean.vectors_ND.tobytes()
    assert copies.anchor_N.tobytes() == clean.anchor_N.tobytes()
    assert (copies.release_N >= clean.release_N - 1e-6).all()  # fp32 products of another shape
    assert (copies.release_N > 0.85).sum() >= 10 > (clean.release_N > 0.85).sum() == 0
    assert len(np.unique(copies.label_N[copies.leaked_N])) == 10
    assert not clean.leaked_N.any()


def test_persons_under_two_labels_and_in_both_arms_are_there_to_be_found() -> None:
    noisy = draw(WorldConfig(**SMALL, label_noise=0.5), (1,))
    assert len(np.unique(noisy.label_N)) == 100 + 30
    assert audit(noisy, chosen=PersonsConfig(tau_dup=0.65)).several_labels > 15
    shared = draw(WorldConfig(**SMALL, shared=0.5, leak=0.3), (1,))
    assert audit(shared, chosen=PersonsConfig(tau_dup=0.65)).straddlers > 10
    assert shared.leaked_N[(shared.arm_N == CONTROL) & (shared.label_N < 80)].any()


def test_the_audit_is_the_products_own_path() -> None:
    """The same figures from the public functions, called one by one, with q-values in the place of the list."""
    world = draw(WorldConfig(members=300, controls=300, identities=200, leak=0.2, likeness=(0.7, 0.9)), (8,))
    found = audit(world)
    units = persons(world.label_N, world.arm_N, world.pairs, PersonsConfig(), world.vectors_ND)
    count = len(units.arm_U)
    best = [unit_best(units.unit_N, column, count).cosine_U for column in (world.release_N, world.anchor_N)]
    score = anchored(best[0], best[1])
    leaked = np.zeros(count, bool)
    leaked[units.unit_N[world.leaked_N]] = True
    member = units.arm_U == MEMBER
    listed = [q_values(score[member], score[~member]) <= q for q in QS]
    assert found.discoveries == tuple(mask.sum() for mask in listed)
    assert found.discoveries[1] > 20
    assert found.power == tuple(pytest.approx(mask[leaked[member]].mean()) for mask in listed)
    false = [(mask & ~leaked[member]).sum() / max(1, mask.sum()) for mask in listed]
    assert found.false_share == tuple(pytest.approx(value) for value in false)
    assert found.excess_p < 1e-6
    assert found.auc > 0.55
    assert audit(world, raw=True).auc == auc(best[0][member], best[0][~member])


def test_repairs_change_what_is_audited() -> None:
    dense, sparse = (0.1, 0.2, 0.3, 0.4), (0.4, 0.3, 0.2, 0.1)
    even = (0.25,) * 4
    world = draw(
        WorldConfig(members=300, controls=300, identities=100, mixes=(dense, sparse, even, even), images=(4, 2)), (2,)
    )
    plain, capped, matched = audit(world, raw=True), audit(world, raw=True, cap=2), audit(world, raw=True, match=True)
    assert plain.gated.distance > capped.gated.distance
    assert matched.gated.members + matched.gated.controls < plain.gated.members + plain.gated.controls


def test_impossible_worlds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"leak must lie in \[0, 1\]"):
        WorldConfig(leak=2.0)
    with pytest.raises(ValueError, match=r"identities must be at least the leaked persons\. Got 10"):
        WorldConfig(leak=0.5, identities=10)
