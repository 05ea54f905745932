"""A Ray cluster of several raylets on this machine, and the processes in it."""

import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TOKEN = "chaos-" + "0123456789abcdef" * 3
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "OMP_NUM_THREADS": "1",
    # faults are noticed in seconds, not in minutes
    "RAY_gcs_rpc_server_reconnect_timeout_s": "6",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_num_workers_soft_limit": "4",
    "RAY_worker_niceness": "0",
}

KINDS: dict[str, Callable[[str], bool]] = {
    "embedding worker": lambda title: title.startswith("ray::MapWorker"),
    "search actor": lambda title: title.startswith("ray::ShardActor"),
    "task": lambda title: title.startswith(("ray::_merge", "ray::check_tile", "ray::read_piece")),
    "opening of models": lambda title: title.startswith("ray::_open_models"),
    "decoder": lambda title: "operators.sandbox" in title,
    "worker": lambda title: title.startswith("ray::"),
}
"""Processes by what they are titled."""


class Machines:
    """A head and further nodes, each a raylet with its workers; ended as a whole."""

    def __init__(self, head: dict[str, Any], nodes: int = 0) -> None:
        """Start a head with these options of Ray's, and `nodes` nodes of 2 CPUs."""
        import ray._private.utils
        from ray.cluster_utils import Cluster

        ray._private.utils.write_ray_address = lambda *_: None  # other sessions of this machine must not find this one
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.options = {"include_dashboard": False, "include_log_monitor": False, "temp_dir": str(self.folder)}
        usual = {"num_cpus": 2, "object_store_memory": 256 * 2**20}
        self.cluster = Cluster(initialize_head=True, head_node_args={**self.options, **usual, **head})
        self.address = str(self.cluster.address)
        for _ in range(nodes):
            self.add()

    def add(self) -> None:
        """One more node."""
        self.cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20, temp_dir=str(self.folder))

    def pid(self, node: Any, process: str = "raylet") -> int:
        """Process of a node: `raylet`, or the head's `gcs_server`."""
        return int(node.all_processes[process][0].process.pid)

    @property
    def head(self) -> Any:
        return self.cluster.head_node

    @property
    def nodes(self) -> list[Any]:
        """All but the head."""
        return sorted(self.cluster.worker_nodes, key=self.pid)

    def of(self, kind: str, node: Any = None) -> list[int]:
        """Processes of a kind below all raylets, or below one."""
        roots = [self.pid(one) for one in ([node] if node else [self.head, *self.nodes])]
        return [pid for pid in descendants(roots) if KINDS[kind](title(pid))]

    def kill_node(self, node: Any) -> int:
        """Kill a raylet and all that runs below it, at once; return how many processes."""
        gone = [self.pid(node), *descendants([self.pid(node)])]
        for pid in gone:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.cluster.worker_nodes.discard(node)
        return len(gone)

    def kill_head(self) -> int:
        """Kill the head's raylet, its workers, and the process that knows all nodes."""
        return self.kill_node(self.head) + self._kill(self.pid(self.head, "gcs_server"))

    def _kill(self, pid: int) -> int:
        os.kill(pid, signal.SIGKILL)
        return 1

    def well(self) -> bool:
        """Whether all raylets and the head's GCS are alive."""
        pids = [self.pid(self.head, "gcs_server"), *map(self.pid, [self.head, *self.nodes])]
        return all(state(pid) not in ("", "Z") for pid in pids)

    def close(self) -> None:
        """End every process of the cluster, and remove its folder."""
        pids = [process.process.pid for node in [self.head, *self.nodes] for own in node.all_processes.values()
                for process in own]  # fmt: skip
        for pid in [*pids, *descendants(pids), *self._others()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in [self.head, *self.nodes]:
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self.cluster.worker_nodes.clear()
        self.cluster.head_node = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _others(self) -> list[int]:
        """Processes whose parents are gone and whose command line or environment names this cluster's folder."""
        mark = str(self.folder).encode()
        return [pid for pid in processes() if mark in about(pid, "cmdline") or mark in about(pid, "environ")]


@contextmanager
def machines(head: dict[str, Any] | None = None, nodes: int = 0) -> Iterator[Machines]:
    """A cluster that is ended at the end."""
    made = Machines(head or {}, nodes)
    try:
        yield made
    finally:
        made.close()


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def about(pid: int, name: str) -> bytes:
    """A file of /proc about a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def title(pid: int) -> str:
    return about(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()


def state(pid: int) -> str:
    """One letter: R, S, D, T, Z; empty if the process is gone."""
    found = re.search(rb"^State:\s+(\S)", about(pid, "status"), re.MULTILINE)
    return found[1].decode() if found else ""


def descendants(roots: list[int]) -> list[int]:
    """All processes below these."""
    children: dict[int, list[int]] = {}
    for pid in processes():
        parent = about(pid, "stat").rpartition(b") ")[2].split()[1:2]
        if parent:
            children.setdefault(int(parent[0]), []).append(pid)
    left, below = list(roots), []
    while left:
        own = children.get(left.pop(), [])
        below += own
        left += own
    return below


def kill(pid: int) -> bool:
    """SIGKILL a process that is at work; whether it was there to be killed."""
    if state(pid) in ("", "Z"):
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def stop(pid: int, seconds: float) -> bool:
    """Let a process stand still for a while; whether it was there to be stopped."""
    if state(pid) in ("", "Z", "T"):
        return False
    try:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return False
    return True
