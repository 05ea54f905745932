import numpy as np
import pytest

from operators.errors import SchemaMismatch
from operators.gallery import shard
from operators.vectors import normalise


def test_equal_vectors_are_collapsed_with_their_rows_in_ascending_order() -> None:
    distinct = normalise(np.random.default_rng(0).standard_normal((3, 16)))[0]
    vectors = distinct[[2, 0, 2, 1, 0, 2]]
    rows = np.array([50, 40, 30, 20, 10, 60])
    part = shard(rows, vectors)
    groups = {
        part.distinct_UD[u].tobytes(): part.rows[part.starts[u] : part.starts[u + 1]].tolist()
        for u in range(len(part.distinct_UD))
    }
    assert groups == {distinct[0].tobytes(): [10, 40], distinct[1].tobytes(): [20], distinct[2].tobytes(): [30, 50, 60]}


def test_minus_zero_and_zero_are_the_same_component() -> None:
    vectors = np.array([[1, 0.0], [1, -0.0]], np.float16)
    assert len(shard(np.array([0, 1]), vectors).distinct_UD) == 1


def test_an_empty_shard_has_no_vectors() -> None:
    part = shard(np.zeros(0, np.int64), np.zeros((0, 8), np.float16))
    assert part.distinct_UD.shape == (0, 8) and part.starts.tolist() == [0]


@pytest.mark.parametrize("bad", [0.0, 2.0, np.nan, np.inf])
def test_a_vector_that_is_not_of_unit_length_is_refused_by_row(bad: float) -> None:
    vectors = np.tile(np.array([1, 0, 0], np.float16), (4, 1))
    vectors[2, 0] = bad
    with pytest.raises(SchemaMismatch, match="embeddings row 72"):
        shard(np.array([70, 71, 72, 73]), vectors)
