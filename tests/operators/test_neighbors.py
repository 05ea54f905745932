import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from operators import neighbors, tilepass, vectors
from operators.engines import Wanted
from operators.errors import CapacityError, SchemaMismatch
from operators.gallery import shard
from operators.mixed import MixedEngine
from operators.operands import forms
from operators.tables import CLOSEST, NEIGHBOURS, PAIRS

WIDTH = 16
ENGINES = {"faiss": None} | {f"mixed, {form}": form for form in forms()}
"""All engines, and all forms that this processor has instructions for."""


def people(seed: int, count: int, persons: int) -> np.ndarray:
    """Stored vectors with exact duplicates, near ties and clusters: everything that breaks a careless top-k."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((persons, WIDTH))
    noise = rng.choice([0.0, 1e-4, 0.3], (count, 1))
    return vectors.normalise(centres[rng.integers(persons, size=count)] + noise * rng.standard_normal((count, WIDTH)))[
        0
    ]


def brute(queries: np.ndarray, gallery: np.ndarray) -> list[tuple[int, int, float]]:
    """All pairs in the total order, from a plain fp64 product."""
    scores = (queries.astype(np.float64) @ gallery.astype(np.float64).T).ravel()
    q, g = np.divmod(np.arange(len(scores)), len(gallery))
    order = np.lexsort((g, q, -scores))
    return list(zip(q[order].tolist(), g[order].tolist(), scores[order].tolist(), strict=True))


def brute_best(queries: np.ndarray, gallery: np.ndarray, k: int) -> list[tuple[int, int, float]]:
    lists: dict[int, list[tuple[int, int, float]]] = {q: [] for q in range(len(queries))}
    for pair in brute(queries, gallery):
        if len(lists[pair[0]]) < k:
            lists[pair[0]].append(pair)
    return [pair for own in lists.values() for pair in own]


def listed(scored: neighbors.Scored) -> list[tuple[int, int, float]]:
    return list(zip(scored.release.tolist(), scored.gallery.tolist(), scored.cosine.tolist(), strict=True))


def partition(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Rows cut at random places into shards, some of them empty."""
    cuts = np.sort(rng.integers(0, count + 1, rng.integers(0, 5)))
    return np.split(rng.permutation(count), cuts)


def search(rows: np.ndarray, vectors: np.ndarray, engine: str, *wanted: object) -> neighbors.ShardSearch:
    part = shard(rows.astype(np.int64), vectors.reshape(-1, vectors.shape[-1]))
    made = neighbors.ShardSearch(part, "faiss", Wanted(*wanted))
    if ENGINES.get(engine) and made.engine:
        made.engine = MixedEngine(part.distinct_UD, ENGINES[engine])
    return made


@pytest.fixture
def budget(often: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixed engine also where it settles and hands over pairs in between, with products smaller than the data."""
    if often:
        monkeypatch.setattr(tilepass, "BUDGET", 50)
        monkeypatch.setattr(tilepass, "ROOM", 1)
        monkeypatch.setattr(tilepass, "CHUNK", 64)
        monkeypatch.setattr(tilepass, "TILE", 64)
        monkeypatch.setattr(tilepass, "WHOLE", 32)
        monkeypatch.setattr(tilepass, "SHARE", 0.5)


@pytest.mark.parametrize(
    ("engine", "often"),
    [(engine, often) for engine, form in ENGINES.items() for often in (False, True) if form or not often],
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), k=st.sampled_from([1, 3, 10, 500]), count=st.integers(1, 300))
def test_sharded_search_equals_brute_force_bit_for_bit(
    engine: str, often: bool, budget: None, seed: int, k: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    queries, gallery = people(seed, 17, 4), people(seed, count, 3)
    floor = [None, -1.0, 0.2, 0.9][rng.integers(4)]
    columns = int(rng.integers(0, 4))
    tiles = []
    for rows in partition(rng, count):
        one = search(rows, gallery[rows], engine, k, columns, floor)
        for block in partition(rng, len(queries)):
            tiles.append(one.tile(block.astype(np.int64), queries[block].reshape(-1, WIDTH), 10**6))
    rng.shuffle(tiles)
    nearest = neighbors.best(neighbors.merged([tile.nearest for tile in tiles]), k)
    closest = neighbors.best(neighbors.merged([tile.closest for tile in tiles]).turned(), columns)
    above = neighbors.ordered(neighbors.merged([tile.pairs for tile in tiles]))
    assert listed(nearest) == brute_best(queries, gallery, k)
    assert listed(closest) == brute_best(gallery, queries, columns)
    assert listed(above) == [pair for pair in brute(queries, gallery) if floor is not None and pair[2] >= floor]


@pytest.mark.parametrize("engine", list(ENGINES))
def test_more_copies_of_one_vector_than_k_give_the_lowest_rows(engine: str) -> None:
    one = people(0, 1, 1)
    gallery = np.concatenate([np.repeat(one, 400, axis=0), people(1, 50, 50)])
    found = search(np.arange(1000, 1450)[::-1], gallery, engine, 10, 0, None).tile(np.array([7]), one, 0).nearest
    assert found.gallery.tolist() == sorted(range(1050, 1450))[:10]
    assert len(set(found.cosine.tolist())) == 1


@pytest.mark.parametrize("engine", list(ENGINES))
def test_ties_between_different_vectors_are_complete(engine: str) -> None:
    """All axes are equally far from their mean direction, so every gallery vector ties."""
    gallery = np.eye(WIDTH, dtype=np.float16).repeat(3, axis=0)
    query = np.full((5, WIDTH), 0.25, np.float16)
    rows = np.random.default_rng(0).permutation(len(gallery)).astype(np.int64)
    found = search(rows, gallery, engine, 5, 2, None).tile(np.array([8, 6, 4, 2, 0]), query, 0)
    assert found.nearest.gallery.tolist() == [0, 1, 2, 3, 4] * 5
    assert neighbors.best(found.closest.turned(), 99).gallery.tolist() == [0, 2] * len(gallery)


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-3])
def test_crowds_within_the_margin_are_told_apart(engine: str, spread: float) -> None:
    """Hundreds of scores closer together than any low-precision product can see."""
    rng = np.random.default_rng(1)
    centre = rng.standard_normal(64)
    gallery = vectors.normalise(centre + spread * rng.standard_normal((700, 64)))[0]
    queries = vectors.normalise(centre + spread * rng.standard_normal((90, 64)))[0]
    found = search(np.arange(700), gallery, engine, 7, 3, None).tile(np.arange(90), queries, 0)
    assert listed(found.nearest) == brute_best(queries, gallery, 7)
    assert listed(neighbors.best(found.closest.turned(), 3)) == brute_best(gallery, queries, 3)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_scores_that_single_precision_cannot_order_are_ordered(engine: str) -> None:
    """Cosines of 1/2 and up to 20 steps of 2^-27 more or less, as sums of 1/2 and 30 terms too small for fp32."""
    rng = np.random.default_rng(4)
    steps = rng.integers(-8, 9, (300, 30))
    steps[:, -1] = rng.integers(-20, 21, 300) - steps[:, :-1].sum(1)
    gallery = np.full((300, 32), np.sqrt(0.75))
    gallery[:, 0], gallery[:, 1:-1] = 0.5, steps * 2.0**-14
    queries = np.zeros((3, 32))
    queries[:, 0], queries[:, 1:-1] = 1, 2.0**-13 * rng.choice([-1, 1], (3, 1))
    queries, gallery = queries.astype(np.float16), gallery.astype(np.float16)
    found = search(np.arange(300), gallery, engine, 7, 0, None).tile(np.arange(3), queries, 0)
    assert listed(found.nearest) == brute_best(queries, gallery, 7)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_results_of_no_query_or_no_gallery_are_empty(engine: str) -> None:
    gallery = people(0, 5, 2)
    full = search(np.arange(5), gallery, engine, 3, 2, -1.0)
    none = search(np.zeros(0), np.zeros((0, WIDTH), np.float16), engine, 3, 2, -1.0)
    for one, queries in [(full, gallery[:0]), (none, gallery)]:
        found = one.tile(np.arange(len(queries)), queries, 100)
        assert [len(part.cosine) for part in found] == [0, 0, 0]


def test_merging_is_commutative_and_idempotent() -> None:
    queries, gallery = people(3, 6, 3), people(3, 60, 3)
    parts = [
        search(rows, gallery[rows], "faiss", 4, 0, None).tile(np.arange(6), queries, 0).nearest
        for rows in np.array_split(np.arange(60), 5)
    ]
    whole = listed(neighbors.best(neighbors.merged(parts), 4))
    early = neighbors.best(neighbors.merged(parts[:3]), 4)
    late = neighbors.best(neighbors.merged(parts[2:]), 4)
    assert listed(neighbors.best(neighbors.merged([late, early, early]), 4)) == whole


def test_too_many_pairs_are_an_error_that_names_both_options() -> None:
    gallery = people(0, 50, 1)
    with pytest.raises(CapacityError, match=r"search\.floor=-1\.0.*search\.max_pairs is 100"):
        search(np.arange(50), gallery, "faiss", 1, 0, -1.0).tile(np.arange(50), gallery, 100)


def test_unusable_queries_are_refused_by_row() -> None:
    gallery = people(0, 5, 2)
    with pytest.raises(SchemaMismatch, match="row 31"):
        search(np.arange(5), gallery, "faiss", 1, 0, None).tile(
            np.array([30, 31]), np.stack([gallery[0], np.zeros(WIDTH, np.float16)]), 0
        )


def test_tables_follow_their_contracts() -> None:
    scored = neighbors.Scored(np.array([4, 4, 9]), np.array([2, 1, 1]), np.array([0.9, 0.5, 0.7]))
    near = NEIGHBOURS.check(neighbors.neighbours_table([("training", scored), ("control", neighbors.EMPTY)]))
    assert near["rank"].to_pylist() == [1, 2, 1]
    assert pc.unique(near["arm"]).to_pylist() == ["training"]
    assert PAIRS.check(neighbors.pairs_table([("control", scored)])).num_rows == 3
    assert NEIGHBOURS.check(neighbors.neighbours_table([])).num_rows == 0
    turned = neighbors.best(scored.turned(), 99).turned()
    near = CLOSEST.check(neighbors.closest_table([("training", turned)]))
    assert near.select(["gallery_row", "release_row", "rank"]).to_pylist() == [
        {"gallery_row": 1, "release_row": 9, "rank": 1},
        {"gallery_row": 1, "release_row": 4, "rank": 2},
        {"gallery_row": 2, "release_row": 4, "rank": 1},
    ]
