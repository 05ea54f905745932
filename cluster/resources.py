"""How many workers a step gets and what each may use."""

import logging
import time
from dataclasses import dataclass
from typing import Any

from cluster.faults import ClusterError

log = logging.getLogger(__name__)

POLL_S = 2.0
"""Between two looks at the machines of a growing cluster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Share of the machines for one step."""

    workers: int = 1
    """Actors of this step at most. It starts with one and grows while work is waiting."""
    cpus: float = 0.5
    """CPU share of each actor. Fractions let all steps of a chain live on a small machine."""
    gpus: float = 0.0
    """GPU share of each actor; 0 keeps the step on the CPU."""
    wait_s: float = 0.0
    """Where a cluster starts machines on demand: the longest wait until `workers` fit, or as many as there is work for.
    They are asked for; what is there when the time is over is used. 0 uses what is there now."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1. Got {self.workers}.")
        if self.cpus < 0 or self.gpus < 0:
            raise ValueError(f"cpus and gpus must not be negative. Got {self.cpus} and {self.gpus}.")
        if self.wait_s < 0:
            raise ValueError(f"wait_s must not be negative. Got {self.wait_s}.")
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
        target = min(wanted, self.workers)
        room = self._room(spare_cpus)
        if room < target and self.wait_s:
            room = self._grown(target, spare_cpus)
        if room < 1:
            import ray

            total = ray.cluster_resources()
            raise ClusterError(
                f"an actor of {self.cpus} CPUs and {self.gpus} GPUs does not fit a session of {total.get('CPU', 0):g} "
                f"CPUs and {total.get('GPU', 0):g} GPUs. Ask for a smaller share, or for a larger machine; where a "
                f"cluster starts machines on demand, give it time (`wait_s`)."
            )
        log.info("ray: %d actors (%d wanted, %d allowed, room for %d)", min(target, room), wanted, self.workers, room)
        return min(target, room)

    def _room(self, spare_cpus: float) -> int:
        """How many actors the machines of the session hold now."""
        import ray

        total = ray.cluster_resources()
        room = [int((total.get("CPU", 0.0) - spare_cpus) / self.cpus)] if self.cpus else []
        room += [int(total.get("GPU", 0.0) / self.gpus)] if self.gpus else []
        return max(0, min(room))

    def _grown(self, target: int, spare_cpus: float) -> int:
        """Ask the cluster for machines that hold `target` actors, and wait; how many there is room for."""
        from ray.autoscaler.sdk import request_resources

        log.info("ray: waiting up to %g s for machines that hold %d actors", self.wait_s, target)
        bundle = {kind: share for kind, share in (("CPU", self.cpus), ("GPU", self.gpus)) if share}
        request_resources(bundles=[bundle] * target)
        deadline = time.monotonic() + self.wait_s
        while (room := self._room(spare_cpus)) < target and time.monotonic() < deadline:
            time.sleep(min(POLL_S, self.wait_s))
        request_resources(bundles=[])  # from here on the actors themselves hold the machines
        return room

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
