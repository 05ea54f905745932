import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators import engines, flat_gpu, neighbors, vectors
from operators.engines import Proposals, Wanted
from operators.errors import DeviceError
from operators.flat_gpu import FlatDeviceEngine, Side, fastest, side
from operators.gallery import shard
from operators.neighbors import ShardSearch
from operators.oracle import Oracle

WIDTH = 16
DTYPES = ("float16", "float32", "bfloat16")


class NumpyDevice:
    """What a device does: short lists, no order among ties, and scores off by most of what its arithmetic may lose."""

    name = "a device of NumPy"
    dtypes = DTYPES

    def __init__(self, limit: int = 2048, noise: float = 2e-6) -> None:
        self.limit, self.noise = limit, noise
        self.rng = np.random.default_rng(0)
        self.fetched: list[tuple[int, int, int]] = []

    def hold(self, low_ND: np.ndarray, dtype: str) -> np.ndarray:
        assert low_ND.dtype == np.float32 and low_ND.flags.c_contiguous and len(low_ND)
        return self.stored(low_ND, dtype)

    @staticmethod
    def stored(low_ND: np.ndarray, dtype: str) -> np.ndarray:
        if dtype == "bfloat16":
            assert not (low_ND.view(np.uint32) & 0xFFFF).any(), "not numbers of bf16"
        kept = low_ND.astype(np.float16 if dtype == "float16" else np.float32)
        assert (kept == low_ND).all()
        return kept

    def search(self, held: np.ndarray, queries_QD: np.ndarray, k: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        assert 1 <= k <= min(self.limit, len(held)) and len(queries_QD)
        self.fetched.append((len(held), len(queries_QD), k))
        exact = self.stored(queries_QD, dtype).astype(np.float64) @ held.astype(np.float64).T
        scores = (exact + self.noise * self.rng.choice([-1, 0, 1], exact.shape)).astype(np.float32)
        shuffled = self.rng.permutation(len(held))
        index = shuffled[np.argsort(-scores[:, shuffled], axis=1, kind="stable")[:, :k]]
        return np.take_along_axis(scores, index, axis=1), index


class Noisy(FlatDeviceEngine):
    """A wider margin, nearly all of which the device uses up: whatever forgets the margin loses pairs."""

    def margin(self, queries: Side) -> float:
        return super().margin(queries) + 1e-3


def people(seed: int, count: int, persons: int) -> np.ndarray:
    """Stored vectors with exact duplicates, near ties and clusters: everything that breaks a careless top-k."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((persons, WIDTH))
    noise = rng.choice([0.0, 1e-6, 1e-4, 0.3], (count, 1))
    raw = centres[rng.integers(persons, size=count)] + noise * rng.standard_normal((count, WIDTH))
    return vectors.normalise(raw)[0]


def lists(scored: neighbors.Scored) -> list[tuple[int, int, float]]:
    return list(zip(scored.release.tolist(), scored.gallery.tolist(), scored.cosine.tolist(), strict=True))


def assert_exact(engine: FlatDeviceEngine, queries: np.ndarray, gallery: np.ndarray, wanted: Wanted) -> None:
    """What comes of the proposals is what the oracle finds by all comparisons in fp64, to the bit."""
    rows_Q, rows_G = np.arange(len(queries)), np.arange(len(gallery))
    search = ShardSearch(shard(rows_G, gallery), "faiss", wanted)
    search.engine = engine
    found = search.tile(rows_Q, queries, 10**6)
    floor = 2.0 if wanted.floor is None else wanted.floor
    expected, turned = Oracle(rows_Q, queries, wanted.k, floor), Oracle(rows_G, gallery, wanted.columns, 2.0)
    expected.add(rows_G, gallery)
    turned.add(rows_Q, queries)
    assert lists(found.nearest) == lists(expected.best())
    assert lists(neighbors.best(found.closest.turned(), wanted.columns)) == lists(turned.best())
    assert lists(found.pairs) == lists(neighbors.ordered(expected.above()))


def opened(kind: type[FlatDeviceEngine], gallery: np.ndarray, device: Any, dtype: str) -> FlatDeviceEngine:
    """The engine over a shard's distinct vectors."""
    return kind(shard(np.arange(len(gallery)), gallery).distinct_UD, device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "noise"), [(FlatDeviceEngine, 2e-6), (Noisy, 9.5e-4)])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    k=st.sampled_from([1, 3, 10, 100]),
    columns=st.sampled_from([0, 1, 3, 40]),
    floor=st.sampled_from([None, -1.0, 0.2, 0.9, "that of a pair"]),
    rows=st.integers(1, 30),
    count=st.integers(1, 160),
    limit=st.sampled_from([1, 4, 25, 2048]),
)
def test_what_comes_of_proposals_is_what_the_oracle_finds(
    dtype: str,
    kind: type[FlatDeviceEngine],
    noise: float,
    seed: int,
    k: int,
    columns: int,
    floor: float | str | None,
    rows: int,
    count: int,
    limit: int,
) -> None:
    queries, gallery = people(seed, rows, 4), people(seed, count, 3)
    if isinstance(floor, str):
        floor = float(vectors.exact_cosines(queries[:1], gallery[:1])[0])
    engine = opened(kind, gallery, NumpyDevice(limit, noise), dtype)
    assert_exact(engine, queries, gallery, Wanted(k, columns, floor))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1e-5, 1e-3])
def test_crowds_beyond_the_longest_list_are_told_apart(dtype: str, spread: float) -> None:
    """Thousands of scores closer together than any device sees; all are over the floor too."""
    rng = np.random.default_rng(1)
    centre = rng.standard_normal(64)
    gallery = vectors.normalise(centre + spread * rng.standard_normal((5000, 64)))[0]
    queries = vectors.normalise(centre + spread * rng.standard_normal((6, 64)))[0]
    device = NumpyDevice()
    assert_exact(opened(FlatDeviceEngine, gallery, device, dtype), queries, gallery, Wanted(7, 1, 0.99))
    assert max(k for _, _, k in device.fetched) == 2048 < 5000


def test_more_wanted_than_a_list_holds() -> None:
    queries, gallery = people(3, 4, 3), people(3, 9000, 8000)
    device = NumpyDevice()
    for k, floor in ((2500, None), (2049, 0.1), (8999, None), (9001, None)):
        engine = opened(FlatDeviceEngine, gallery, device, "float16")
        assert_exact(engine, queries, gallery, Wanted(k, 0, floor))


def test_a_list_that_ends_exactly_at_the_bar_is_not_complete() -> None:
    """All cosines are 7/16, with errors of 1/16: 8/16 for the last, 6/16 for the others, the first of which wins."""

    class Scripted(NumpyDevice):
        def search(self, held: np.ndarray, queries_QD: np.ndarray, k: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
            return np.array([[0.5] + [0.375] * 39], np.float32)[:, :k], np.arange(40)[::-1][None, :k]

    class Wide(FlatDeviceEngine):
        def margin(self, queries: Side) -> float:
            return 0.0625

    gallery = np.full((40, 1), 0.4375, np.float16)
    found = Wide(gallery, Scripted(), "float16").propose(np.ones((1, 1), np.float16), Wanted(1, 0, None))
    assert 0 in found.group and set(found.cosine) == {0.4375}


def test_lists_are_as_short_as_the_answer_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scores lie apart, one list of k and a few more settles a query; lists are fetched in bounded numbers."""
    monkeypatch.setattr(flat_gpu, "ENTRIES", 100 * 26)
    rng = np.random.default_rng(2)
    queries, gallery = (vectors.normalise(rng.standard_normal((count, 64)))[0] for count in (250, 3000))
    device = NumpyDevice(noise=0.0)
    FlatDeviceEngine(gallery, device, "float16").propose(queries, Wanted(10, 0, None))
    assert device.fetched == [(3000, 100, 26), (3000, 100, 26), (3000, 50, 26)]
    monkeypatch.setattr(flat_gpu, "OWNERS", 125)
    monkeypatch.setattr(flat_gpu, "ENTRIES", 1 << 20)
    device.fetched.clear()
    FlatDeviceEngine(gallery, device, "float16").propose(queries, Wanted(10, 0, None))
    assert device.fetched == [(3000, 125, 26)] * 2


def test_rounding_and_its_residual() -> None:
    import torch

    stored = people(5, 400, 50)
    assert len(set(stored.ravel().tolist())) > 1000
    for dtype in DTYPES:
        made = side(stored, dtype)
        low = torch.from_numpy(stored).to(getattr(torch, dtype)).double().numpy()
        np.testing.assert_array_equal(made.low_ND, low)
        np.testing.assert_array_equal(made.exact_ND, stored)
        lost = np.linalg.norm(low - stored.astype(np.float64), axis=1).max()
        assert lost <= made.residual <= lost * (1 + 1e-8)


def test_tf32_holds_every_stored_number() -> None:
    """So a machine set to multiply in TF32 rounds no stored vector (10 bits after the first; exponents of fp32)."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    bits = every[np.isfinite(every)].astype(np.float32).view(np.uint32)
    assert len(bits) == 63488 and not (bits & 0x1FFF).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_margin_bounds_rounding_and_sums_of_tensor_cores(dtype: str) -> None:
    """Sums cut off, not rounded, after every addend; more is counted than the difference."""
    rng = np.random.default_rng(3)
    left, right = (vectors.normalise(np.abs(rng.standard_t(2, (300, 128))))[0] for _ in range(2))
    engine = FlatDeviceEngine(right, NumpyDevice(), dtype)
    queries = side(left, dtype)
    total = np.zeros(300, np.float32)
    for one, other in zip(queries.low_ND.T, engine.gallery.low_ND.T, strict=True):
        exact = total.astype(np.float64) + one.astype(np.float64) * other
        rounded = exact.astype(np.float32)
        total = np.where(rounded > exact, np.nextafter(rounded, np.float32(0)), rounded)
    off = np.abs(total - vectors.exact_cosines(left, right)).max()
    assert 1e-6 < off <= engine.margin(queries) < (2e-5 if dtype != "bfloat16" else 7e-3)


@pytest.mark.parametrize(("noise", "caught"), [(2e-6, False), (5e-6, True), (1e-3, True)])
def test_a_score_beyond_the_margin_is_refused(noise: float, caught: bool) -> None:
    some = people(0, 50, 5)
    engine = FlatDeviceEngine(some, NumpyDevice(noise=noise), "float16")
    if not caught:
        engine.propose(some[:9], Wanted(3, 1, None))
        return
    with pytest.raises(DeviceError, match=r"a device of NumPy is off by \d\.\d+e-\d+; .* search\.shards\.gpus=0"):
        engine.propose(some[:9], Wanted(3, 1, None))


@pytest.mark.parametrize(("score", "place"), [(np.nan, 3), (0.5, -1)])
def test_a_list_with_gaps_is_refused(score: float, place: int) -> None:
    class Broken(NumpyDevice):
        def search(self, *given: Any) -> tuple[np.ndarray, np.ndarray]:
            scores, index = super().search(*given)
            scores[-1, -1], index[-1, -1] = score, place
            return scores, index

    some = people(0, 50, 5)
    with pytest.raises(DeviceError, match="gave a list with gaps"):
        FlatDeviceEngine(some, Broken(), "float16").propose(some, Wanted(3, 0, None))


def test_nothing_against_anything_is_nothing() -> None:
    some = people(0, 5, 2)
    found = FlatDeviceEngine(some, NumpyDevice(), "float16").propose(some[:0], Wanted(3, 2, -1.0))
    assert [len(part) for part in found] == [0, 0, 0]
    assert [part.dtype for part in found] == [np.int32, np.int32, np.float64]


def test_each_pair_comes_once_with_its_exact_cosine() -> None:
    queries, gallery = people(1, 20, 4), people(2, 90, 9)
    found: Proposals = FlatDeviceEngine(gallery, NumpyDevice(), "bfloat16").propose(queries, Wanted(5, 3, 0.3))
    assert len(set(zip(found.query.tolist(), found.group.tolist(), strict=True))) == len(found.query)
    np.testing.assert_array_equal(found.cosine, vectors.exact_matrix(queries, gallery)[found.query, found.group])


def test_the_fastest_type_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    class Slow(NumpyDevice):
        def search(self, held: np.ndarray, queries_QD: np.ndarray, k: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
            time.sleep({"float16": 0.2, "float32": 0.0, "bfloat16": 0.1}[dtype])
            return super().search(held, queries_QD, k, dtype)

    some = people(0, 300, 200)
    assert fastest(some, Slow()) == ("float16", "300 vectors are too few for a trial of types")
    monkeypatch.setattr(flat_gpu, "SMALL", 0)
    monkeypatch.setattr(flat_gpu, "TRIAL", 20)
    about = FlatDeviceEngine(some, Slow()).about
    assert about["dtype"] == "float32"
    assert about["reason"].startswith("float32 is the fastest of float16 0.")
    assert about["reason"].endswith(" s for 20 x 300")


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_engine_says_what_it_is(dtype: str) -> None:
    rng = np.random.default_rng(0)
    about = FlatDeviceEngine(vectors.normalise(rng.standard_normal((9, 512)))[0], NumpyDevice(), dtype).about
    assert json.loads(json.dumps(about)) == about
    assert list(about) == ["engine", "device", "dtype", "residual", "accumulation", "margin", "reason"]
    assert (about["engine"], about["device"], about["dtype"]) == ("faiss", "a device of NumPy", dtype)
    exact = dtype != "bfloat16"
    assert about["residual"] == 0.0 if exact else 1e-3 < about["residual"] < 2.0**-8
    assert 7.6e-5 < about["accumulation"] < about["margin"] < (7.7e-5 if exact else 8e-3)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("device", [None, NumpyDevice()])
def test_the_device_is_used_where_the_process_has_one_and_faiss_sees_it(
    gpu: bool, device: NumpyDevice | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("operators.faiss_gpu.faiss_device", lambda: device)
    monkeypatch.setitem(engines._process, "gpu", gpu)
    some = people(0, 30, 20)
    engine = engines.open_engine("faiss", some, Wanted(3, 0, None))
    if gpu and device:
        assert isinstance(engine, FlatDeviceEngine) and engine.about["dtype"] == "float16"
    else:
        assert isinstance(engine, engines.FlatEngine)
        assert ("faiss sees no CUDA device" in engine.about["reason"]) == gpu
    assert len(engine.propose(some[:2], Wanted(3, 0, None)).query) >= 6
