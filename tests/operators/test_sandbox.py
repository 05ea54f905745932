"""The sandbox: whatever an item does to its process, every other item has its result, in order."""

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from operators import sandbox as module
from operators.errors import ModelError
from operators.sandbox import Fault, Sandbox

if TYPE_CHECKING:  # every child imports this file, so it imports little itself
    import numpy as np

    from operators.faces import FaceConfig

Command = tuple[str, Any]
HOARD: list[bytearray] = []


class Picky(Exception):
    """Can be pickled, but not restored: it wants two arguments and hands on one."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Unpicklable:
    def __reduce__(self) -> tuple:
        raise TypeError("stays where it is")


def _raise(error: BaseException) -> None:
    raise error


def _die_first_time(flag: Path, deadly: Callable[[], object]) -> str:
    if flag.exists():
        return "second time"
    flag.touch()
    deadly()
    return "first time"


def _wait_first_time(flag: Path) -> str:
    if flag.exists():
        return "second time"
    draft = flag.with_suffix(".draft")
    draft.write_text(str(os.getpid()))
    draft.rename(flag)
    time.sleep(60)
    return "first time"


def _print(text: str) -> str:
    print(text, flush=True)  # noqa: T201 - as a library might
    os.write(1, text.encode())
    ctypes.CDLL(None).puts(text.encode())
    ctypes.CDLL(None).fflush(None)
    return text


def build_at_third_start(folder: Path) -> Callable[[Command], Any]:
    """Is killed from outside at its first two starts."""
    (folder / f"start-{os.getpid()}").touch()
    if len(list(folder.glob("start-*"))) < 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return lambda command: "after a kill" if command[0] == "kill once" and not _killed_once(command[1]) else command[1]


def _killed_once(flag: Path) -> bool:
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return False


def _inodes(_: object) -> set[int]:
    found = set()
    for fd in range(256):
        try:
            found.add(os.fstat(fd).st_ino)
        except OSError:
            continue
    return found


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "echo": lambda value: value,
    "pid": lambda _: os.getpid(),
    "segfault": lambda _: ctypes.string_at(0),
    "abort": lambda _: os.abort(),
    "loop": lambda _: [None for _ in iter(int, 1)],
    "sleep": time.sleep,
    "sleep with the interpreter locked": lambda seconds: ctypes.PyDLL(None).sleep(seconds),
    "exit": lambda code: os._exit(code),
    "sys.exit": lambda code: sys.exit(code),
    "signal": lambda number: os.kill(os.getpid(), number),
    "signal once": lambda at: _die_first_time(at[1], lambda: os.kill(os.getpid(), at[0])),
    "crash once": lambda flag: _die_first_time(flag, os.abort),
    "wait once": _wait_first_time,
    "eat": lambda count: len(bytearray(count)),
    "hoard": lambda count: HOARD.append(bytearray(count)),
    "zeros": lambda count: bytes(count),
    "print": _print,
    "moan": lambda text: sys.stderr.write(text),
    "raise": _raise,
    "raise picky": lambda _: _raise(Picky("status", "reason")),
    "give unpicklable": lambda _: Unpicklable(),
    "inodes": _inodes,
    "dumps": lambda _: (resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)),
}


def obey(command: Command) -> Any:
    name, value = command
    return ACTIONS[name](value)


def build() -> Callable[[Command], Any]:
    return obey


def build_badly(command: Command, moan: str = "") -> Callable[[Command], Any]:
    sys.stderr.write(moan)
    sys.stderr.flush()
    obey(command)
    return obey


def build_once(flag: Path) -> Callable[[Command], Any]:
    """Works in the first child only."""
    _die_first_time(flag, flag.exists) == "first time" or os._exit(9)
    return obey


def build_preparation(config: "FaceConfig") -> Callable[[Command], Any]:
    from operators.faces import FacePreparation

    prepare = FacePreparation(config).prepare
    return lambda command: prepare(command[1]) if command[0] == "prepare" else len(bytes(command[1]))


@pytest.fixture
def box() -> Iterator[Sandbox[Command, Any]]:
    with Sandbox(build, seconds=20, memory_bytes=None) as made:
        yield made


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def eventually(check: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not check() and time.monotonic() < end:
        time.sleep(0.02)
    return check()


def test_results_come_in_order_and_complete(box: Sandbox) -> None:
    assert list(box.map([("echo", n) for n in range(500)])) == list(range(500))
    assert list(box.map([])) == []
    assert list(box.map([("echo", None), ("echo", b"")])) == [None, b""]


@pytest.mark.parametrize(
    ("deadly", "reason"),
    [
        (("segfault", None), "its process was ended by signal 11 (Segmentation fault)"),
        (("abort", None), "its process was ended by signal 6 (Aborted)"),
        (("signal", signal.SIGBUS), "its process was ended by signal 7 (Bus error)"),
        (("signal", 40), "its process was ended by signal 40 (Real-time signal 6)"),
        (("signal", signal.SIGKILL), "its process was ended by signal 9 (Killed)"),
        (("exit", 3), "its process exited with code 3"),
        (("exit", 0), "its process exited with code 0"),
        (("sys.exit", 4), "its process exited with code 4"),
    ],
    ids=str,
)
def test_an_item_that_ends_its_process_is_a_fault_and_no_other_is_lost(
    box: Sandbox, deadly: Command, reason: str
) -> None:
    fault = Fault(status="crashed", reason=reason)
    items = [("echo", 0), deadly, ("echo", 2), ("echo", 3), deadly, deadly, ("echo", 6)]
    assert list(box.map(items)) == [0, fault, 2, 3, fault, fault, 6]
    assert list(box.map([deadly])) == [fault]
    assert list(box.map([("echo", 1)])) == [1]


@pytest.mark.parametrize("name", ["loop", "sleep", "sleep with the interpreter locked"])
def test_an_item_over_the_time_limit_is_a_fault(name: str) -> None:
    with Sandbox(build, seconds=1, memory_bytes=None) as box:
        start = time.monotonic()
        found = list(box.map([("echo", 0), (name, 60), ("sleep", 0.01), ("echo", 3)]))
        assert time.monotonic() - start < 20
    assert found == [0, Fault(status="timed_out", reason="its process did not answer within 1 seconds"), None, 3]


def test_the_time_limit_is_for_one_item_and_stands_still_while_the_consumer_is_busy() -> None:
    with Sandbox(build, seconds=1, memory_bytes=None) as box:
        assert list(box.map([("sleep", 0.2)] * 7)) == [None] * 7
        found = []
        for value in box.map([("sleep", 0.1), ("zeros", 3 * 10**6), ("zeros", 3 * 10**6)]):
            found.append(value)
            time.sleep(1.3)
        assert found == [None, bytes(3 * 10**6), bytes(3 * 10**6)]


def test_the_clock_does_not_run_while_parent_and_child_are_stopped(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from tests.operators.test_sandbox import build; from operators.sandbox import Sandbox\n"
        "box = Sandbox(build, seconds=2.5, memory_bytes=None)\n"
        "print(list(box.map([('pid', 0)]))[0], flush=True)\n"
        "print(list(box.map([('sleep', 1)])), flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.2)
        for number, pause in ((signal.SIGSTOP, 4), (signal.SIGCONT, 0)):
            os.kill(parent.pid, number)
            os.kill(child, number)
            time.sleep(pause)
        assert parent.stdout.readline() == "[None]\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_item_whose_process_was_killed_from_outside_has_a_second_chance(
    box: Sandbox, tmp_path: Path, number: int
) -> None:
    flag = tmp_path / "flag"

    def kill() -> None:
        eventually(flag.exists)
        os.kill(int(flag.read_text()), number)

    killer = threading.Thread(target=kill)
    killer.start()
    assert list(box.map([("echo", 0), ("wait once", flag), ("echo", 2)])) == [0, "second time", 2]
    killer.join()
    once = tmp_path / "once"
    assert list(box.map([("signal once", (number, once)), ("echo", 1)])) == ["second time", 1]


def test_an_item_that_crashes_its_process_has_no_second_chance(box: Sandbox, tmp_path: Path) -> None:
    first, second = box.map([("crash once", tmp_path / "flag"), ("echo", 1)])
    assert (first.status, second) == ("crashed", 1)


def test_a_child_that_died_while_it_was_idle_costs_nothing(box: Sandbox) -> None:
    (pid,) = box.map([("pid", None)])
    os.kill(pid, signal.SIGSEGV)
    assert eventually(partial(gone, pid))
    assert list(box.map([("echo", 0), ("echo", 1)])) == [0, 1]


def test_memory_over_the_limit_is_a_fault_and_what_others_used_up_is_not() -> None:
    with Sandbox(build, seconds=20, memory_bytes=3 * 10**8) as box:
        fault = Fault(status="crashed", reason="its process ran out of memory")
        found = list(box.map([("eat", 10**8), ("eat", 10**9), ("eat", 10**8)]))
        assert found == [10**8, fault, 10**8]
        assert list(box.map([("hoard", 10**8)] * 5)) == [None] * 5
        assert list(box.map([("zeros", 10**7)])) == [bytes(10**7)]


def test_the_preparation_of_faces_works_under_a_memory_limit(
    face_config: "FaceConfig", portraits: "list[np.ndarray]", encode: Callable[..., bytes]
) -> None:
    """ONNX Runtime, OpenCV, Pillow and NumPy in the child."""
    from operators.faces import FacePreparation

    images = [encode(portrait) for portrait in portraits[:4]]
    prepare = FacePreparation(face_config).prepare
    with Sandbox(partial(build_preparation, face_config), seconds=20, memory_bytes=3 * 10**8) as box:
        found = list(box.map([("zeros", 10**9), *(("prepare", image) for image in images)]))
    assert found[0].reason == "its process ran out of memory"
    assert found[1:] == [prepare(image) for image in images]


def test_what_libraries_print_does_not_mix_with_results(box: Sandbox) -> None:
    assert list(box.map([("print", "R" * 40), ("echo", 1), ("print", "V")])) == ["R" * 40, 1, "V"]


def test_a_talkative_library_neither_blocks_nor_fills_memory(box: Sandbox, capfd: pytest.CaptureFixture) -> None:
    assert list(box.map([("moan", "secret name " * 10**5), ("echo", 1)])) == [12 * 10**5, 1]
    assert len(box._child.tail) <= module.TAIL_BYTES
    assert capfd.readouterr() == ("", "")


def test_an_exception_of_the_function_is_raised_with_its_type(box: Sandbox) -> None:
    results = box.map([("echo", 0), ("raise", ModelError("the model is missing")), ("echo", 2)])
    assert next(results) == 0
    with pytest.raises(ModelError, match="the model is missing") as caught:
        next(results)
    assert "_raise" in caught.value.__notes__[0]
    assert list(results) == []
    with pytest.raises(RuntimeError, match="Picky: reason"):
        list(box.map([("raise picky", None)]))
    with pytest.raises(TypeError, match="stays where it is"):
        list(box.map([("give unpicklable", None)]))
    assert list(box.map([("echo", 0)])) == [0]


@pytest.mark.parametrize(
    ("command", "error", "match"),
    [
        (("exit", 3), RuntimeError, "exited with code 3 before it was ready. It wrote: no detector$"),
        (("segfault", None), RuntimeError, r"was ended by signal 11 \(Segmentation fault\) before it was ready"),
        (("signal", signal.SIGKILL), RuntimeError, r"was ended by signal 9 \(Killed\) before it was ready"),
        (("raise", ModelError("no such file")), ModelError, "no such file"),
        (("raise", MemoryError()), RuntimeError, "ran out of memory before it was ready"),
        (("sleep", 60), RuntimeError, "did not answer within 2 seconds before it was ready"),
    ],
    ids=str,
)
def test_a_child_that_fails_to_start_is_an_error_and_no_endless_loop(
    command: Command, error: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "START_SECONDS", 2.0)
    with (
        Sandbox(partial(build_badly, command, "no detector"), seconds=20, memory_bytes=None) as box,
        pytest.raises(error, match=match),
    ):
        list(box.map([("echo", 0)]))


def test_a_child_that_cannot_be_started_again_is_an_error(tmp_path: Path) -> None:
    with Sandbox(partial(build_once, tmp_path / "flag"), seconds=20, memory_bytes=None) as box:
        results = box.map([("echo", 0), ("abort", None), ("echo", 2)])
        assert next(results) == 0
        assert next(results).status == "crashed"
        with pytest.raises(RuntimeError, match=r"exited with code 9 before it was ready\. It wrote: nothing"):
            next(results)


def test_a_child_that_is_killed_before_it_is_ready_is_started_again(tmp_path: Path) -> None:
    """And the item that it would have had keeps its second chance."""
    with Sandbox(partial(build_at_third_start, tmp_path), seconds=20, memory_bytes=None) as box:
        assert list(box.map([("kill once", tmp_path / "killed"), ("echo", 1)])) == ["after a kill", 1]
    assert len(list(tmp_path.glob("start-*"))) == 4


def test_large_items_and_results_pass(box: Sandbox) -> None:
    blobs = [os.urandom(size) for size in (30_000_000, 0, 1, 2**20, 2**18 - 10, 5_000_000)]
    assert list(box.map([("echo", blob) for blob in blobs])) == blobs


def test_one_child_serves_all_maps_and_all_threads(box: Sandbox) -> None:
    """Also when the thread ends that started it, and when the consumer does not ask beyond the last result."""
    pids: list[int] = []
    starter = threading.Thread(target=lambda: pids.extend(box.map([("pid", None)])))
    starter.start()
    starter.join()
    time.sleep(0.1)
    pids += [pid for _, pid in zip(range(3), box.map([("pid", None)] * 3), strict=False)]
    pids.append(next(box.map([("pid", None)])))
    assert len(pids) == 5
    assert len(set(pids)) == 1


def test_an_unfinished_map_is_in_nobodys_way(box: Sandbox) -> None:
    results = box.map([("echo", "old"), ("sleep", 0.3), *[("echo", "old")] * 50])
    assert next(results) == "old"
    with pytest.raises(RuntimeError, match="one `map` at a time"):
        next(box.map([("echo", 0)]))
    results.close()
    assert list(box.map([("echo", "new")] * 3)) == ["new"] * 3


def test_a_sandbox_closed_while_it_is_read_says_so(box: Sandbox) -> None:
    results = box.map([("echo", 0), ("sleep", 1), ("echo", 2)])
    next(results)
    box.close()
    with pytest.raises(RuntimeError, match="was closed while"):
        list(results)


def test_nothing_is_left_behind() -> None:
    before = set(os.listdir("/proc/self/fd"))
    pids = []
    for way in range(3):
        box = Sandbox(build, seconds=1, memory_bytes=None)
        pids += box.map([("pid", None), ("segfault", None), ("pid", None), ("sleep", 9), ("pid", None)])
        if way == 0:
            box.close()
            box.close()
        elif way == 1:
            with box:
                next(box.map([("pid", None)] * 9))
        del box
    numbers = [pid for pid in pids if isinstance(pid, int)]
    assert len(numbers) == 9
    for pid in numbers:
        assert not Path(f"/proc/{pid}").exists()
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_sandbox_that_was_never_used_starts_nothing() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Sandbox(build, seconds=1, memory_bytes=None) as box:
        assert box._child is None
        assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("seconds", "memory_bytes"), [(0, None), (-1, None), (1, 0), (1, -1)])
def test_limits_must_be_positive(seconds: float, memory_bytes: int | None) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Sandbox(build, seconds=seconds, memory_bytes=memory_bytes)


def test_the_child_has_no_file_of_the_parent_and_dumps_no_core(box: Sandbox) -> None:
    ends = socket.socketpair()
    for end in ends:
        end.set_inheritable(True)
    theirs, dumps = box.map([("inodes", None), ("dumps", None)])
    assert not {os.fstat(end.fileno()).st_ino for end in ends} & theirs
    assert dumps == ((0, 0), 0)
    for end in ends:
        end.close()


@pytest.mark.parametrize("name", ["echo", "loop", "sleep with the interpreter locked"])
def test_the_child_ends_with_its_parent(name: str) -> None:
    """Idle, at work, and stuck in a library; the parent is killed with no chance to say goodbye."""
    code = (
        "import sys, time; from tests.operators.test_sandbox import build; from operators.sandbox import Sandbox\n"
        "box = Sandbox(build, seconds=90, memory_bytes=None)\n"
        "for pid in box.map([('pid', 0)]): print(pid, flush=True)\n"
        f"list(box.map([({name!r}, 60)])); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.3)
        assert not gone(child)
        parent.kill()
    assert eventually(partial(gone, child))


def test_many_sandboxes_work_at_once(tmp_path: Path) -> None:
    found: dict[int, list[Any]] = {}

    def work(number: int) -> None:
        with Sandbox(build, seconds=20, memory_bytes=None) as box:
            found[number] = list(box.map([("echo", number), ("abort", None), ("zeros", 10**6), ("echo", number)]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fault = Fault(status="crashed", reason="its process was ended by signal 6 (Aborted)")
    assert found == {number: [number, fault, bytes(10**6), number] for number in range(4)}


@pytest.mark.ray
def test_it_works_in_a_ray_actor_and_ends_with_it(session: None, tmp_path: Path) -> None:
    import ray

    class Actor:
        def __init__(self) -> None:
            self.box = Sandbox(build, seconds=20, memory_bytes=10**9)

        def work(self, items: list[Command]) -> list[Any]:
            return list(self.box.map(items))

    actor = ray.remote(Actor).options(num_cpus=0).remote()
    killed_once = ("signal once", (signal.SIGKILL, tmp_path / "flag"))
    items = [("echo", 0), ("segfault", None), killed_once, ("exit", 5), ("eat", 10**10), ("pid", None)]
    zero, crashed, killed, exited, full, pid = ray.get(actor.work.remote(items))
    assert (zero, killed) == (0, "second time")
    assert crashed.reason == "its process was ended by signal 11 (Segmentation fault)"
    assert exited.reason == "its process exited with code 5"
    assert full.reason == "its process ran out of memory"
    assert ray.get(actor.work.remote([("pid", None)])) == [pid]
    ray.kill(actor)
    assert eventually(partial(gone, pid))
