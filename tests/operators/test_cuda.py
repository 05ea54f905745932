import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import mixed, vectors
from operators.cuda import DeviceEngine, DevicePass, Pairs, below, tile_shape, usable_device
from operators.engines import Proposals, Wanted
from operators.errors import AuditError, DeviceError

WIDTH = 16
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
on_devices = pytest.mark.parametrize("device", DEVICES)


class Noisy(DeviceEngine):
    """A wider margin, and scores off by nearly all of it, up or down: whatever forgets the margin loses pairs."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.margin = 1e-3

    def scores(self, left_MD: torch.Tensor, right_ND: torch.Tensor) -> torch.Tensor:
        clean = super().scores(left_MD, right_ND)
        sign = torch.from_numpy(np.random.default_rng(clean.numel()).choice([-1.0, 1.0], tuple(clean.shape)))
        return (clean.double() + 0.9 * self.margin * sign.to(clean.device)).float()


def people(seed: int, count: int, persons: int) -> np.ndarray:
    """Stored vectors with exact duplicates, near ties and clusters: everything that breaks a careless top-k."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((persons, WIDTH))
    noise = rng.choice([0.0, 1e-6, 1e-4, 0.3], (count, 1))
    raw = centres[rng.integers(persons, size=count)] + noise * rng.standard_normal((count, WIDTH))
    return vectors.normalise(raw)[0]


def oracle(queries: np.ndarray, gallery: np.ndarray, wanted: Wanted) -> dict[tuple[int, int], float]:
    """The wanted pairs and their exact cosines, from a plain fp64 product and full sorts."""
    scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
    keep = np.zeros(scores.shape, bool)
    np.put_along_axis(keep, np.argsort(-scores, axis=1, kind="stable")[:, : wanted.k], True, axis=1)
    np.put_along_axis(keep, np.argsort(-scores, axis=0, kind="stable")[: wanted.columns], True, axis=0)
    if wanted.floor is not None:
        keep |= scores >= wanted.floor
    return {(int(q), int(g)): float(scores[q, g]) for q, g in zip(*np.nonzero(keep), strict=True)}


def assert_equal(found: Proposals, expected: dict[tuple[int, int], float]) -> None:
    """Each wanted pair once, no other, and every cosine with the oracle's bits."""
    assert (found.query.dtype, found.group.dtype, found.cosine.dtype) == (np.int32, np.int32, np.float64)
    assert len(found.query) == len(expected)
    pairs = zip(found.query.tolist(), found.group.tolist(), strict=True)
    assert dict(zip(pairs, found.cosine.tolist(), strict=True)) == expected


@on_devices
@pytest.mark.parametrize("engine", [DeviceEngine, Noisy])
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    k=st.sampled_from([1, 3, 10, 500]),
    columns=st.sampled_from([0, 1, 3, 40]),
    floor=st.sampled_from([None, -1.0, 0.2, 0.9, "that of a pair"]),
    rows=st.integers(1, 40),
    count=st.integers(1, 160),
    tile_bytes=st.sampled_from([4, 400, 4000, 1 << 20]),
    room=st.sampled_from([0, 5, 50, 10**6]),
)
def test_proposals_are_the_wanted_pairs_bit_for_bit(
    device: str,
    engine: type[DeviceEngine],
    seed: int,
    k: int,
    columns: int,
    floor: float | str | None,
    rows: int,
    count: int,
    tile_bytes: int,
    room: int,
) -> None:
    if tile_bytes == 4:  # one score a tile
        rows, count = min(rows, 6), min(count, 12)
    queries, gallery = people(seed, rows, 4), people(seed, count, 3)
    if isinstance(floor, str):
        floor = float(vectors.exact_cosines(queries[:1], gallery[:1])[0])
    wanted = Wanted(k, columns, floor)
    found = engine(gallery, torch.device(device), tile_bytes, room).propose(queries, wanted)
    assert_equal(found, oracle(queries, gallery, wanted))


@on_devices
@pytest.mark.parametrize("engine", [DeviceEngine, Noisy])
@pytest.mark.parametrize("wanted", [Wanted(5, 0, None), Wanted(100, 3, None), Wanted(10, 2, 0.99)])
def test_first_bars_from_samples_lose_nothing(
    device: str, engine: type[DeviceEngine], wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples smaller than the data, as they are in use."""
    monkeypatch.setattr("operators.cuda.ROW_SAMPLE", 64)
    monkeypatch.setattr("operators.cuda.COLUMN_SAMPLE", 32)
    queries, gallery = people(1, 500, 40), people(1, 3000, 40)
    found = engine(gallery, torch.device(device), 40_000, 2000).propose(queries, wanted)
    assert_equal(found, oracle(queries, gallery, wanted))


@on_devices
@pytest.mark.parametrize("copies", [1, 400])
def test_ties_at_the_last_place_go_to_the_lower_index(device: str, copies: int) -> None:
    """All axes are equally far from their mean direction, so every pair ties."""
    gallery = np.eye(WIDTH, dtype=np.float16).repeat(copies, axis=0)
    queries = np.full((9, WIDTH), 0.25, np.float16)
    found = DeviceEngine(gallery, torch.device(device), 1000, 30).propose(queries, Wanted(5, 2, None))
    low = {(q, g) for q in range(9) for g in range(5)} | {(q, g) for q in range(2) for g in range(len(gallery))}
    assert set(zip(found.query.tolist(), found.group.tolist(), strict=True)) == low
    assert set(found.cosine.tolist()) == {0.25}


@on_devices
@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-4])
def test_crowds_within_the_margin_are_told_apart_in_bounded_memory(
    device: str, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores closer together than the margin sees: all pass all bars, few may be held."""
    rng, room, most = np.random.default_rng(1), 500, []
    centre = rng.standard_normal(64)
    gallery = vectors.normalise(centre + spread * rng.standard_normal((2000, 64)))[0]
    queries = vectors.normalise(centre + spread * rng.standard_normal((60, 64)))[0]
    wanted = Wanted(7, 1, None)
    kept = DevicePass._wanted_of

    def counted(self: DevicePass, pairs: Pairs) -> Pairs:
        most.append(len(pairs.query))
        return kept(self, pairs)

    monkeypatch.setattr(DevicePass, "_wanted_of", counted)
    found = DeviceEngine(gallery, torch.device(device), 1 << 16, room).propose(queries, wanted)
    assert_equal(found, oracle(queries, gallery, wanted))
    answer = 60 * 7 + 2000
    assert max(most) <= 3 * (room + answer) < 60 * 2000 / 10


def hard(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of stored vectors whose products are hard to add: heavy tails, cancellation, many small after a large."""
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(2, (200, width))
    flat = np.where(np.arange(width) < 1, 1.0, 2.0**-9 * rng.uniform(1, 2, (200, width)))
    turned = heavy * np.where(np.arange(width) < width // 2, 1, -1)
    left = vectors.normalise(np.concatenate([heavy, heavy, flat, np.ones((1, width)), np.abs(heavy)]))[0]
    right = vectors.normalise(np.concatenate([heavy, turned, flat, np.ones((1, width)), np.abs(heavy[::-1])]))[0]
    return left, right


@on_devices
@pytest.mark.parametrize("width", [3, 128, 512, 513])
def test_no_score_is_further_off_than_the_margin(device: str, width: int) -> None:
    left, right = hard(width)
    engine = DeviceEngine(right, torch.device(device))
    mixed.exact_products()
    scores = engine.scores(torch.from_numpy(left).to(device), engine.gallery_GD)
    assert scores.dtype == torch.float32
    off = np.abs(scores.double().cpu().numpy() - vectors.exact_matrix(left, right)).max()
    assert 0 < off <= engine.margin
    assert width > 512 or engine.margin < 7.7e-5


@on_devices
def test_bars_are_rounded_down(device: str) -> None:
    bars = torch.tensor([0.1, 0.3, 1 / 3, 0.5, 0.0, -0.7, -torch.inf], dtype=torch.float64, device=device)
    low = below(bars)
    assert low.dtype == torch.float32 and (low.double() <= bars).all() and (low[:-1].double() > bars[:-1] - 2e-7).all()


@on_devices
def test_exact_scores_are_the_stored_vectors_products(device: str) -> None:
    left, right = hard(512)
    engine = DeviceEngine(right, torch.device(device))
    exact = engine.exact(torch.from_numpy(left).to(device), engine.gallery_GD)
    np.testing.assert_array_equal(exact.cpu().numpy(), vectors.exact_cosines(left, right))


@on_devices
def test_a_product_that_breaks_its_bound_is_refused(device: str) -> None:
    class Broken(DeviceEngine):
        def scores(self, left_MD: torch.Tensor, right_ND: torch.Tensor) -> torch.Tensor:
            return super().scores(left_MD, right_ND) + 2e-5

    gallery = people(0, 50, 5)
    assert issubclass(DeviceError, AuditError)  # which the command line shows as one line
    with pytest.raises(DeviceError, match=r"is off by 2\.\d\de-05; its arithmetic allows 2\.\d\de-06.*shards\.gpus=0"):
        Broken(gallery, torch.device(device)).propose(gallery[:5], Wanted(3, 0, None))


@on_devices
def test_nothing_against_anything_is_nothing(device: str) -> None:
    some = people(0, 5, 2)
    for queries, gallery in [(some[:0], some), (some, some[:0])]:
        found = DeviceEngine(gallery, torch.device(device)).propose(queries, Wanted(3, 2, -1.0))
        assert_equal(found, {})


def test_reduced_precision_is_switched_off_before_products(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Watched(DeviceEngine):
        def scores(self, left_MD: torch.Tensor, right_ND: torch.Tensor) -> torch.Tensor:
            order.append("product")
            return super().scores(left_MD, right_ND)

    monkeypatch.setattr(mixed, "exact_products", lambda: order.append("exact"))
    some = people(0, 5, 2)
    Watched(some, torch.device("cpu")).propose(some, Wanted(1, 0, None))
    assert order[0] == "exact" and "product" in order


@on_devices
def test_an_engine_says_what_it_is(device: str) -> None:
    about = DeviceEngine(np.zeros((1, 512), np.float16), torch.device(device)).about
    assert json.loads(json.dumps(about)) == about
    assert list(about) == ["engine", "device", "dtype", "residual", "accumulation", "margin", "reason"]
    assert about["residual"] == 0.0 and 7.6e-5 < about["accumulation"] < about["margin"] < 7.7e-5


@pytest.mark.parametrize("tile_bytes", [1, 4, 4000, 1 << 20, 1 << 30, 1 << 40])
def test_tiles_fit_their_memory_and_cover_something(tile_bytes: int) -> None:
    for queries in (1, 7, 5000, 70_000):
        for gallery in (1, 300, 1_000_000):
            height, width = tile_shape(queries, gallery, tile_bytes)
            assert 1 <= height <= queries and 1 <= width <= gallery
            assert height * width <= max(1, min(tile_bytes // 4, 1 << 30))
            whole = height == queries and width == gallery
            assert whole or width == gallery or width % 128 == 0 or width <= 128


def test_the_device_is_one_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_device() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert usable_device() == torch.device("cuda", 1)
