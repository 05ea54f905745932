"""Bounded streaming of remote calls."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


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

    Ray keeps only the text of an error in an actor's constructor, and Ray Data only that of an error in a function that
    it maps. Neither should therefore do what a user's mistake can break, or else report it as a value.
    """
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from error
