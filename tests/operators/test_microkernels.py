import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit

from operators import microkernels
from operators.fused import packed
from operators.microkernels import COLUMNS, DTYPES, LANES, ROWS

AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+lzcnt"}


@njit
def block(
    left: np.ndarray,
    right: np.ndarray,
    row_bars: np.ndarray,
    column_bars: np.ndarray,
    masks: np.ndarray,
    i: int,
    j: int,
) -> bool:
    return microkernels.reaching(left, i, right, j, row_bars, column_bars, masks)


@njit
def lowest_bits(masks):
    return np.array([microkernels.lowest(mask) for mask in masks])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("depth", [1, 2, 31, 512])
def test_bits_say_where_the_bar_of_the_row_or_the_column_is_reached(name: str, depth: int) -> None:
    """Small whole numbers, whose sums are exact in any order and precision used here."""
    rng = np.random.default_rng(depth)
    left, right = rng.integers(-3, 4, (2 * ROWS, depth)), rng.integers(-3, 4, (3 * COLUMNS, depth))
    low = [torch.from_numpy(side.astype(np.float32)).to(getattr(torch, name)) for side in (left, right)]
    panels = packed(low[0], ROWS), packed(low[1], COLUMNS)
    scores = left @ right.T
    row_bars, column_bars = np.quantile(scores, 0.97, axis=1), np.quantile(scores, 0.97, axis=0)
    row_bars[:3], column_bars[-5:] = np.inf, -np.inf
    masks = np.zeros(ROWS, np.uint32)
    bars = row_bars.astype(np.float32), column_bars.astype(np.float32)
    reached = scores >= np.minimum(bars[0][:, None], bars[1])
    for i in range(2):
        for j in range(3):
            some = block(*panels, *bars, masks, i, j)
            bits = masks[:, None] >> np.arange(COLUMNS, dtype=np.uint32) & 1
            truth = reached[i * ROWS : (i + 1) * ROWS, j * COLUMNS : (j + 1) * COLUMNS]
            np.testing.assert_array_equal(bits.astype(bool), truth)
            assert some == truth.any()
    assert not block(*panels, np.full_like(bars[0], np.inf), np.full_like(bars[1], np.inf), masks, 1, 1)


def test_the_lowest_bit_is_found() -> None:
    masks = np.array([1, 2, 12, 1 << 31, 0xFFFFFFFF], np.uint32)
    assert lowest_bits(masks).tolist() == [0, 1, 2, 31, 0]


def test_a_block_fits_its_mask_and_its_vectors() -> None:
    assert COLUMNS == 2 * LANES <= 32
    assert set(DTYPES) <= {"bfloat16", "float32"}


@pytest.mark.long
def test_a_processor_with_narrower_registers_finds_the_same(root: Path, tmp_path: Path) -> None:
    """The same tests, compiled for a processor with AVX2 only (any x86 processor that runs this project's wheels)."""
    code = "from operators.microkernels import *; assert (LANES, ROWS, DTYPES) == (8, 6, ('float32',)), (LANES, DTYPES)"
    environment = os.environ | AVX2 | {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True)
    tests = [f"tests/operators/test_{name}.py" for name in ("microkernels", "fused", "mixed", "neighbors")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not long", "-p", "no:xdist", *tests]
    shown = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout[-4000:]
