import threading
from functools import partial

import pytest

from cluster.pool import bounded, original_errors

pytestmark = pytest.mark.ray


def test_all_results_come_and_no_more_than_allowed_are_under_way(session: None) -> None:
    import ray

    class Meter:
        def __init__(self) -> None:
            self.lock, self.now, self.most = threading.Lock(), 0, 0

        def change(self, by: int) -> int:
            with self.lock:
                self.now += by
                self.most = max(self.most, self.now)
            return self.most

    meter = ray.remote(Meter).options(num_cpus=0).remote()

    @ray.remote(num_cpus=0.1)
    def work(number: int) -> int:
        import time

        ray.get(meter.change.remote(1))
        time.sleep(0.05)
        ray.get(meter.change.remote(-1))
        return number * number

    submitted: list[int] = []

    def submit(number: int) -> object:
        submitted.append(number)
        return work.remote(number)

    results = []
    for result in bounded((partial(submit, n) for n in range(12)), in_flight=3):
        results.append(result)
        assert len(submitted) <= len(results) + 3
    assert sorted(results) == [n * n for n in range(12)]
    assert 1 <= ray.get(meter.change.remote(0)) <= 3


def test_an_error_in_code_arrives_as_itself(session: None) -> None:
    import ray

    @ray.remote(num_cpus=0.1)
    def broken() -> None:
        raise LookupError("the reason")

    with pytest.raises(LookupError, match="the reason"):
        list(bounded([broken.remote], in_flight=2))


def test_a_failure_of_the_machines_stays_rays_own(session: None) -> None:
    import os

    import ray
    from ray.exceptions import RayError

    @ray.remote(num_cpus=0.1, max_retries=0)
    def dies() -> None:
        os._exit(1)

    with pytest.raises(RayError), original_errors():
        ray.get(dies.remote())
