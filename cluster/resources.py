"""How many workers a step gets and what each may use."""

import logging
from dataclasses import dataclass
from typing import Any

from cluster.faults import ClusterError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Share of the machines for one step."""

    workers: int = 1
    """Actors of this step at most. It starts with one and grows while work is waiting."""
    cpus: float = 0.5
    """CPU share of each actor. Fractions let all steps of a chain live on a small machine."""
    gpus: float = 0.0
    """GPU share of each actor; 0 keeps the step on the CPU."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1. Got {self.workers}.")
        if self.cpus < 0 or self.gpus < 0:
            raise ValueError(f"cpus and gpus must not be negative. Got {self.cpus} and {self.gpus}.")
        if self.cpus == 0 and self.gpus == 0:
            raise ValueError("cpus and gpus are both 0; give the step a share of something.")

    def actor_options(self) -> dict[str, Any]:
        """Options for `ray.remote` actors: restarted when their process or node dies, never for an error in code."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": 3, "max_task_retries": 3}

    def fitting(self, wanted: int, *, spare_cpus: float = 0.5) -> int:
        """How many actors of this step to start: `wanted`, `workers`, or what the session's machines hold, if fewer.

        More would wait for a place for ever while the rest waits for them. `spare_cpus` is left to tasks.

        Raises
        ------
        ClusterError
            If not even one fits.
        """
        import ray

        total = ray.cluster_resources()
        cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
        room = [int((cpus - spare_cpus) / self.cpus)] if self.cpus else []
        room += [int(gpus / self.gpus)] if self.gpus else []
        if min(room) < 1:
            raise ClusterError(
                f"an actor of {self.cpus} CPUs and {self.gpus} GPUs does not fit a session of {cpus:g} CPUs and "
                f"{gpus:g} GPUs. Ask for a smaller share, or for a larger machine."
            )
        chosen = min(wanted, self.workers, *room)
        log.info("ray: %d actors (%d wanted, %d allowed, room for %d)", chosen, wanted, self.workers, min(room))
        return chosen

    def map_options(self, *, at_least: int = 1) -> dict[str, Any]:
        """Options for `Dataset.map_batches` over units: one row, as Arrow, in a pool of actors.

        As many actors as fit, but no more than `at_least`, start together; more are started while work is waiting. Ray
        Data replaces an actor that dies and does its unit again, for ever: who maps must count attempts.

        Raises
        ------
        ClusterError
            If more than one is asked for and not even one fits.
        """
        from ray.data import ActorPoolStrategy

        first = 1 if at_least <= 1 else self.fitting(at_least, spare_cpus=0.0)
        return {
            "compute": ActorPoolStrategy(min_size=first, max_size=max(first, self.workers)),
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "batch_size": 1,
            "batch_format": "pyarrow",
        }
