from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.faults import IncompleteTable
from cluster.storage import Store
from operators.records import embeddings
from operators.tables import UNITS
from pipeline.repeats import filled, with_sources, without_copies

CONTRACT = embeddings(4)


def listed(name: str, digests: Sequence[str | None]) -> dict[str, object]:
    """A unit whose images are called after their unit and place."""
    members = [{"key": f"{name}{at}", "identity": f"of {name}", "digest": one} for at, one in enumerate(digests)]
    return {"set": "release", "uri": "-", "format": "folder", "unit": name, "first_row": 0, "members": members}


def units(**digests: Sequence[str | None]) -> pa.Table:
    return UNITS.from_rows([listed(name, own) for name, own in digests.items()])


def rows(unit: pa.Table, status: str = "ok") -> pa.Table:
    """Embedded rows of a listed unit, each saying in its error which bytes it is of."""
    members = unit["members"][0].as_py()
    return CONTRACT.from_rows(
        [{**{k: m[k] for k in ("key", "identity", "digest")}, "status": status, "error": m["digest"]} for m in members]
    )


def commit(store: Store, unit: pa.Table, status: str = "ok") -> None:
    name, made = unit["unit"][0].as_py(), rows(unit, status)
    store.commit(name, made, contract=CONTRACT.contract, key=name, facts={"status": {status: len(made)}})


def test_the_source_of_an_image_is_the_first_unit_that_lists_its_bytes() -> None:
    wanted = units(a="xyx", b=["y", None, "z"], c=["x", "z", "w", None], d="w")
    found = with_sources(wanted.slice(1), wanted, copies=True)["sources"].to_pylist()
    assert found == [
        [{"unit": "a", "digests": ["y"]}],
        [{"unit": "a", "digests": ["x"]}, {"unit": "b", "digests": ["z"]}],
        [{"unit": "c", "digests": ["w"]}],
    ]
    assert with_sources(wanted, wanted, copies=False)["sources"].to_pylist() == [[]] * 4


def test_a_unit_that_two_sets_list_is_no_source_of_itself() -> None:
    both = pa.concat_tables([units(a="xy"), units(a="xy", b="yq")]).combine_chunks()
    found = with_sources(both, both, copies=True)["sources"].to_pylist()
    assert found == [[], [], [{"unit": "a", "digests": ["y"]}]]


def test_images_are_left_out_once_their_source_is_in_every_store(tmp_path: Path) -> None:
    stores = [Store(tmp_path / "one"), Store(tmp_path / "two")]
    wanted = units(a="xy", b="pxqyp")
    unit = with_sources(wanted, wanted, copies=True).slice(1)

    def left() -> list[str]:
        return [member["key"] for member in without_copies(unit, stores)["members"][0].as_py()]

    assert left() == ["b0", "b1", "b2", "b3", "b4"]
    commit(stores[0], wanted.slice(0, 1))
    assert left() == ["b0", "b1", "b2", "b3", "b4"]
    commit(stores[1], wanted.slice(0, 1))
    assert left() == ["b0", "b2", "b4"]


@pytest.mark.parametrize("status", ["unreadable", "changed", "crashed", "timed_out"])
def test_nothing_is_taken_from_a_unit_with_rows_that_chance_made(tmp_path: Path, status: str) -> None:
    store, wanted = Store(tmp_path), units(a="x", b="x")
    commit(store, wanted.slice(0, 1), status)
    unit = with_sources(wanted, wanted, copies=True).slice(1)
    assert len(without_copies(unit, [store])["members"][0]) == 1


def test_filled_rows_are_those_of_the_bytes_under_the_names_of_the_unit(tmp_path: Path) -> None:
    """Every listed image has its row, in order, with its own key and identity; copies keep their number."""
    store, wanted = Store(tmp_path), units(a="xyz", b="w", c=["p", "x", "x", "w", "p", "y"])
    for at in range(2):
        commit(store, wanted.slice(at, 1))
    unit = with_sources(wanted, wanted, copies=True).slice(2)
    fresh = rows(without_copies(unit, [store]))
    assert fresh["key"].to_pylist() == ["c0", "c4"]
    made, several = filled(fresh, np.ones(2, int), unit, store)
    assert made.equals(rows(unit)) and several == {}


def test_a_copy_of_an_image_with_several_faces_has_them_all(tmp_path: Path) -> None:
    """`y` has three faces in its source and `p` two that were embedded now; a further face has no identity."""
    store, wanted = Store(tmp_path), units(a="xyz", b=["p", "y", "x", "p", "y"])
    known = CONTRACT.from_rows(
        [
            {"key": f"a{one}", "digest": "xyz"[int(one[0])], "status": "ok", "error": one}
            for one in ("0", "1", "1#2", "1#3", "2")
        ]
    )
    facts = {"status": {"ok": 5}, "faces": {"1": 3}}
    store.commit("a", known, contract=CONTRACT.contract, key="a", facts=facts)
    unit = with_sources(wanted, wanted, copies=True).slice(1)
    left = [member["key"] for member in without_copies(unit, [store])["members"][0].as_py()]
    assert left == ["b0", "b3"]
    fresh = CONTRACT.from_rows(
        [
            {"key": key, "identity": who, "digest": "p", "status": "ok", "error": f"p{face}"}
            for key, who, face in (("b0", "of b", 1), ("b0#2", None, 2), ("b3", "of b", 1), ("b3#2", None, 2))
        ]
    )
    made, several = filled(fresh, np.array([1, 2, 1, 2]), unit, store)
    assert made["key"].to_pylist() == ["b0", "b0#2", "b1", "b1#2", "b1#3", "b2", "b3", "b3#2", "b4", "b4#2", "b4#3"]
    assert made["error"].to_pylist() == ["p1", "p2", "1", "1#2", "1#3", "0", "p1", "p2", "1", "1#2", "1#3"]
    assert [who is None for who in made["identity"].to_pylist()] == ["#" in key for key in made["key"].to_pylist()]
    assert several == {"0": 2, "1": 3, "3": 2, "4": 3}


def test_a_source_that_is_gone_is_an_error(tmp_path: Path) -> None:
    store, wanted = Store(tmp_path), units(a="x", b="xp")
    unit = with_sources(wanted, wanted, copies=True).slice(1)
    with pytest.raises(IncompleteTable, match="not committed"):
        filled(rows(unit).slice(1), np.ones(1, int), unit, store)


def test_a_source_that_is_still_under_way_is_not_asked_for(tmp_path: Path) -> None:
    """One source of the unit is there and the other is not: the images of the other were embedded."""
    store, wanted = Store(tmp_path), units(a="xy", b="zw", c="xzq")
    commit(store, wanted.slice(0, 1))
    unit = with_sources(wanted, wanted, copies=True).slice(2).combine_chunks()
    left = without_copies(unit, [store])
    assert [member["digest"] for member in left["members"][0].as_py()] == ["z", "q"]
    made, several = filled(rows(left), np.ones(2, np.int64), unit, store)
    assert made["error"].to_pylist() == ["x", "z", "q"] and made["key"].to_pylist() == ["c0", "c1", "c2"]
    assert several == {}
