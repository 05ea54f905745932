import os
import threading
from functools import partial
from pathlib import Path

import pytest

from cluster.faults import ClusterError, StorageError
from cluster.pool import bounded, original_errors
from cluster.resources import Resources

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


def test_an_error_in_code_arrives_as_itself_and_is_not_retried(session: None, tmp_path: Path) -> None:
    import ray

    calls = tmp_path / "calls"

    def broken() -> None:
        with calls.open("a") as file:
            file.write("called\n")
        raise LookupError("the reason")

    class Broken:
        def call(self) -> None:
            broken()

    task = ray.remote(num_cpus=0.1)(broken)
    actor = ray.remote(Broken).options(**Resources(cpus=0.1).actor_options()).remote()
    for number, call in enumerate([task.remote, actor.call.remote], 1):
        with pytest.raises(LookupError, match=r"^the reason$"):
            list(bounded([call], in_flight=2))
        assert calls.read_text() == "called\n" * number


def test_a_fault_of_storage_in_a_function_that_ray_data_maps_is_itself_again(session: None) -> None:
    import pyarrow as pa
    import ray.data

    class Failing:
        def __call__(self, unit: pa.Table) -> pa.Table:
            try:
                raise OSError("a network's own words")
            except OSError as error:
                raise StorageError("s3://b/p: cannot be read (503). Check the network.") from error

    mapped = ray.data.from_arrow(pa.table({"unit": ["u"]})).map_batches(Failing, **Resources(cpus=0.1).map_options())
    with (
        pytest.raises(StorageError, match=r"^s3://b/p: cannot be read \(503\)\. Check the network\.$"),
        original_errors(),
    ):
        list(mapped.iter_rows())


def test_a_dead_worker_that_ray_gave_up_is_one_sentence(session: None) -> None:
    import ray
    from ray.exceptions import RayError

    class Mortal:
        def die(self) -> None:
            os._exit(1)

    task = ray.remote(num_cpus=0.1, max_retries=0)(lambda: os._exit(1))
    actor = ray.remote(Mortal).options(num_cpus=0.1).remote()
    after = ray.remote(num_cpus=0.1)(lambda _: None)
    for call, what in [
        (task.remote, "a worker process"),
        (actor.die.remote, r"a worker process \(Mortal\)"),
        (actor.die.remote, r"a worker process \(Mortal\)"),  # it is dead by now
        (lambda: after.remote(task.remote()), "a worker process"),
    ]:
        with pytest.raises(ClusterError, match=f"^{what} died and Ray gave it up: .*memory.*run the same command") as e:
            list(bounded([call, call], in_flight=2))
        assert "\n" not in str(e.value)
        assert isinstance(e.value.__cause__, RayError)


def test_a_worker_that_dies_less_often_than_it_is_restarted_is_not_noticed(session: None, tmp_path: Path) -> None:
    import ray

    class Mortal:
        def lives(self, lives: Path) -> int:
            lives.write_text(lives.read_text() + "x" if lives.exists() else "x")
            if len(lives.read_text()) <= 2:
                os._exit(1)
            return len(lives.read_text())

    actor = ray.remote(Mortal).options(**Resources(cpus=0.1).actor_options()).remote()
    assert list(bounded([partial(actor.lives.remote, tmp_path / "lives")], in_flight=1)) == [3]


@pytest.mark.parametrize(
    ("kind", "given", "what"),
    [
        ("RayActorError", (), "a worker process died"),
        ("ActorDiedError", (), "a worker process died"),
        ("ActorUnavailableError", ("no answer", None), "a worker process died"),
        ("WorkerCrashedError", (), "a worker process died"),
        ("OutOfMemoryError", ("killed",), "ended by Ray because its machine was short of memory, died"),
        ("NodeDiedError", ("gone",), "a machine of the session died"),
        ("LocalRayletDiedError", (), "a machine of the session died"),
        ("ObjectLostError", ("00", None, ""), "that held data of this run died"),
        ("OwnerDiedError", ("00", None, ""), "that held data of this run died"),
        ("ObjectReconstructionFailedError", ("00",), "that held data of this run died"),
    ],
)
def test_every_kind_of_loss_is_a_cluster_error(session: None, kind: str, given: tuple[object, ...], what: str) -> None:
    from ray import exceptions

    lost = getattr(exceptions, kind)(*given)
    with pytest.raises(ClusterError, match=what) as caught, original_errors():
        raise lost
    assert caught.value.__cause__ is lost


def test_what_is_no_loss_stays_as_it_is(session: None) -> None:
    from ray.exceptions import RayActorError, TaskCancelledError

    for error in (LookupError("own"), TaskCancelledError(), RayActorError(actor_init_failed=True)):
        with pytest.raises(type(error)) as caught, original_errors():
            raise error
        assert caught.value is error
