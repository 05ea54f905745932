"""The forecast of a search: sizes against the arrays and files themselves, and costs that explain measured times."""

import io
import tracemalloc

import numba
import numpy as np
import pyarrow.parquet as pq
import pytest

from operators import forecast, mixed, tilepass
from operators.engines import Wanted
from operators.gallery import shard
from operators.mixed import MixedEngine
from operators.neighbors import ShardSearch
from operators.operands import Form, forms
from operators.results import tile_table
from operators.vectors import normalise

WANTED = Wanted(20, 3, 0.95)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return normalise(np.random.default_rng(3).standard_normal((6_000, 128), np.float32))[0]


def held(part: object) -> int:
    """Bytes of all arrays that hang on an object."""
    if isinstance(part, np.ndarray):
        return part.nbytes
    if hasattr(part, "element_size"):
        return part.element_size() * part.nelement()
    if isinstance(part, tuple):
        return sum(map(held, part))
    return sum(map(held, vars(part).values())) if hasattr(part, "__dict__") and not callable(part) else 0


@pytest.mark.parametrize("form", forms(), ids=str)
def test_memory_of_a_shard_is_at_least_that_of_its_arrays_and_at_most_twice(vectors: np.ndarray, form: Form) -> None:
    part = shard(np.arange(5_000), vectors[:5_000])
    found = held(part) + held(MixedEngine(part.distinct_UD, form))
    assert found <= forecast.shard_bytes(5_000, 128) <= 2 * found


@pytest.mark.parametrize("form", forms(), ids=str)
def test_memory_of_a_tile_whose_pairs_all_tie_is_at_most_what_is_forecast(
    monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    monkeypatch.setattr(tilepass, "BUDGET", 50_000)
    monkeypatch.setattr(tilepass, "ROOM", 4096)
    for module in (tilepass, mixed):
        monkeypatch.setattr(module, "CHUNK", 64)
    queries, gallery = np.eye(8, dtype=np.float16)[[0] * 1024], np.eye(8, dtype=np.float16)[[1] * 2000]
    wanted, engine = Wanted(1, 3, None), MixedEngine(gallery, form)
    engine.propose(queries[:5], wanted)  # compiles
    tracemalloc.start()
    engine.propose(queries, wanted)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found <= forecast.tile_bytes(1024, 2000, 8, wanted, numba.get_num_threads()) <= 2 * found


def test_bytes_of_a_tile_on_disk_are_within_a_factor_of_two(vectors: np.ndarray) -> None:
    tile = ShardSearch(shard(np.arange(5_000), vectors[:5_000]), "faiss", WANTED).tile(
        np.arange(900), vectors[5_000:5_900], 99
    )
    sink = io.BytesIO()
    pq.write_table(tile_table(tile), sink, compression="zstd")
    found = len(sink.getvalue())
    assert found / 2 <= forecast.stored_bytes(900, 5_000, WANTED) <= 2 * found


def test_costs_are_recovered_from_times_that_they_explain() -> None:
    rows = [(q * g, q, g) for q, g in forecast.TRIALS]
    truth = np.array([3e-9, 2e-5, 1e-6])
    assert forecast._fit(rows, np.array(rows) @ truth) == pytest.approx(tuple(truth), rel=1e-6)
    noisy = forecast._fit(rows, [0.1, 0.2, 0.05])
    assert min(noisy) >= 0


def test_seconds_add_up_over_tiles_and_shards_and_shrink_with_threads() -> None:
    speed = forecast.Speed(1e-9, 1e-6, 1e-7, 1e-5, "any")
    one = forecast.seconds_of(speed, [(1_000, 2_000), (500, 2_000)], [2_000], 1)
    assert one == pytest.approx(1e-9 * 3e6 + 1e-6 * 1_500 + 1e-7 * 4_000 + 1e-5 * 2_000)
    assert forecast.seconds_of(speed, [(1_000, 2_000), (500, 2_000)], [2_000], 4) == pytest.approx(one / 4)


def test_a_trial_takes_the_engine_that_a_shard_of_this_size_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "TRIALS", ((32, 600), (32, 100), (64, 600)))
    assert forecast.measure(16, "auto", WANTED, 100).engine == "faiss"
    found = forecast.measure(16, "mixed", WANTED, 100)
    assert found.engine == "mixed" and min(found[:4]) >= 0 and found.load > 0
