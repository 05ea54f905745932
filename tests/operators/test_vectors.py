import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import vectors


def unit_rows(count: int, width: int, seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).standard_normal((count, width))
    return vectors.normalise(raw)[0]


def test_normalise_gives_unit_length_within_fp16_rounding() -> None:
    raw = np.random.default_rng(0).standard_normal((200, 128)) * 12
    stored, norms, usable = vectors.normalise(raw)
    assert stored.dtype == np.float16 and usable.all()
    np.testing.assert_allclose(norms, np.sqrt((raw**2).sum(1)), rtol=1e-6)
    np.testing.assert_allclose(stored.astype(float), raw / np.sqrt((raw**2).sum(1, keepdims=True)), atol=2.0**-11)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_rows_without_a_direction_are_not_usable(bad: float) -> None:
    raw = np.ones((3, 4))
    raw[1] = bad
    stored, _, usable = vectors.normalise(raw)
    assert usable.tolist() == [True, False, True]
    assert (stored[1] == 0).all()


def test_norms_survive_where_fp32_squares_would_overflow() -> None:
    stored, norms, usable = vectors.normalise(np.full((1, 4), 1e30, np.float32))
    assert usable.all() and norms[0] == pytest.approx(2e30)
    assert stored.tolist() == [[0.5, 0.5, 0.5, 0.5]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 128, 512]))
def test_exact_cosines_have_no_rounding_at_all(seed: int, width: int) -> None:
    heavy = np.random.default_rng(seed).standard_t(2, (2, width))
    left, right = vectors.normalise(heavy)[0]
    truth = sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(left, right, strict=True)), Fraction(0))
    assert Fraction(float(vectors.exact_cosines(left[None], right[None])[0])) == truth


def test_exact_matrix_does_not_depend_on_the_order_of_components() -> None:
    left, right = unit_rows(40, 512, 1), unit_rows(50, 512, 2)
    shuffle = np.random.default_rng(3).permutation(512)
    expected = vectors.exact_matrix(left, right)
    assert np.array_equal(expected, vectors.exact_matrix(left[:, shuffle], right[:, shuffle]))
    assert expected[7, 9] == math.fsum(float(a) * float(b) for a, b in zip(left[7], right[9], strict=True))
    assert np.array_equal(expected[np.arange(40), np.arange(40)], vectors.exact_cosines(left, right[:40]))


def test_vectors_survive_arrow_and_unusable_rows_are_null() -> None:
    stored = unit_rows(5, 8, 4)
    usable = np.array([True, False, True, True, False])
    column = vectors.to_arrow(stored, usable)
    assert column.is_valid().to_pylist() == usable.tolist()
    assert np.array_equal(vectors.from_arrow(column.drop_null()), stored[usable])
    chunked = pa.chunked_array([column.slice(2, 2), column.slice(0, 1)])
    assert np.array_equal(vectors.from_arrow(chunked), stored[[2, 3, 0]])
