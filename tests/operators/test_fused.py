import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import fused, vectors
from operators.microkernels import ALIGNED, COLUMNS, DTYPES, ROWS

LOW = [getattr(torch, name) for name in DTYPES]
SCALE = np.float32(1 / 127)
"""Of all int8 vectors here."""


def low(seed: int, count: int, width: int, dtype: torch.dtype) -> tuple[np.ndarray, torch.Tensor]:
    stored = vectors.normalise(np.random.default_rng(seed).standard_normal((count, width)))[0]
    made = torch.from_numpy(stored.astype(np.float32))
    return stored, (torch.round(made / SCALE) if dtype == torch.int8 else made).to(dtype)


def swept(
    left: tuple[np.ndarray, torch.Tensor],
    right: tuple[np.ndarray, torch.Tensor],
    row_bars: np.ndarray,
    column_bars: np.ndarray,
    *,
    wanted: int = 0,
    errors: float = 0.0,
    room: int = 2048,
) -> tuple[list[tuple[int, int, float]], np.ndarray, np.ndarray]:
    """Pairs with numbers 1000 and 2000 higher than their places, the columns' bars and lists afterwards."""
    panels = fused.packed(left[1], ROWS, unsigned=True), fused.packed(right[1], COLUMNS)
    rows = np.full(len(panels[0]) * ROWS, np.inf, np.float32)
    firsts = -128 * right[1].sum(1, dtype=torch.int32) if right[1].dtype == torch.int8 else torch.zeros(0)
    offsets = np.zeros(len(panels[1]) * COLUMNS, np.float32)
    scales = (
        fused.filled(np.full(len(left[0]), SCALE, np.float32), len(rows)),
        fused.filled(np.full(len(right[0]), SCALE, np.float32), len(offsets)),
        fused.filled(firsts.numpy().astype(np.int32), len(offsets)),
        offsets,
    )
    columns = np.full(len(panels[1]) * COLUMNS, np.inf, np.float32)
    rows[: len(row_bars)], columns[: len(column_bars)] = row_bars, column_bars
    queries, count = len(left[0]), len(right[0])
    highest = np.full((count, wanted), -np.inf)
    out = np.empty((2, room), np.int32), np.empty((2, room), np.int32), np.empty((2, room))
    starts = np.array([0, len(panels[1]) // 2, len(panels[1])])
    done, found = np.zeros(2, np.int64), np.zeros(2, np.int64)
    pairs = []
    while (done < np.diff(starts) * len(panels[0])).any():
        fused.sweep_fused(
            panels,
            left[0].astype(np.float32),
            right[0].astype(np.float32),
            (rows, np.full(queries, -np.inf), np.arange(queries, dtype=np.int32) + 1000),
            (columns, np.full(count, errors), highest, np.arange(count, dtype=np.int32) + 2000),
            scales,
            wanted,
            starts,
            done,
            out,
            found,
        )
        for block in range(2):
            pairs += zip(*(part[block, : found[block]].tolist() for part in out), strict=True)
    return pairs, columns[:count], highest


@pytest.mark.parametrize("dtype", LOW, ids=str)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), queries=st.integers(1, 40), count=st.integers(1, 150), width=st.integers(1, 70))
def test_pairs_are_those_whose_product_reaches_a_bar(
    dtype: torch.dtype, seed: int, queries: int, count: int, width: int
) -> None:
    rng = np.random.default_rng(seed)
    left, right = low(seed, queries, width, dtype), low(seed + 1000, count, width, dtype)
    row_bars, column_bars = rng.uniform(-0.5, 1.2, queries), rng.uniform(-0.5, 1.2, count)
    row_bars[rng.random(queries) < 0.2] = np.inf
    product = left[1].double().numpy() @ right[1].double().numpy().T  # of the rounded vectors
    product *= float(SCALE) ** 2 if dtype == torch.int8 else 1
    bars = np.minimum(row_bars[:, None], column_bars)
    close = np.abs(product - bars) < width * 2.0**-22  # fp32 sums may fall on either side
    pairs, _, _ = swept(left, right, row_bars, column_bars)
    reached = np.zeros(product.shape, bool)
    for q, g, cosine in pairs:
        assert not reached[q - 1000, g - 2000]  # each once
        reached[q - 1000, g - 2000] = True
        assert cosine == vectors.exact_matrix(left[0][[q - 1000]], right[0][[g - 2000]])[0, 0]
    assert (reached | close)[product >= bars].all()
    assert not (reached & ~close)[product < bars].any()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_bars_of_columns_follow_the_best_found(dtype: torch.dtype) -> None:
    left, right = low(0, 500, 32, dtype), low(1, 70, 32, dtype)
    exact = vectors.exact_matrix(left[0], right[0])
    pairs, bars, highest = swept(left, right, np.full(500, np.inf), np.full(70, -np.inf), wanted=3, errors=0.01)
    np.testing.assert_array_equal(highest, -np.sort(-exact, axis=0)[:3].T)
    third = highest[:, 2] - 0.01
    assert (bars <= third).all() and (bars > third - 1e-6).all()
    assert len(pairs) < exact.size / 3  # bars kept most away
    found = {(q - 1000, g - 2000) for q, g, _ in pairs}
    assert all((q, g) in found for q, g in np.argwhere(exact >= highest[:, 2]).tolist())


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_full_buffer_is_handed_over_and_the_sweep_goes_on(dtype: torch.dtype) -> None:
    left, right = low(2, 50, 8, dtype), low(3, 90, 8, dtype)
    room = fused.PENDING + ROWS * COLUMNS
    pairs, _, _ = swept(left, right, np.full(50, -np.inf), np.full(90, np.inf), room=room)
    assert sorted((q - 1000, g - 2000) for q, g, _ in pairs) == [(q, g) for q in range(50) for g in range(90)]


@pytest.mark.parametrize("width", [1, 2, 7, 64])
@pytest.mark.parametrize("count", [1, 12, 33])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_panels_hold_the_vectors_side_by_side(dtype: torch.dtype, count: int, width: int) -> None:
    _, made = low(4, count, width, dtype)
    panels = fused.packed(made, 12)
    assert panels.ctypes.data % ALIGNED == 0 and panels.flags.c_contiguous
    steps = np.ascontiguousarray(panels.transpose(0, 2, 1)).reshape(-1, panels.shape[1])  # one row for each place
    if dtype == torch.bfloat16:
        steps = (steps.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif dtype == torch.int8:
        steps = steps.view(np.int8)
        raised = fused.packed(made, 12, unsigned=True).transpose(0, 2, 1)
        raised = np.ascontiguousarray(raised).reshape(-1, panels.shape[1]).view(np.uint8)
        np.testing.assert_array_equal(raised[:count], steps[:count].astype(int) + 128)
    np.testing.assert_array_equal(steps[:count, :width], made.float().numpy())
    assert not steps[count:].any() and not steps[:, width:].any()


def test_the_digest_is_that_of_the_files_compiled_into_the_sweep() -> None:
    folder = Path(fused.__file__).parent
    text = b"".join((folder / name).read_bytes() for name in ("kernels.py", "microkernels.py"))
    digest = hashlib.sha256(text).hexdigest()[:16]
    assert digest == fused.BUILT_FROM, f"set BUILT_FROM of operators/fused.py to {digest}"
