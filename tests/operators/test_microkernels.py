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

AVX2 = "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+lzcnt"
NARROW = {"haswell": (AVX2, ("float32",)), "alderlake": (AVX2 + ",+avxvnni", ("int8", "float32"))}


@njit
def block(left, right, i, j, row_bars, row_scales, column_bars, column_scales, firsts, offsets, masks):
    return microkernels.reaching(
        left, i, right, j, row_bars, row_scales, column_bars, column_scales, firsts, offsets, masks
    )


@njit
def lowest_bits(masks):
    return np.array([microkernels.lowest(mask) for mask in masks])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("depth", [1, 2, 31, 512])
def test_bits_say_where_the_bar_of_the_row_or_the_column_is_reached(name: str, depth: int) -> None:
    """Small whole numbers, and powers of 2 as scales, so that sums are exact in any order and precision used here."""
    rng = np.random.default_rng(depth)
    left, right = rng.integers(-3, 4, (2 * ROWS, depth)), rng.integers(-3, 4, (3 * COLUMNS, depth))
    low = [torch.from_numpy(side.astype(np.float32)).to(getattr(torch, name)) for side in (left, right)]
    panels = packed(low[0], ROWS, unsigned=True), packed(low[1], COLUMNS)
    scales = [2.0 ** rng.integers(-2, 3, len(side)) for side in (left, right)]
    offsets = rng.integers(0, 3, len(right)) / 4
    scores = left @ right.T + 0.0
    if name == "int8":
        scores = scores * scales[0][:, None] * scales[1] + offsets
    row_bars, column_bars = np.quantile(scores, 0.97, axis=1), np.quantile(scores, 0.97, axis=0)
    row_bars[:3], column_bars[-5:] = np.inf, -np.inf
    bars = row_bars.astype(np.float32), column_bars.astype(np.float32)
    numbers = [scales[1].astype(np.float32), (-128 * right.sum(1)).astype(np.int32), offsets.astype(np.float32)]
    row_scales, masks = scales[0].astype(np.float32), np.zeros(ROWS, np.uint32)
    reached = scores >= np.minimum(bars[0][:, None], bars[1])
    for i in range(2):
        for j in range(3):
            some = block(*panels, i, j, bars[0], row_scales, bars[1], *numbers, masks)
            bits = masks[:, None] >> np.arange(COLUMNS, dtype=np.uint32) & 1
            truth = reached[i * ROWS : (i + 1) * ROWS, j * COLUMNS : (j + 1) * COLUMNS]
            np.testing.assert_array_equal(bits.astype(bool), truth)
            assert some == truth.any()
    never = [np.full_like(one, np.inf) for one in bars]
    assert not block(*panels, 1, 1, never[0], row_scales, never[1], *numbers, masks)


@pytest.mark.skipif("int8" not in DTYPES, reason="this processor has no VNNI")
def test_the_largest_int8_numbers_do_not_overflow() -> None:
    for left, right in ((127, 127), (-127, 127), (127, -127), (-127, -127)):
        low = [torch.full((count, 2048), value, dtype=torch.int8) for count, value in ((ROWS, left), (COLUMNS, right))]
        panels = packed(low[0], ROWS, unsigned=True), packed(low[1], COLUMNS)
        firsts = np.full(COLUMNS, -128 * right * 2048, np.int32)
        ones, masks = np.ones(COLUMNS, np.float32), np.zeros(ROWS, np.uint32)
        score = float(left * right * 2048)
        for bar, reaches in ((np.float32(score), True), (np.nextafter(np.float32(score), np.float32(np.inf)), False)):
            bars = np.full(COLUMNS, bar)
            assert block(*panels, 0, 0, bars, ones, bars, ones, firsts, 0 * ones, masks) == reaches


def test_the_lowest_bit_is_found() -> None:
    masks = np.array([1, 2, 12, 1 << 31, 0xFFFFFFFF], np.uint32)
    assert lowest_bits(masks).tolist() == [0, 1, 2, 31, 0]


def test_a_block_fits_its_mask_and_its_vectors() -> None:
    assert COLUMNS == 2 * LANES <= 32
    assert set(DTYPES) <= {"int8", "bfloat16", "float32"}


@pytest.mark.long
@pytest.mark.parametrize("processor", NARROW)
def test_a_processor_with_narrower_registers_finds_the_same(root: Path, tmp_path: Path, processor: str) -> None:
    """The same tests, compiled for processors with AVX2 only and with VNNI in 256 bits, as laptops have it."""
    features, dtypes = NARROW[processor]
    if "avxvnni" in features and "avx_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor cannot run such code")
    code = f"from operators.microkernels import *; assert (LANES, ROWS, DTYPES) == (8, 6, {dtypes}), (LANES, DTYPES)"
    numba = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | numba, check=True)
    tests = [f"tests/operators/test_{name}.py" for name in ("microkernels", "fused", "mixed", "neighbors")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not long", "-p", "no:xdist", *tests]
    shown = subprocess.run(command, cwd=root, env=os.environ | numba, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout[-4000:]
