import numpy as np

from operators.oracle import Oracle


def test_the_oracle_by_hand() -> None:
    """Two release images; the gallery arrives in two parts, with ties inside and across them."""
    e = np.eye(4, dtype=np.float16)
    oracle = Oracle(np.array([3, 8]), e[:2], k=3, floor=1.0)
    assert oracle.add(np.array([0, 1, 4]), e[[2, 0, 0]]) == 3
    assert oracle.add(np.array([5, 9]), e[[0, 1]]) == 2
    near = oracle.neighbours("training")
    assert near["gallery_row"].to_pylist() == [1, 4, 5, 9, 0, 1]
    assert near["cosine"].to_pylist() == [1, 1, 1, 1, 0, 0]
    assert near["rank"].to_pylist() == [1, 2, 3] * 2
    pairs = oracle.pairs("training").select(["release_row", "gallery_row"]).to_pydict()
    assert pairs == {"release_row": [3, 3, 3, 8], "gallery_row": [1, 4, 5, 9]}
