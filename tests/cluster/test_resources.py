import pytest

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
