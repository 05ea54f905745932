"""The cut of sets into pieces: whole units, kept over the history of a set, and named by content alone."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.faults import IncompleteTable
from operators.results import Places
from pipeline.layout import Comparison, Grid, keep_layout, lay_out, units_of
from pipeline.pieces import Piece, Segment, Unit, pieces
from pipeline.stage import Run

Plant = Callable[..., Run]
COMPARISON = Comparison(queries="release", gallery=("training",), k=5, columns=2, floor=0.4)


def units(sizes: dict[str, int]) -> list[Unit]:
    """Units in row order, named by their content."""
    firsts = np.cumsum([0, *sizes.values()]).tolist()
    return [
        Unit(name=f"unit {content}", content=content, first_row=first, images=size, audited=size)
        for (content, size), first in zip(sizes.items(), firsts, strict=False)
    ]


def cut(sizes: dict[str, int], images: int, earlier: list[tuple[str, ...]] | None = None) -> list[tuple[str, ...]]:
    kept = [tuple(map(Segment, contents)) for contents in earlier or []]
    return [piece.content for piece in pieces("training", units(sizes), images, kept)]


def test_pieces_are_whole_units_in_row_order_and_a_large_unit_stands_alone() -> None:
    sizes = {"a": 3, "b": 4, "c": 5, "d": 20, "e": 1, "f": 1}
    assert cut(sizes, 8) == [("a", "b"), ("c",), ("d",), ("e", "f")]
    made = pieces("training", units(sizes), 8)
    assert [unit.first_row for piece in made for unit in piece.units] == [0, 3, 7, 12, 32, 33]
    assert {piece.role for piece in made} == {"training"}


def test_no_units_are_no_pieces() -> None:
    assert cut({}, 8) == [] and cut({}, 8, [("a",)]) == []


def test_an_added_unit_leaves_the_earlier_pieces_as_they_are_wherever_it_stands() -> None:
    earlier = cut({"a": 3, "b": 4, "c": 5, "d": 2}, 8)
    assert earlier == [("a", "b"), ("c", "d")]
    assert cut({"new": 1, "a": 3, "b": 4, "c": 5, "d": 2}, 8, earlier) == [("new",), *earlier]
    assert cut({"a": 3, "new": 1, "b": 4, "c": 5, "d": 2}, 8, earlier) == [("a", "b"), ("new",), ("c", "d")]
    assert cut({"a": 3, "b": 4, "c": 5, "d": 2, "new": 1}, 8, earlier) == [*earlier, ("new",)]


def test_a_piece_that_lost_a_unit_or_whose_unit_changed_is_cut_anew_and_the_others_stay() -> None:
    earlier = cut({"a": 3, "b": 4, "c": 5, "d": 2, "e": 8}, 8)
    assert cut({"a": 3, "c": 5, "d": 2, "e": 8}, 8, earlier) == [("a",), ("c", "d"), ("e",)]
    assert cut({"a": 3, "b2": 4, "c": 5, "d": 2, "e": 8}, 8, earlier) == [("a", "b2"), ("c", "d"), ("e",)]


def test_a_piece_whose_units_stand_in_another_order_is_cut_anew() -> None:
    """Ties go to the lower place in the piece, which must be the lower row."""
    earlier = cut({"a": 3, "b": 4, "c": 5}, 8)
    assert cut({"b": 4, "a": 3, "c": 5}, 8, earlier) == [("b", "a"), ("c",)]


def test_new_units_do_not_fill_up_an_earlier_piece() -> None:
    assert cut({"a": 1, "b": 1, "c": 1}, 8, [("a",)]) == [("a",), ("b", "c")]


HISTORIES = st.lists(st.lists(st.sampled_from("abcdefghijkl"), unique=True), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=12, max_size=12), history=HISTORIES, images=st.integers(1, 30))
def test_over_any_history_each_unit_is_in_one_piece_and_pieces_live_as_long_as_their_units(
    sizes: list[int], history: list[list[str]], images: int
) -> None:
    size_of = dict(zip("abcdefghijkl", sizes, strict=True))
    earlier: list[tuple[str, ...]] = []
    for listed in history:
        made = cut({content: size_of[content] for content in listed}, images, earlier)
        assert sorted(content for piece in made for content in piece) == sorted(listed)
        place = {content: at for at, content in enumerate(listed)}
        for piece in made:
            assert [place[content] for content in piece] == sorted(place[content] for content in piece)
            assert len(piece) == 1 or sum(size_of[content] for content in piece) <= images
        assert [place[piece[0]] for piece in made] == sorted(place[piece[0]] for piece in made)
        alive = [piece for piece in earlier if all(content in place for content in piece)]
        in_order = [piece for piece in alive if all(place[one] < place[two] for one, two in pairwise(piece))]
        assert set(in_order) <= set(made)
        earlier = made


def test_a_piece_is_named_by_content_and_sizes_and_not_by_where_it_stands() -> None:
    own = units({"a": 3, "b": 4})
    moved = [replace(unit, first_row=unit.first_row + 10, name=f"{unit.name}?") for unit in own]
    piece = Piece(role="training", units=tuple(own))
    assert piece.name == Piece(role="control", units=tuple(moved)).name
    others = [own[::-1], own[:1], [own[0], replace(own[1], content="c")], [own[0], replace(own[1], images=5)]]
    names = {Piece(role="training", units=tuple(other)).name for other in others}
    assert len(names) == 4 and piece.name not in names


def test_a_piece_knows_where_its_units_stand_and_how_many_images_take_part() -> None:
    a, b, c = units({"a": 3, "b": 4, "c": 2})
    piece = Piece(role="training", units=(a, replace(c, audited=1)))
    assert piece.audited == 4 and piece.content == ("a", "c")
    assert isinstance(piece.places, Places)
    assert piece.places.rows(np.array([0, 2, 3, 4])).tolist() == [0, 2, 7, 8]
    assert b.first_row == 3


def grid(comparison: Comparison = COMPARISON, counts: str = "tail", **sizes: int) -> Grid:
    blocks = pieces("release", units({"x": 2, "y": 3}), 2)
    shards = pieces("training", units(sizes or {"a": 3, "b": 4}), 4)
    return Grid(comparison=comparison, blocks=blocks, shards=shards, counts=counts)


def test_tiles_are_all_blocks_against_all_shards_each_under_its_own_name() -> None:
    tiles = list(grid().tiles())
    assert [(block.content, shard.content) for _, block, shard in tiles] == [
        (("x",), ("a",)), (("x",), ("b",)), (("y",), ("a",)), (("y",), ("b",)),
    ]  # fmt: skip
    assert len({key for key, _, _ in tiles}) == 4


@pytest.mark.parametrize(
    "change", [{"k": 6}, {"columns": 3}, {"floor": 0.5}, {"counts": "all"}, {"a": 3, "b": 5}, {"a": 3, "c": 4}]
)
def test_a_tile_of_other_vectors_or_options_has_another_name(change: dict[str, Any]) -> None:
    options = {name: value for name, value in change.items() if name in ("k", "columns", "floor")}
    other = grid(
        replace(COMPARISON, **options),
        change.get("counts", "tail"),
        **{name: value for name, value in change.items() if name in "abc"},
    )
    one, two = grid(), other
    assert one.key(one.blocks[0], one.shards[1]) != two.key(two.blocks[0], two.shards[1])


def test_a_tile_of_the_same_vectors_has_the_same_name_in_whatever_sets_they_are() -> None:
    one, two = grid(), grid(replace(COMPARISON, gallery=("control", "training")))
    shard = replace(two.shards[0], role="control")
    assert one.key(one.blocks[0], one.shards[0]) == two.key(two.blocks[0], shard)


def test_a_set_against_itself_keeps_one_more_neighbour_and_no_columns() -> None:
    within = replace(COMPARISON, queries="training")
    assert within.within and within.title == "within-training" and within.kept == (6, 0, 0.4)
    assert not COMPARISON.within and COMPARISON.title == "coverage" and COMPARISON.kept == (5, 2, 0.4)


def contents(run: Run) -> tuple[list[tuple[str, ...]], list[tuple[str, tuple[str, ...]]]]:
    comparison = replace(COMPARISON, gallery=("training", "control", "anchor"))
    made = lay_out(run, comparison)
    keep_layout(run, made)
    return [piece.content for piece in made.blocks], [(piece.role, piece.content) for piece in made.shards]


def test_the_cut_of_the_last_search_is_kept_on_disk_as_long_as_the_sizes_are(plant: Plant, planted: Any) -> None:
    sizes = ("search.block_images=30", "search.shard_images=34")
    old_blocks, old_shards = contents(plant(*sizes, sets=planted.without(release=2, training=1)))
    run = plant(*sizes)
    blocks, shards = contents(run)
    assert set(old_blocks) < set(blocks) and set(old_shards) < set(shards)
    assert blocks != contents(plant(*sizes, name="fresh"))[0]
    assert contents(run) == (blocks, shards)
    assert sorted(one for block in blocks for one in block) == sorted(u.content for u in units_of(run, "release"))
    other = ("search.block_images=31", "search.shard_images=34")
    assert contents(plant(*other)) == contents(plant(*other, name="fresh too"))


def test_units_are_those_of_the_set_in_row_order_with_what_is_stored(plant: Plant, planted: Any) -> None:
    run = plant()
    for role, own in planted.units.items():
        found = units_of(run, role)
        assert [range(unit.first_row, unit.first_row + unit.images) for unit in found] == planted.rows(role)
        assert [unit.audited for unit in found] == [int((~unit.failed).sum()) for unit in own]
        assert len({unit.content for unit in found}) == len(found)


def test_other_vectors_under_the_same_name_are_another_unit(plant: Plant, planted: Any) -> None:
    before = units_of(plant(), "training")
    after = units_of(plant(sets=planted.replaced("training", 2)), "training")
    assert [one.content != two.content for one, two in zip(before, after, strict=True)] == [False, False, True] + [
        False
    ] * 2


def test_a_set_that_is_not_embedded_is_refused(plant: Plant) -> None:
    run = plant()
    store = run.embeddings
    marker = next(store.root.rglob(f"{units_of(run, 'control')[2].name}.commit.json"))
    marker.unlink()
    with pytest.raises(IncompleteTable, match=r"unit \w+ is not embedded\. Run `unveil embed` again"):
        lay_out(run, replace(COMPARISON, gallery=("control",)))
