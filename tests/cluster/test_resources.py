import pytest

from cluster import resources
from cluster.faults import ClusterError
from cluster.resources import Resources


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"workers": 0}, "workers must be at least 1. Got 0."),
        ({"cpus": -1}, "must not be negative"),
        ({"cpus": 0, "gpus": 0}, "both 0"),
        ({"wait_s": -1}, "wait_s must not be negative"),
    ],
)
def test_impossible_shares_are_refused(options: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Resources(**options)


def test_actors_are_restarted_after_system_faults() -> None:
    options = Resources(workers=3, cpus=0.25, gpus=0.5).actor_options()
    assert options["num_cpus"] == 0.25 and options["num_gpus"] == 0.5
    assert options["max_restarts"] > 0 and options["max_task_retries"] > 0


@pytest.mark.ray
def test_a_map_takes_units_one_at_a_time_as_arrow(session: None) -> None:
    options = Resources(workers=3).map_options()
    assert (options["batch_size"], options["batch_format"]) == (1, "pyarrow")
    assert (options["compute"].min_size, options["compute"].max_size) == (1, 3)


class Growing:
    """A cluster that has 1 CPU, and 2 more at each look after it was asked for them."""

    def __init__(self, patch: pytest.MonkeyPatch, most: float) -> None:
        import ray
        import ray.autoscaler.sdk

        self.cpus, self.most, self.asked = 1.0, most, []
        patch.setattr(ray, "cluster_resources", self.look)
        patch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: self.asked.append(bundles))
        patch.setattr(resources, "POLL_S", 0.001)

    asked: list[list[dict[str, float]]]

    def look(self) -> dict[str, float]:
        now = {"CPU": self.cpus, "GPU": 0.0}
        if self.asked and self.asked[-1]:
            self.cpus = min(self.most, self.cpus + 2)
        return now


@pytest.mark.ray
def test_a_growing_cluster_is_asked_and_waited_for(session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Growing(monkeypatch, most=64)
    assert Resources(workers=6, cpus=1, wait_s=60).fitting(9) == 6
    assert cluster.asked == [[{"CPU": 1}] * 6, []], "asked for what is needed, and let go of"
    assert Resources(workers=6, cpus=1, wait_s=60).fitting(2) == 2
    assert len(cluster.asked) == 2, "what fits already is not asked for"


@pytest.mark.ray
def test_a_cluster_that_stops_growing_gives_what_it_has(session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Growing(monkeypatch, most=3)
    assert Resources(workers=6, cpus=1, wait_s=0.05).fitting(9, spare_cpus=0) == 3
    cluster = Growing(monkeypatch, most=64)
    assert Resources(workers=6, cpus=0.25).fitting(9) == 2, "without wait_s, what is there now"
    assert not cluster.asked


@pytest.mark.ray
def test_no_more_actors_are_started_than_the_session_holds(session: None) -> None:
    """Two CPUs: actors beyond them would wait for ever, and the search with them."""
    assert Resources(workers=64, cpus=0.5).fitting(100) == 3
    assert Resources(workers=2, cpus=0.5).fitting(100) == 2
    assert Resources(workers=64, cpus=0.5).fitting(1) == 1
    with pytest.raises(ClusterError, match=r"4 CPUs and 0\.0 GPUs does not fit a session of 2 CPUs and 0 GPUs"):
        Resources(cpus=4).fitting(1)
    with pytest.raises(ClusterError, match="does not fit"):
        Resources(cpus=0.1, gpus=1).fitting(1)
