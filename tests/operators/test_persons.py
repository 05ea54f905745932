from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest

from operators import persons as module
from operators.persons import CONTROL, MEMBER, Duplicates, Persons, PersonsConfig, label_codes, persons
from operators.vectors import normalise


def pairs_of(*triples: tuple[int, int, float]) -> Duplicates:
    columns = list(zip(*triples, strict=True)) if triples else [(), (), ()]
    return Duplicates(np.array(columns[0], np.int64), np.array(columns[1], np.int64), np.array(columns[2], float))


def units(label: list[int], arm: list[int], pairs: Duplicates, **options: object) -> Persons:
    config = PersonsConfig(**{k: v for k, v in options.items() if k != "vectors"})  # type: ignore[arg-type]
    return persons(np.array(label), np.array(arm, np.int8), pairs, config, options.get("vectors"))  # type: ignore[arg-type]


def flood(label: list[int], arm: list[int], edges: list[tuple[int, int]]) -> list[set[int]]:
    """Components by brute force, in order of their lowest row."""
    group = [{row} for row in range(len(label))]
    same = [
        (i, j)
        for i, j in combinations(range(len(label)), 2)
        if label[i] >= 0 and (label[i], arm[i]) == (label[j], arm[j])
    ]
    for i, j in same + edges:
        whole = group[i] | group[j]
        for row in whole:
            group[row] = whole
    return sorted({frozenset(one): one for one in group}.values(), key=min)


def test_a_label_is_a_person_within_its_arm_only() -> None:
    found = units([0, 1, 0, 0, -1, -1], [0, 0, 0, 1, 0, 0], pairs_of())
    assert found.unit_N.tolist() == [0, 1, 0, 2, 3, 4]
    assert found.arm_U.tolist() == [MEMBER, MEMBER, CONTROL, MEMBER, MEMBER]
    assert found.images_U.tolist() == [2, 1, 1, 1, 1]
    assert (found.straddlers, found.several_labels, found.largest, found.broken) == (0, 0, 2, 0)


def test_close_images_join_labels_from_the_threshold_up() -> None:
    close = pairs_of((1, 2, 0.7), (3, 4, 0.6999))
    found = units([0, 0, 1, 1, 2], [0] * 5, close)
    assert found.unit_N.tolist() == [0, 0, 0, 0, 1]
    assert (found.labels_U.tolist(), found.several_labels) == ([2, 1], 1)
    assert units([0, 0, 1, 1, 2], [0] * 5, close, tau_dup=0.65).unit_N.tolist() == [0] * 5


def test_straddlers_leave_both_arms() -> None:
    found = units([0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1], pairs_of((4, 1, 0.9)))
    assert found.unit_N.tolist() == [-1, -1, 0, -1, -1, 1]
    assert found.straddler_N.tolist() == [0, 0, -1, 0, 0, -1]
    assert found.arm_U.tolist() == [MEMBER, CONTROL]
    assert found.straddlers == 1


def test_components_are_those_of_brute_force_for_any_order_of_pairs() -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        label = rng.integers(-1, 20, 60).tolist()
        arm = rng.integers(0, 2, 60).tolist()
        edges = [(int(i), int(j)) for i, j in rng.integers(0, 60, (12, 2)) if i != j]
        close = pairs_of(*((i, j, 0.8) for i, j in edges))
        expected = flood(label, arm, edges)
        found = units(label, arm, close, span=60)
        order = rng.permutation(len(edges))
        turned = Duplicates(close.right_P[order], close.left_P[order], close.cosine_P[order])
        assert units(label, arm, turned, span=60).unit_N.tolist() == found.unit_N.tolist()
        for number, part in enumerate([one for one in expected if len({arm[r] for r in one}) == 1]):
            assert set(np.flatnonzero(found.unit_N == number).tolist()) == part
        for number, part in enumerate([one for one in expected if len({arm[r] for r in one}) == 2]):
            assert set(np.flatnonzero(found.straddler_N == number).tolist()) == part
        assert ((found.unit_N >= 0) ^ (found.straddler_N >= 0)).all()
        assert found.images_U.sum() == (found.unit_N >= 0).sum()


def chain() -> tuple[list[int], np.ndarray, Duplicates]:
    """Twelve labels of three images, the last image of each showing the next label's person; labels 4 and 5 are one."""
    rng = np.random.default_rng(5)
    centre = np.eye(16)[:12]
    centre[5] = centre[4]
    label = np.repeat(np.arange(12), 3)
    shown = label.copy()
    shown[2::3] = np.minimum(label[2::3] + 1, 11)
    stored = normalise(centre[shown] + 0.05 * rng.standard_normal((36, 16)))[0]
    cosine = stored.astype(float) @ stored.astype(float).T
    i, j = np.nonzero(np.triu(cosine >= 0.7, 1) & (label[:, None] != label[None]))
    return label.tolist(), stored, Duplicates(i, j, cosine[i, j])


@pytest.mark.parametrize("block", [1, 5, 2048])
def test_a_chain_of_labels_is_cut_and_joined_again_by_centroids(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    label, stored, close = chain()
    found = units(label, [0] * 36, close, vectors=stored)
    centre = np.array([stored[k : k + 3].astype(float).mean(0) for k in range(0, 36, 3)])
    centre /= np.linalg.norm(centre, axis=1, keepdims=True)
    near = [(3 * i, 3 * j) for i, j in combinations(range(12), 2) if centre[i] @ centre[j] >= 0.7]
    assert near, "labels 4 and 5 at least"
    for number, part in enumerate(flood(label, [0] * 36, near)):
        assert set(np.flatnonzero(found.unit_N == number).tolist()) == part
    assert found.broken == 1
    asked = units(label, [0] * 36, close, vectors=lambda rows: stored[rows])
    assert asked.unit_N.tolist() == found.unit_N.tolist()


def test_without_the_guard_the_chain_is_one_person() -> None:
    label, _, close = chain()
    found = units(label, [0] * 36, close, span=12)
    assert (len(found.arm_U), found.labels_U.tolist(), found.broken) == (1, [12], 0)
    with pytest.raises(ValueError, match="vectors must be given: 1 components span more than 10 labels"):
        units(label, [0] * 36, close)


def test_many_images_of_one_unlabelled_person_are_no_chain() -> None:
    close = pairs_of(*((0, other, 0.9) for other in range(1, 30)))
    found = units([-1] * 31, [0] * 31, close)
    assert (found.images_U.tolist(), found.broken) == ([30, 1], 0)


def test_labels_become_numbers_and_missing_ones_none() -> None:
    assert label_codes(["b", None, "a", "b"]).tolist() == [0, -1, 1, 0]
    chunked = pa.chunked_array([["b", None], ["a", "b"]], pa.string())
    assert label_codes(chunked).tolist() == [0, -1, 1, 0]
    assert label_codes([]).tolist() == []


def test_nothing_gives_no_units() -> None:
    found = units([], [], Duplicates.none())
    assert (len(found.unit_N), len(found.arm_U), found.largest, found.several_labels) == (0, 0, 0, 0)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pairs must name rows 0 to 1\. Got 0 to 2"):
        units([0, 1], [0, 0], pairs_of((0, 1, 0.9), (2, 0, 0.9)))
    with pytest.raises(ValueError, match=r"arm_N must be 0 or 1. Got \[2\]"):
        units([0, 1], [0, 2], pairs_of())
    with pytest.raises(ValueError, match="arm_N must have one entry per label"):
        units([0, 1], [0], pairs_of())
    with pytest.raises(ValueError, match="tau_dup must lie in"):
        PersonsConfig(tau_dup=0.0)
    with pytest.raises(ValueError, match="span must be 1 or more"):
        PersonsConfig(span=0)
