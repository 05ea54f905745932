"""Whether the head of a joined cluster still answers.

When it does not, Ray ends the process of a driver from outside Python, and says so in its own words. A watch that is a
little less patient leaves the program time for its own.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RAYS_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
RAYS_PATIENCE_S = 60.0
"""Ray's own patience where the environment does not say."""
SHARE = 0.75
"""Our patience as a share of Ray's."""
LOOKS = 8
"""Looks within our patience; all of them must fail."""


@contextmanager
def head_watched(address: str, gone: Callable[[str], None]) -> Iterator[None]:
    """Call `gone` once, from another thread, if nobody listens at `address` (host:port) any more.

    A head that comes back within Ray's patience, as heads that keep their state elsewhere do, is waited for.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(address, gone, ended), name="head watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(address: str, gone: Callable[[str], None], ended: threading.Event) -> None:
    patience_s = SHARE * float(os.environ.get(RAYS_PATIENCE, RAYS_PATIENCE_S))
    failed = 0
    while not ended.wait(patience_s / LOOKS):
        failed = 0 if _listens(address, patience_s / LOOKS) else failed + 1
        if failed == LOOKS:
            gone(
                f"the head of the cluster at {address} has not answered for {patience_s:g} s: it ended, or the network "
                f"between here and there did. What is done is kept, so run the same command again when it is back."
            )
            return


def _listens(address: str, timeout_s: float) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except OSError:
        return False
    return True
