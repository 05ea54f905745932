import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import neighbors, vectors
from operators.errors import CapacityError, SchemaMismatch
from operators.gallery import shard
from operators.tables import NEIGHBOURS, PAIRS

WIDTH = 16


def people(seed: int, count: int, persons: int) -> np.ndarray:
    """Stored vectors with exact duplicates, near ties and clusters: everything that breaks a careless top-k."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((persons, WIDTH))
    noise = rng.choice([0.0, 1e-4, 0.3], (count, 1))
    return vectors.normalise(centres[rng.integers(persons, size=count)] + noise * rng.standard_normal((count, WIDTH)))[
        0
    ]


def brute(queries: np.ndarray, gallery: np.ndarray) -> list[tuple[float, int, int]]:
    scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
    return sorted((-scores[q, g], q, g) for q in range(len(queries)) for g in range(len(gallery)))


def brute_best(queries: np.ndarray, gallery: np.ndarray, k: int) -> list[tuple[int, int, float]]:
    ranked = brute(queries, gallery)
    return [
        (q, g, -minus)
        for query in range(len(queries))
        for minus, q, g in [entry for entry in ranked if entry[1] == query][:k]
    ]


def listed(scored: neighbors.Scored) -> list[tuple[int, int, float]]:
    return list(zip(scored.release.tolist(), scored.gallery.tolist(), scored.cosine.tolist(), strict=True))


def partition(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Rows cut at random places into shards, some of them empty."""
    cuts = np.sort(rng.integers(0, count + 1, rng.integers(0, 5)))
    return np.split(rng.permutation(count), cuts)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.sampled_from([1, 3, 10, 500]), count=st.integers(1, 120))
def test_sharded_search_equals_brute_force_bit_for_bit(seed: int, k: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    queries, gallery = people(seed, 17, 4), people(seed, count, 3)
    floor = float(rng.choice([-1.0, 0.2, 0.9]))
    tiles = []
    for rows in partition(rng, count):
        search = neighbors.ShardSearch(shard(rows.astype(np.int64), gallery[rows].reshape(-1, WIDTH)))
        for block in partition(rng, len(queries)):
            ids, block_vectors = block.astype(np.int64), queries[block].reshape(-1, WIDTH)
            tiles.append((search.nearest(ids, block_vectors, k), search.above(ids, block_vectors, floor, 10**6)))
    rng.shuffle(tiles)
    nearest = neighbors.best(neighbors.merged([tile[0] for tile in tiles]), k)
    above = neighbors.ordered(neighbors.merged([tile[1] for tile in tiles]))
    assert listed(nearest) == brute_best(queries, gallery, k)
    assert listed(above) == [(q, g, -minus) for minus, q, g in brute(queries, gallery) if -minus >= floor]


def test_more_copies_of_one_vector_than_k_give_the_lowest_rows() -> None:
    one = people(0, 1, 1)
    gallery = np.concatenate([np.repeat(one, 400, axis=0), people(1, 50, 50)])
    search = neighbors.ShardSearch(shard(np.arange(1000, 1450)[::-1].copy(), gallery))
    found = search.nearest(np.array([7]), one, 10)
    assert found.gallery.tolist() == sorted(range(1050, 1450))[:10]
    assert len(set(found.cosine.tolist())) == 1


def test_ties_between_different_vectors_are_complete() -> None:
    """All signed axes are equally far from their mean direction, so every gallery vector ties."""
    gallery = np.eye(WIDTH, dtype=np.float16).repeat(3, axis=0)
    query = np.full((1, WIDTH), 0.25, np.float16)
    rows = np.random.default_rng(0).permutation(len(gallery)).astype(np.int64)
    found = neighbors.ShardSearch(shard(rows, gallery)).nearest(np.array([0]), query, 5)
    assert found.gallery.tolist() == [0, 1, 2, 3, 4]


def test_the_margin_bounds_fp32_error_for_any_order_of_summation() -> None:
    rng = np.random.default_rng(5)
    left, right = (vectors.normalise(rng.standard_t(2, (4000, 512)))[0] for _ in range(2))
    exact = vectors.exact_cosines(left, right)
    worst = 0.0
    for _ in range(8):
        order = rng.permutation(512)
        products = left[:, order].astype(np.float32) * right[:, order].astype(np.float32)
        sums = np.add.accumulate(products, axis=1, dtype=np.float32)[:, -1]
        worst = max(worst, float(np.abs(sums - exact).max()))
    assert 0 < worst <= neighbors.margin(512)


def test_results_of_no_query_or_no_gallery_are_empty() -> None:
    gallery = people(0, 5, 2)
    full = neighbors.ShardSearch(shard(np.arange(5), gallery))
    none = neighbors.ShardSearch(shard(np.zeros(0, np.int64), np.zeros((0, WIDTH), np.float16)))
    for search, queries in [(full, gallery[:0]), (none, gallery)]:
        rows = np.arange(len(queries))
        assert len(search.nearest(rows, queries, 3).cosine) == 0
        assert len(search.above(rows, queries, -1.0, 100).cosine) == 0


def test_merging_is_commutative_and_idempotent() -> None:
    queries, gallery = people(3, 6, 3), people(3, 60, 3)
    parts = [
        neighbors.ShardSearch(shard(rows.astype(np.int64), gallery[rows])).nearest(np.arange(6), queries, 4)
        for rows in np.array_split(np.arange(60), 5)
    ]
    whole = listed(neighbors.best(neighbors.merged(parts), 4))
    early = neighbors.best(neighbors.merged(parts[:3]), 4)
    late = neighbors.best(neighbors.merged(parts[2:]), 4)
    assert listed(neighbors.best(neighbors.merged([late, early, early]), 4)) == whole


def test_too_many_pairs_are_an_error_that_names_both_options() -> None:
    gallery = people(0, 50, 1)
    search = neighbors.ShardSearch(shard(np.arange(50), gallery))
    with pytest.raises(CapacityError, match=r"search\.floor=-1\.0.*search\.max_pairs is 100"):
        search.above(np.arange(50), gallery, -1.0, 100)


def test_unusable_queries_are_refused_by_row() -> None:
    gallery = people(0, 5, 2)
    search = neighbors.ShardSearch(shard(np.arange(5), gallery))
    with pytest.raises(SchemaMismatch, match="row 31"):
        search.nearest(np.array([30, 31]), np.stack([gallery[0], np.zeros(WIDTH, np.float16)]), 1)


def test_tables_follow_their_contracts() -> None:
    scored = neighbors.Scored(np.array([4, 4, 9]), np.array([2, 1, 1]), np.array([0.9, 0.5, 0.7]))
    near = NEIGHBOURS.check(neighbors.neighbours_table([("training", scored), ("control", neighbors.EMPTY)]))
    assert near["rank"].to_pylist() == [1, 2, 1]
    assert pc.unique(near["arm"]).to_pylist() == ["training"]
    assert PAIRS.check(neighbors.pairs_table([("control", scored)])).num_rows == 3
    assert NEIGHBOURS.check(neighbors.neighbours_table([])).num_rows == 0
