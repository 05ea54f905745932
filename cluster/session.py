"""One Ray session per audit: a private local one by default, or a running cluster."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """Where Ray runs."""

    address: str = ""
    """Empty: a local session for this run only. Else the address of a running cluster, or `auto`."""
    cpus: int = 0
    """CPUs of a local session; 0 takes all that this process may use."""
    object_store_mb: int = 1024
    """Shared memory of a local session, in MiB."""

    def __post_init__(self) -> None:
        if self.cpus < 0:
            raise ValueError(f"cpus must not be negative. Got {self.cpus}.")
        if self.object_store_mb < 128:
            raise ValueError(f"object_store_mb must be at least 128. Got {self.object_store_mb}.")


@contextmanager
def ray_session(config: SessionConfig) -> Iterator[None]:
    """Hold a Ray session; shut it down at the end if it was started here.

    A local session has no dashboard, reports no usage statistics and asks for a token on its loopback ports.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    started = not ray.is_initialized()
    if started:
        _start(config)
    _quiet_data()
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _start(config: SessionConfig) -> None:
    import ray

    if config.address:
        with _without_notices():
            ray.init(address=config.address, log_to_driver=False, logging_level=logging.WARNING)
        log.info("ray: joined the cluster at %s", config.address)
        return
    cpus = config.cpus or len(os.sched_getaffinity(0))
    with _without_notices():
        ray.init(
            num_cpus=cpus,
            object_store_memory=config.object_store_mb * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        _hear_once()
    log.info("ray: local session, %d CPUs, %d MiB object store", cpus, config.object_store_mb)


@contextmanager
def _without_notices() -> Iterator[None]:
    """Drop what Ray writes straight to stderr while a session starts; faults still come as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Nobody:
    """An actor that is never run."""

    def __init__(self, _: object) -> None:
        """Take what Ray's notice is about: an argument in the object store."""


def _hear_once() -> None:
    """Provoke a notice that Ray gives once per process, while nobody listens.

    It says, at error level, that restartable actors have arguments in the object store (Ray issue 53727). Every actor
    pool of Ray Data is made like that; Ray Data keeps the arguments alive itself, so here it warns of nothing.
    """
    import ray

    actor = ray.remote(_Nobody).options(num_cpus=0, max_restarts=1).remote(ray.put(None))
    ray.kill(actor)


def _quiet_data() -> None:
    """Ray Data's own progress bars and notes stay off: the audit reports its own progress."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
