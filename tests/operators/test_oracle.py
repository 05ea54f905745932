import numpy as np

from operators import histogram
from operators.oracle import Oracle
from operators.tables import NEIGHBOURS, PAIRS
from operators.vectors import normalise


def test_the_oracle_by_hand() -> None:
    """Two release images; the gallery arrives in two parts, with ties inside and across them."""
    e = np.eye(4, dtype=np.float16)
    oracle = Oracle(np.array([3, 8]), e[:2], k=3, floor=1.0)
    assert oracle.add(np.array([0, 1, 4]), e[[2, 0, 0]]) == 3
    assert oracle.add(np.array([5, 9]), e[[0, 1]]) == 2
    near = NEIGHBOURS.check(oracle.neighbours("training"))
    assert near["gallery_row"].to_pylist() == [1, 4, 5, 9, 0, 1]
    assert near["cosine"].to_pylist() == [1, 1, 1, 1, 0, 0]
    assert near["rank"].to_pylist() == [1, 2, 3] * 2
    pairs = PAIRS.check(oracle.pairs("training")).select(["release_row", "gallery_row"]).to_pydict()
    assert pairs == {"release_row": [3, 3, 3, 8], "gallery_row": [1, 4, 5, 9]}
    assert oracle.comparisons == 10
    counted = {float(histogram.EDGES[at]): n for at, n in enumerate(oracle.counts.tolist()) if n}
    assert counted == {0.0: 6, 1.0: 4}


def test_the_gallery_in_parts_gives_what_it_gives_at_once() -> None:
    rng = np.random.default_rng(0)
    queries, gallery = (normalise(rng.integers(-2, 3, (count, 8)).astype(float))[0] for count in (7, 60))
    rows_G = np.cumsum(rng.integers(1, 5, 60))
    whole = Oracle(np.arange(7), queries, k=5, floor=0.3)
    whole.add(rows_G, gallery)
    parts = Oracle(np.arange(7), queries, k=5, floor=0.3)
    for at in (0, 2, 30, 59):
        end = {0: 2, 2: 30, 30: 59, 59: 60}[at]
        parts.add(rows_G[at:end], gallery[at:end])
    assert whole.neighbours("x").equals(parts.neighbours("x")) and whole.pairs("x").equals(parts.pairs("x"))
    assert np.array_equal(whole.counts, parts.counts) and whole.comparisons == parts.comparisons == 420
    cosine = queries.astype(float) @ gallery.astype(float).T
    assert np.array_equal(whole.counts, np.histogram(cosine, histogram.EDGES)[0])
    assert len(whole.above().cosine) == (cosine >= 0.3).sum()


def test_fewer_gallery_images_than_neighbours_and_none_at_all() -> None:
    e = np.eye(4, dtype=np.float16)
    oracle = Oracle(np.array([2, 5]), e[:2], k=3, floor=-1.0)
    assert [len(part) for part in (*oracle.best(), *oracle.above())] == [0] * 6
    oracle.add(np.zeros(0, np.int64), e[:0])
    assert len(oracle.neighbours("x")) == len(oracle.pairs("x")) == 0
    oracle.add(np.array([9]), e[1:2])
    assert oracle.best().release.tolist() == [2, 5] and oracle.best().cosine.tolist() == [0, 1]
    assert oracle.above().gallery.tolist() == [9, 9]


def test_no_release_images_give_nothing() -> None:
    oracle = Oracle(np.zeros(0, np.int64), np.zeros((0, 4), np.float16), k=3, floor=0.5)
    oracle.add(np.array([1, 2]), np.eye(4, dtype=np.float16)[:2])
    assert len(oracle.best().cosine) == len(oracle.above().cosine) == oracle.comparisons == 0
