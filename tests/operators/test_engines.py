import numpy as np
import pytest

from operators import engines, vectors
from operators.engines import ENGINES, Wanted


def test_the_margin_bounds_fp32_error_for_any_order_of_summation() -> None:
    rng = np.random.default_rng(5)
    left, right = (vectors.normalise(rng.standard_t(2, (4000, 512)))[0] for _ in range(2))
    exact = vectors.exact_cosines(left, right)
    worst = 0.0
    for _ in range(8):
        order = rng.permutation(512)
        products = left[:, order].astype(np.float32) * right[:, order].astype(np.float32)
        sums = np.add.accumulate(products, axis=1, dtype=np.float32)[:, -1]
        worst = max(worst, float(np.abs(sums - exact).max()))
    assert 0 < worst <= engines.margin(512)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_proposals_are_unique_pairs(engine: str) -> None:
    rng = np.random.default_rng(0)
    queries, gallery = (vectors.normalise(rng.standard_normal((n, 32)))[0] for n in (70, 300))
    wanted = Wanted(20, 3, 0.1)
    found = ENGINES[engine](gallery, wanted).propose(queries, wanted)
    assert len(set(zip(found.query.tolist(), found.group.tolist(), strict=True))) == len(found.query)


def test_auto_takes_the_engine_that_the_trial_shows_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import time

    class Slow(engines.FlatEngine):
        def propose(self, queries_QD: np.ndarray, wanted: Wanted) -> engines.Proposals:
            time.sleep(0.2)
            return super().propose(queries_QD, wanted)

    gallery = vectors.normalise(np.random.default_rng(0).standard_normal((50, 8)))[0]
    monkeypatch.setattr(engines, "SMALL", 0)
    monkeypatch.setattr(
        engines, "ENGINES", {"slow": lambda held, _: Slow(held), "quick": lambda held, _: engines.FlatEngine(held)}
    )
    caplog.set_level("INFO")
    assert not isinstance(engines.open_engine("auto", gallery, Wanted(3, 0, None)), Slow)
    assert "engine quick: fastest of slow 0.2" in caplog.text
