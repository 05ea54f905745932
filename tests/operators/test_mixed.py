import json
import tracemalloc

import numpy as np
import pytest
import torch

from operators import mixed, vectors
from operators.engines import Wanted
from operators.kernels import _as_bits
from operators.mixed import MixedEngine, exact_products
from operators.operands import Form, forms, operand

DTYPES = [torch.bfloat16, torch.float32]


def heavy(seed: int, count: int, width: int) -> np.ndarray:
    return vectors.normalise(np.random.default_rng(seed).standard_t(2, (count, width)))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 128, 512])
def test_no_score_is_further_off_than_the_stated_error(dtype: torch.dtype, width: int) -> None:
    left, right = heavy(0, 900, width), heavy(1, 1100, width)
    engine = MixedEngine(right, Form(dtype, False))
    queries = operand(left, dtype)
    rows, columns, _ = engine.errors(queries)
    low = torch.mm(queries.low_ND, engine.gallery.low_ND.T).double().numpy()
    off = np.abs(low - vectors.exact_matrix(left, right[engine.order]))
    rounding = engine.rounding * np.abs(low)
    assert (off <= rows[:, None] + rounding).all() and (off <= columns[None] + rounding).all()
    assert dtype == torch.float32 or off.max() > rows.min() / 10  # and the bound is not idle


@pytest.mark.skipif(Form(torch.int8, True) not in forms(), reason="this processor has no VNNI")
@pytest.mark.parametrize("width", [3, 128, 512])
def test_no_int8_score_is_further_off_than_the_error_of_its_query_and_the_offset_of_its_vector(width: int) -> None:
    left, right = heavy(0, 900, width), heavy(1, 1100, width)
    right[0] = np.eye(1, width, dtype=np.float16)  # rounding takes nothing, beside vectors where it takes much
    engine, queries = MixedEngine(right, Form(torch.int8, True)), operand(left, torch.int8)
    rows, columns, offsets = engine.errors(queries)
    gallery = operand(right[engine.order], torch.int8)
    low = [side.low_ND.double().numpy() * side.scale_N[:, None] for side in (queries, gallery)]
    off = np.abs(low[0] @ low[1].T - vectors.exact_matrix(left, right[engine.order]))
    assert (off <= rows[:, None] + offsets).all() and (off <= columns + offsets).all()
    assert off.max() > rows.min() / 10 and offsets.min() < offsets.max() / 100


def test_coordinates_half_way_between_two_bf16_numbers_stay_within_the_error() -> None:
    """The worst case for rounding: every coordinate lies at a midpoint (PROTOCOL B.2)."""
    halfway = np.full((1, 256), 0.0625 * (1 + 2.0**-8), np.float16)
    halfway[0, 1:] *= np.sqrt((1 - float(halfway[0, 0]) ** 2) / 255) / float(halfway[0, 1])
    engine = MixedEngine(halfway, Form(torch.bfloat16, False))
    queries = operand(halfway, torch.bfloat16)
    low = torch.mm(queries.low_ND, engine.gallery.low_ND.T).double().numpy()
    off = abs(low - vectors.exact_matrix(halfway, halfway)).max()
    assert off <= engine.errors(queries)[0][0] + engine.rounding * low[0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals_are_the_lengths_of_what_rounding_took(dtype: torch.dtype) -> None:
    stored = heavy(2, 50, 64)
    made = operand(stored, dtype)
    truth = np.linalg.norm(stored.astype(np.float64) - made.low_ND.double().numpy(), axis=1)
    np.testing.assert_allclose(made.residual_N, truth, rtol=1e-6)
    assert (made.residual_N >= truth).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_order_as_scores_do_and_bars_are_rounded_down(dtype: torch.dtype) -> None:
    engine = MixedEngine(heavy(3, 4, 8), Form(dtype, False))
    scores = torch.tensor([-1.0, -1e-3, 0.0, 1e-30, 0.1, 0.4999, 0.5, 0.5001, 1.0]).to(dtype)
    for bar in [-0.5, 0.0, 1e-30, 0.1, 0.3, 0.5, 0.7, 1.0, float("-inf")]:
        assert _as_bits(bar, np.iinfo(engine.as_bits(np.zeros(1)).dtype).min) == engine.as_bits(np.array([bar]))[0]
        reached = scores.view(engine.bits) >= torch.from_numpy(engine.as_bits(np.array([bar])))
        assert reached[scores.double() >= bar].all()
        if bar > 0:
            assert not reached[scores.double() < bar * (1 - 2.0**-6)].any()


def test_products_are_exact_whatever_was_set_before() -> None:
    cuda = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("medium")
    cuda.allow_fp16_reduced_precision_reduction = cuda.allow_bf16_reduced_precision_reduction = True
    exact_products()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not cuda.allow_tf32
    assert not cuda.allow_fp16_reduced_precision_reduction and not cuda.allow_bf16_reduced_precision_reduction
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_opening_an_engine_undoes_a_hostile_setting() -> None:
    torch.set_float32_matmul_precision("medium")
    MixedEngine(heavy(0, 4, 8), Wanted(1, 0, None))
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("form", [None, *forms()], ids=str)
def test_an_engine_tells_what_it_computes_with(form: Form | None) -> None:
    stored = heavy(1, 60, 32)
    engine = MixedEngine(stored, form or Wanted(3, 0, None))
    about = json.loads(json.dumps(engine.about))
    assert list(about) == ["engine", "device", "dtype", "residual", "accumulation", "margin", "reason"]
    assert (about["engine"], about["device"], about["dtype"]) == ("mixed", "cpu", str(engine.dtype).split(".")[1])
    assert about["residual"] == operand(stored, engine.dtype).residual_N.max()
    rows, columns, offsets = engine.errors(operand(stored, engine.dtype))
    assert about["margin"] >= rows.max() + offsets.max() and about["margin"] >= (columns + offsets).max()
    assert about["reason"] == "given" if form else all(f"{one} " in about["reason"] for one in forms())


def test_forms_are_tried_once_in_the_same_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def trial(gallery: np.ndarray, wanted: Wanted) -> dict[Form, float]:
        tried.append((gallery.shape[1], wanted.k, torch.get_num_threads()))
        return dict.fromkeys(forms(), 1.0)

    monkeypatch.setattr(mixed, "seconds_by_form", trial)
    mixed._tried.clear()
    threads = torch.get_num_threads()
    conditions = [(8, 1, threads), (9, 1, threads), (8, 2, threads), (8, 1, threads + 1)]
    try:
        for width, k, count in [*conditions, *conditions]:
            torch.set_num_threads(count)
            MixedEngine(heavy(0, 4, width), Wanted(k, 0, None))
        crowd = np.eye(1, 8) + 0.05 * np.random.default_rng(0).standard_normal((300, 8))
        for spread in (heavy(0, 300, 8), vectors.normalise(crowd)[0]):
            torch.set_num_threads(threads)
            MixedEngine(spread, Wanted(1, 0, None))
    finally:
        torch.set_num_threads(threads)
        mixed._tried.clear()
    assert tried[: len(conditions)] == conditions
    assert tried[-1] == (8, 1, threads)  # other data are another condition


def test_taking_in_vectors_holds_little_but_the_vectors() -> None:
    stored = heavy(0, 20_000, 64)
    tracemalloc.start()
    operand(stored, torch.float32)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found < 1.5 * stored.size * 4


@pytest.mark.parametrize("form", forms(), ids=str)
@pytest.mark.parametrize("order", [1, -1])
def test_queries_in_an_order_that_raises_bars_slowly_cost_nothing_and_lose_nothing(order: int, form: Form) -> None:
    """Queries come closer and closer to the gallery, or move away from it."""
    rng = np.random.default_rng(0)
    centre = rng.standard_normal(64)
    noise = np.linspace(3, 0.5, 700)[::order, None]
    queries = vectors.normalise(centre + noise * rng.standard_normal((700, 64)))[0]
    gallery = vectors.normalise(centre + rng.standard_normal((90, 64)))[0]
    found = MixedEngine(gallery, form).propose(queries, Wanted(1, 2, None))
    exact = vectors.exact_matrix(queries, gallery)
    np.testing.assert_array_equal(found.cosine, exact[found.query, found.group])
    proposed = np.zeros(exact.shape, bool)
    proposed[found.query, found.group] = True
    assert (proposed[exact >= np.sort(exact, axis=0)[-2]]).all() and proposed[np.arange(700), exact.argmax(1)].all()
    assert proposed.sum() < 0.1 * proposed.size
