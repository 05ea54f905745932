import numpy as np
import pytest
import torch

from operators import vectors
from operators.mixed import MixedEngine, operand

DTYPES = [torch.bfloat16, torch.float32]


def heavy(seed: int, count: int, width: int) -> np.ndarray:
    return vectors.normalise(np.random.default_rng(seed).standard_t(2, (count, width)))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 128, 512])
def test_no_score_is_further_off_than_the_stated_error(dtype: torch.dtype, width: int) -> None:
    left, right = heavy(0, 900, width), heavy(1, 1100, width)
    engine = MixedEngine(right, dtype)
    queries = operand(left, dtype)
    rows, columns = engine.errors(queries)
    low = torch.mm(queries.low_ND, engine.gallery.low_ND.T).double().numpy()
    off = np.abs(low - vectors.exact_matrix(left, right))
    assert (off <= rows[:, None]).all() and (off <= columns[None]).all()
    assert dtype == torch.float32 or off.max() > rows.min() / 10  # and the bound is not idle


def test_coordinates_half_way_between_two_bf16_numbers_stay_within_the_error() -> None:
    """The worst case for rounding: every coordinate lies at a midpoint (PROTOCOL B.2)."""
    halfway = np.full((1, 256), 0.0625 * (1 + 2.0**-8), np.float16)
    halfway[0, 1:] *= np.sqrt((1 - float(halfway[0, 0]) ** 2) / 255) / float(halfway[0, 1])
    engine = MixedEngine(halfway, torch.bfloat16)
    queries = operand(halfway, torch.bfloat16)
    low = torch.mm(queries.low_ND, engine.gallery.low_ND.T).double().numpy()
    assert abs(low - vectors.exact_matrix(halfway, halfway)).max() <= engine.errors(queries)[0][0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals_are_the_lengths_of_what_rounding_took(dtype: torch.dtype) -> None:
    stored = heavy(2, 50, 64)
    made = operand(stored, dtype)
    truth = np.linalg.norm(stored.astype(np.float64) - made.low_ND.double().numpy(), axis=1)
    np.testing.assert_allclose(made.residual_N, truth, rtol=1e-6)
    assert (made.residual_N >= truth).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_order_as_scores_do_and_bars_are_rounded_down(dtype: torch.dtype) -> None:
    engine = MixedEngine(heavy(3, 4, 8), dtype)
    scores = torch.tensor([-1.0, -1e-3, 0.0, 1e-30, 0.1, 0.4999, 0.5, 0.5001, 1.0]).to(dtype)
    for bar in [-0.5, 0.0, 1e-30, 0.1, 0.3, 0.5, 0.7, 1.0, float("-inf")]:
        reached = scores.view(engine.bits) >= engine.as_bits(np.array([bar]))
        assert reached[scores.double() >= bar].all()
        if bar > 0:
            assert not reached[scores.double() < bar * (1 - 2.0**-6)].any()
