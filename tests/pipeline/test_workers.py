from pathlib import Path

import pyarrow as pa

from cluster.storage import Store
from pipeline.workers import MOST_ATTEMPTS, Attempts

UNIT = pa.table({"unit": ["u"], "members": [[{"key": "a"}, {"key": "b"}]]})


def test_a_unit_that_ended_too_many_workers_is_not_tried_again(tmp_path: Path) -> None:
    """Each attempt is by another worker, which knows of the others by the store alone."""
    assert [Attempts(Store(tmp_path), "embed").begin(UNIT) for _ in range(MOST_ATTEMPTS)] == [None] * MOST_ATTEMPTS
    assert Attempts(Store(tmp_path), "prepare").begin(UNIT) is None
    refused = Attempts(Store(tmp_path), "embed").begin(UNIT)
    assert refused == f"{MOST_ATTEMPTS} workers died one after the other in the step embed of unit u, 2 images."
    Store(tmp_path).sweep()
    assert Attempts(Store(tmp_path), "embed").begin(UNIT) is None


def test_a_unit_that_was_survived_starts_afresh(tmp_path: Path) -> None:
    attempts = Attempts(Store(tmp_path), "embed")
    for _ in range(2 * MOST_ATTEMPTS):
        assert attempts.begin(UNIT) is None
        attempts.end(UNIT)
    assert list(tmp_path.iterdir()) == []
