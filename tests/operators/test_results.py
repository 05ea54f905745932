"""Tiles as tables, and results put together in the row numbers of the sets."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import results
from operators.neighbors import EMPTY, Scored, Tile, merged
from operators.results import Lists, Places
from operators.tables import TILES, WITHIN_NEIGHBOURS, WITHIN_PAIRS


def scored(*pairs: tuple[int, int, float]) -> Scored:
    left, right, cosine = zip(*pairs, strict=True) if pairs else ((), (), ())
    return Scored(np.array(left, np.int64), np.array(right, np.int64), np.array(cosine, np.float64))


def listed(own: Scored) -> list[tuple[int, int, float]]:
    return list(zip(*(part.tolist() for part in own), strict=True))


def drawn(rng: np.random.Generator, count: int, rows: int = 9, columns: int = 40) -> Scored:
    """Random pairs, each at most once, with many ties."""
    flat = rng.choice(rows * columns, count, replace=False)
    return Scored(flat // columns, flat % columns, np.round(np.cos(flat * 7.0), 1))


@pytest.mark.parametrize("empty", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_a_tile_comes_back_from_its_table_as_it_was(empty: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    tile = Tile(*(EMPTY if at in empty else drawn(rng, 20 + at) for at in range(3)))
    table = results.tile_table(tile)
    assert table.schema.equals(TILES.schema) and len(table) == sum(len(part.cosine) for part in tile)
    back = results.tile_of(table)
    for left, right in zip(tile, back, strict=True):
        assert listed(left) == listed(right)
        assert [part.dtype for part in right] == [np.int64, np.int64, np.float64]


def test_a_tile_table_that_arrives_in_chunks_is_the_same_tile() -> None:
    rng = np.random.default_rng(2)
    tile = Tile(*(drawn(rng, 30) for _ in range(3)))
    table = results.tile_table(tile)
    chunks = pa.concat_tables([table.slice(0, 17), table.slice(17)])
    assert [listed(part) for part in results.tile_of(chunks)] == [listed(part) for part in tile]


def test_cosines_keep_their_bits_in_a_tile_table() -> None:
    values = [1.0, np.nextafter(1.0, 0), 2.0**-48, -0.0, -1 / 3]
    tile = Tile(scored(*((0, at, value) for at, value in enumerate(values))), EMPTY, EMPTY)
    back = results.tile_of(results.tile_table(tile)).nearest.cosine
    assert back.tobytes() == np.array(values).tobytes()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=6), st.randoms())
def test_places_become_the_rows_that_a_loop_over_the_units_gives(units: list[tuple[int, int]], random: object) -> None:
    """Units of given sizes, with gaps of rows before them that belong to other pieces."""
    row_of, offsets, firsts, row = [], [], [], 0
    for size, gap in units:
        row += gap
        offsets.append(len(row_of))
        firsts.append(row)
        row_of += range(row, row + size)
        row += size
    places = Places(np.array(offsets), np.array(firsts))
    at = np.array([random.randrange(len(row_of)) for _ in range(20)])
    assert places.rows(at).tolist() == [row_of[one] for one in at.tolist()]
    pairs = Scored(at, at[::-1], np.linspace(1, -1, 20))
    moved = results.placed(pairs, places, Places(np.array([0]), np.array([100])))
    expected = [(row_of[left], 100 + right, cosine) for left, right, cosine in listed(pairs)]
    assert listed(moved) == expected


def test_places_of_no_pairs_are_no_rows() -> None:
    none = results.placed(EMPTY, Places(np.array([0]), np.array([7])), Places(np.array([0, 2]), np.array([3, 9])))
    assert listed(none) == []


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_lists_are_the_same_in_whatever_order_and_however_often_tiles_come(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    whole = drawn(rng, 120)
    tiles = [whole.take(np.flatnonzero(whole.gallery // 10 == part)) for part in range(4)]
    expected = []
    for row in range(9):
        own = [pair for pair in listed(whole) if pair[0] == row]
        expected += sorted(own, key=lambda pair: (-pair[2], pair[1]))[:k]
    for _ in range(3):
        again = [tiles[at] for at in rng.permutation(8) % 4]
        lists = Lists(k)
        for one in again:
            lists.add(one)
        assert listed(lists.held) == expected
    first, second = Lists(k), Lists(k)
    for lists, own in ((first, tiles[:2]), (second, tiles[2:])):
        for one in own:
            lists.add(one)
    first.add(second.held)
    assert listed(first.held) == expected


def test_lists_of_nothing_are_empty_and_nothing_changes_them() -> None:
    lists = Lists(3)
    lists.add(EMPTY)
    assert listed(lists.held) == []
    lists.add(scored((1, 2, 0.5)))
    lists.add(EMPTY)
    assert listed(lists.held) == [(1, 2, 0.5)]


def test_results_are_split_into_units_and_rows_without_pairs_give_empty_parts() -> None:
    own = scored((0, 1, 0.5), (2, 1, 0.9), (2, 0, 0.1), (10, 3, 0.7), (12, 3, 0.7))
    parts = [listed(part) for part in results.split(own, [0, 3, 10], [3, 2, 2])]
    assert parts == [listed(own)[:3], [], listed(own)[3:4]]


def test_pairs_by_release_row_then_cosine_then_gallery_row() -> None:
    own = scored((2, 1, 0.5), (1, 7, 0.5), (2, 0, 0.5), (1, 3, 0.9), (2, 9, 0.6))
    assert listed(results.by_release(own)) == [(1, 3, 0.9), (1, 7, 0.5), (2, 9, 0.6), (2, 0, 0.5), (2, 1, 0.5)]


def against_itself(vectors: np.ndarray, k: int) -> Scored:
    """The k best of every row of a set against itself, itself included."""
    cosine = vectors @ vectors.T
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    rows = np.repeat(np.arange(len(vectors)), order.shape[1])
    return Scored(rows, order.ravel(), cosine[rows, order.ravel()])


@pytest.mark.parametrize("k", [1, 2, 3, 20])
def test_one_neighbour_more_than_asked_for_is_enough_to_leave_the_image_itself_out(k: int) -> None:
    """Row 5 has more copies before it than the list is long, so that it is not in its own list."""
    rng = np.random.default_rng(4)
    vectors = rng.integers(-3, 4, (12, 4)).astype(np.float64)
    vectors[[0, 2, 3, 4, 5, 9]] = [5, 5, 5, 5]
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -np.inf)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, : min(k, 11)]
    expected = [(row, other, cosine[row, other]) for row in range(12) for other in order[row].tolist()]
    assert listed(results.without_self(against_itself(vectors, k + 1), k)) == expected


def test_pairs_of_a_set_with_itself_are_kept_once_with_the_lower_row_first() -> None:
    own = scored((1, 1, 1.0), (1, 2, 0.5), (2, 1, 0.5), (3, 1, 0.9), (1, 3, 0.9), (2, 2, 1.0), (2, 3, 0.5))
    assert listed(results.each_once(own)) == [(1, 3, 0.9), (1, 2, 0.5), (2, 3, 0.5)]
    assert listed(results.each_once(merged([own, own]))) == listed(results.each_once(own))


def test_tables_of_a_set_with_itself_follow_their_contracts() -> None:
    own = scored((1, 3, 0.9), (1, 2, 0.5), (4, 0, 0.5))
    near = WITHIN_NEIGHBOURS.check(results.within_neighbours_table("training", own))
    assert near.to_pylist()[1] == {"set": "training", "row": 1, "other_row": 2, "rank": 2, "cosine": 0.5}
    assert near["rank"].to_pylist() == [1, 2, 1]
    pairs = WITHIN_PAIRS.check(results.within_pairs_table("training", own))
    assert pairs.to_pylist()[0] == {"set": "training", "row": 1, "other_row": 3, "cosine": 0.9}
    for table in (results.within_neighbours_table("x", EMPTY), results.within_pairs_table("x", EMPTY)):
        assert len(table) == 0
