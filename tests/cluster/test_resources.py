import pytest

from cluster.faults import ClusterError
from cluster.resources import Resources


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"workers": 0}, "workers must be at least 1. Got 0."),
        ({"cpus": -1}, "must not be negative"),
        ({"cpus": 0, "gpus": 0}, "both 0"),
    ],
)
def test_impossible_shares_are_refused(options: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Resources(**options)


def test_actors_are_restarted_after_system_faults() -> None:
    options = Resources(workers=3, cpus=0.25, gpus=0.5).actor_options()
    assert options["num_cpus"] == 0.25 and options["num_gpus"] == 0.5
    assert options["max_restarts"] > 0 and options["max_task_retries"] > 0


def test_a_map_takes_units_one_at_a_time_as_arrow() -> None:
    options = Resources(workers=3).map_options()
    assert (options["batch_size"], options["batch_format"]) == (1, "pyarrow")
    assert (options["compute"].min_size, options["compute"].max_size) == (1, 3)


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
