"""The machines of a cluster before work is spread over them: the same code, the same files, the same folders.

Each machine that can hold workers is asked by a task of its own. Without this, a machine with older code would add its
own kind of rows, one without the sets would report every image of its share as missing, and one that does not share the
run folder would commit tables where nobody finds them.
"""

import importlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cluster.faults import StorageError, UnlikeNodes
from cluster.pool import original_errors
from cluster.storage import ASIDE, Store

log = logging.getLogger(__name__)

ANSWER_S = 180.0
"""How long a machine may take to start a first worker and to answer."""
LEAVE_S = 15.0
"""How long it may take until a machine whose task was lost is known to be gone."""
ATTEMPTS, PAUSE_S = 4, 0.5
"""How often a machine looks for a marker: network file systems show new files late."""


class Needed(NamedTuple):
    """What every machine must have."""

    code: Callable[[], str]
    """An importable function that names the code, such as a digest; its name travels, not its body."""
    stores: Mapping[str, Store]
    """Places that all machines write, by the option that sets them."""
    files: Mapping[str, str]
    """Paths that all machines read, by the option that sets them."""


def spread() -> bool:
    """Whether the session has more machines than one."""
    import ray

    return len([node for node in ray.nodes() if node["Alive"]]) > 1


def head_address() -> str:
    """Host and port of the process that knows all machines of the session."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def check_nodes(needed: Needed) -> int:
    """Ask every machine that can hold workers; return how many there are.

    A machine that leaves while it is asked is left out. One that joins later is not asked.

    Raises
    ------
    UnlikeNodes
        If a machine has other code, lacks a file, or does not see a store; names the machine, the place and the remedy.
    StorageError
        If the driver itself cannot write a store.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and _works(node)}
    with _marked(needed.stores) as markers:
        look = ray.remote(num_cpus=0, max_retries=2)(_by_value(needed, markers))
        asked = {
            name: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote()
            for name in nodes
        }
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
        for name, answer in asked.items():
            try:
                told = ray.get(answer, timeout=0)
            except ray.exceptions.GetTimeoutError as error:
                raise UnlikeNodes(
                    f"{_shown(nodes[name])} did not answer within {ANSWER_S:g} s. Look at its Ray logs, or take it out "
                    f"of the cluster."
                ) from error
            except RayError:
                if not _leaves(name):
                    with original_errors():
                        raise
                log.warning("ray: %s left the cluster", _shown(nodes[name]))
            else:
                _refuse(_shown(nodes[name]), told, needed)
    log.info("ray: %d machines have the same code and see the same folders", len(nodes))
    return len(nodes)


def _leaves(name: str) -> bool:
    """Whether the node is gone, or is found to be soon."""
    import ray

    deadline = time.monotonic() + LEAVE_S
    while any(node["Alive"] and node["NodeID"] == name for node in ray.nodes()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _works(node: Mapping[str, Any]) -> bool:
    """Whether workers can be placed there; the head of a cluster often has no CPUs."""
    return any(node["Resources"].get(kind, 0) > 0 for kind in ("CPU", "GPU"))


def _shown(node: Mapping[str, Any]) -> str:
    return f"machine {node['NodeManagerHostname']} ({node['NodeManagerAddress']}, Ray node {node['NodeID'][:8]})"


@contextmanager
def _marked(stores: Mapping[str, Store]) -> Iterator[dict[str, tuple[str, str, bytes]]]:
    """A fresh small file in each store: its address, name and content by option. They are removed in the end."""
    markers: dict[str, tuple[str, str, bytes]] = {}
    try:
        for option, store in stores.items():
            name, content = f"{ASIDE}seen-{uuid.uuid4().hex}", uuid.uuid4().bytes
            store.note(name, content)
            markers[option] = store.address, name, content
        yield markers
    finally:
        for option, (_, name, _) in markers.items():
            stores[option].forget(name)


def _by_value(needed: Needed, markers: Mapping[str, tuple[str, str, bytes]]) -> Callable[[], dict[str, str]]:
    """The question as an inner function, which travels whole: a machine without this package answers it, too."""
    module, function, here = needed.code.__module__, needed.code.__qualname__, __name__
    files = dict(needed.files)

    def look() -> dict[str, str]:
        try:
            code = getattr(importlib.import_module(module), function)()
            seen: dict[str, str] = importlib.import_module(here).seen(files, markers)
        except ImportError as error:
            return {"import": str(error)}
        return {"code": code, **seen}

    return look


def seen(files: Mapping[str, str], markers: Mapping[str, tuple[str, str, bytes]]) -> dict[str, str]:
    """What this machine lacks, by option: nothing if all is there."""
    lacks = {f"file {option}": path for option, path in files.items() if not Path(path).exists()}
    for option, (address, name, content) in markers.items():
        for attempt in range(ATTEMPTS):
            time.sleep(PAUSE_S * attempt)
            try:
                found, why = Store(address).noted(name), "another folder is there, or none"
            except (StorageError, OSError) as error:
                found, why = None, str(error)
            if found == content:
                break
        else:
            lacks[f"store {option}"] = f"{address} ({why})"
    return lacks


def _refuse(machine: str, answer: Mapping[str, str], needed: Needed) -> None:
    """Raise UnlikeNodes unless the machine's answer is as needed."""
    if "import" in answer:
        raise UnlikeNodes(
            f"{machine} cannot load this program ({answer['import']}). Install the same version there, or send the "
            f"code along: `unveil submit`."
        )
    own = needed.code()
    if answer["code"] != own:
        raise UnlikeNodes(
            f"{machine} has other code ({answer['code']}) than this one ({own}). Install the same version on all "
            f"machines, or send the code along: `unveil submit`."
        )
    for what, place in answer.items():
        kind, _, option = what.partition(" ")
        if kind == "file":
            raise UnlikeNodes(
                f"{machine} has no {place} ({option}). Put it on a file system that all machines share, or give an "
                f"address in object storage."
            )
        if kind == "store":
            raise UnlikeNodes(
                f"{machine} does not see what this one writes to {place} ({option}). Workers there could not hand on "
                f"their tables: use a file system that all machines share, mounted at the same path, for `out`, and "
                f"the same or `store=s3://bucket/prefix` for embeddings."
            )
