"""One Ray session per audit: a private local one by default, or a running cluster that asks for a token."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.access import is_loopback, make_token, one_line, require_closed, require_token
from cluster.faults import ClusterError
from cluster.scratch import scratch

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
    insecure: bool = False
    """Join a cluster on other machines although it asks for no token, or none is configured here. Whoever reaches such
    a cluster can run code on it and read what it reads."""

    def __post_init__(self) -> None:
        if self.cpus < 0:
            raise ValueError(f"cpus must not be negative. Got {self.cpus}.")
        if self.object_store_mb < 128:
            raise ValueError(f"object_store_mb must be at least 128. Got {self.object_store_mb}.")


@contextmanager
def ray_session(config: SessionConfig) -> Iterator[None]:
    """Hold a Ray session; shut it down at the end if it was started here.

    A local session has no dashboard, reports no usage statistics, asks for a token on its loopback ports, and keeps its
    logs, sockets and spilled objects in a private folder (0700) that goes with it; UNVEIL_DEBUG=1 keeps the folder.

    Raises
    ------
    ClusterError
        If a cluster is not there, or it is elsewhere and no token protects it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _ask_for_tokens()
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_task_oom_retries", "3")  # Ray's own rule: a task that was killed for memory, without end
    import ray

    if ray.is_initialized():
        _quiet_data()
        yield
        return
    with _joined(config) if config.address else _started(config):
        _quiet_data()
        yield


def _ask_for_tokens() -> None:
    """Token authentication on, unless the environment says otherwise."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if "ray" in sys.modules:  # which has read its settings when it was imported
        from ray._raylet import Config  # type: ignore[attr-defined]

        Config.initialize("")


@contextmanager
def _joined(config: SessionConfig) -> Iterator[None]:
    """Hold a connection to a running cluster."""
    import ray
    from ray.exceptions import AuthenticationError

    where = os.environ.get("RAY_ADDRESS", "auto") if config.address == "auto" else config.address
    require_token(where, insecure=config.insecure, option="ray.insecure")
    try:
        # Not muted: where the head dies just now, Ray ends this process, and its last words are all there is to read.
        joined = ray.init(address=config.address, log_to_driver=False, logging_level=logging.WARNING)
        with _without_notices():
            _hear_once()
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise ClusterError(f"the cluster at {where} cannot be joined: {one_line(error)}") from error
    log.info("ray: joined the cluster at %s", where)
    try:
        page = f"http://{joined.dashboard_url}"
        if joined.dashboard_url and not is_loopback(page):
            require_closed(page, insecure=config.insecure, option="ray.insecure")
        yield
    finally:
        ray.shutdown()


@contextmanager
def _started(config: SessionConfig) -> Iterator[None]:
    """Hold a local session."""
    import ray

    cpus = config.cpus or len(os.sched_getaffinity(0))
    make_token()
    with scratch() as folder:
        try:
            with _without_notices():
                ray.init(
                    address="local",  # whatever RAY_ADDRESS says
                    num_cpus=cpus,
                    object_store_memory=config.object_store_mb * 2**20,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    _temp_dir=str(folder),
                )
                _hear_once()
        except RuntimeError as error:
            ray.shutdown()
            raise ClusterError(
                f"a local Ray session did not start: {one_line(error)} UNVEIL_DEBUG=1 keeps its logs."
            ) from error
        try:
            log.info("ray: local session, %d CPUs, %d MiB object store", cpus, config.object_store_mb)
            yield
        finally:
            ray.shutdown()


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
