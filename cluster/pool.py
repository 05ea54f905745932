"""Bounded streaming of remote calls."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster import faults
from cluster.faults import ClusterError


def bounded(calls: Iterable[Callable[[], Any]], in_flight: int) -> Iterator[Any]:
    """Results of remote calls in the order in which they end, with at most `in_flight` under way.

    Parameters
    ----------
    calls
        Functions that submit one remote call each and return its object reference; taken lazily.
    in_flight
        Largest number of unfinished calls, at least 1.

    Raises
    ------
    Exception
        The original exception of the first call that failed by an error in code; the others are cancelled.
    ClusterError
        If a worker was lost more often than Ray starts it again.
    """
    import ray

    waiting: list[Any] = []
    source = iter(calls)
    try:
        while True:
            while len(waiting) < in_flight and (call := next(source, None)) is not None:
                waiting.append(call())
            if not waiting:
                return
            done, waiting = ray.wait(waiting, num_returns=1)
            with original_errors():
                result = ray.get(done[0])
            yield result
    finally:
        for reference in waiting:
            ray.cancel(reference, force=False)


@contextmanager
def original_errors() -> Iterator[None]:
    """Raise what the code of a remote call raised, instead of Ray's wrapping of it.

    What Ray could not bring back (a process, a machine, or what it held) is raised as ClusterError, with Ray's own
    account as its cause. Errors in code are not retried; lost workers were, as often as their options say.

    Ray keeps only the text of an error in an actor's constructor, and Ray Data only that of an error in a function that
    it maps. Neither should therefore do what a user's mistake can break, or else report it as a value. Errors of
    `cluster.faults`, such as a store that cannot be reached for a while, are made again from the text.
    """
    from ray.exceptions import RayError, RayTaskError, UserCodeException

    try:
        yield
    except RayTaskError as error:
        original = error.cause if isinstance(error.cause, Exception) else error
        told = _told(str(error)) if isinstance(original, UserCodeException) else None
        raise _lost(original) or told or original from error
    except RayError as error:
        lost = _lost(error)
        if lost is None:
            raise
        raise lost from error


def _told(text: str) -> ClusterError | None:
    """The first error of `cluster.faults` in the text of a traceback."""
    for name, message in re.findall(r"^cluster\.faults\.(\w+): (.+)$", text, re.MULTILINE):
        kind = getattr(faults, name, None)
        if isinstance(kind, type) and issubclass(kind, ClusterError):
            return kind(message)
    return None


def _lost(error: Exception) -> ClusterError | None:
    """The sentence for a process or machine that died and was given up, or None if `error` is of another kind."""
    from ray import exceptions

    if isinstance(error, exceptions.RayActorError):
        if error.actor_init_failed:
            return None
        named = re.search(r"class_name: (?:\S+\.)?(\w+)", str(error))
        what = f"a worker process ({named[1]})" if named else "a worker process"
    elif isinstance(error, exceptions.WorkerCrashedError):
        what = "a worker process"
    elif isinstance(error, exceptions.OutOfMemoryError):
        what = "a worker process, ended by Ray because its machine was short of memory,"
    elif isinstance(error, exceptions.NodeDiedError | exceptions.LocalRayletDiedError):
        what = "a machine of the session"
    elif isinstance(error, exceptions.ObjectLostError):
        what = "a worker process or machine that held data of this run"
    else:
        return None
    return ClusterError(
        f"{what} died and Ray gave it up: most likely its machine ran out of memory, or went away. What is done is "
        f"kept, so run the same command again; if it dies again, give fewer workers, larger shares (`cpus`), or a "
        f"smaller `search.shard_images`."
    )
