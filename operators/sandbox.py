"""A function applied to untrusted items in a child process, whose death costs the item that caused it and no other.

A decoder that is fed a hostile image can crash, hang, or take all memory; no `except` helps against that. `Sandbox`
keeps the function in a child and reads its results from a pipe. The child announces every item before it touches it,
so the item to blame is known: it becomes a `Fault`, and a fresh child goes on with the next one.

This keeps a run alive. It is no defence against an image that takes over the decoder, whose word is unpickled. Linux.
"""

import ctypes
import fcntl
import os
import pickle
import resource
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from types import TracebackType
from typing import BinaryIO, Generic, Literal, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")

START_SECONDS, STARTS = 300.0, 3
"""Time limit of `build`, and so many children in a row may be ended from outside before they are ready."""
STEP_SECONDS = 1.0
"""The clock never runs further than this at once, so a pause of the whole machine blames nobody."""
AHEAD_ITEMS, AHEAD_BYTES = 8, 2**19
"""So many items are sent before their turn, but none while so many bytes wait for room in the pipe."""
PIPE_BYTES, READ_BYTES, TAIL_BYTES, FRAME = 2**20, 2**18, 2000, struct.Struct("<cQ")
READY, BEGIN, VALUE, MEMORY, TEXT, ERROR = b"R", b"B", b"V", b"M", b"T", b"E"
"""What stands before each message of the child, with its length. The last three are last words: memory ran out, or an
exception in words and, where possible, pickled."""
OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
"""Signals that somebody else sends, such as the kernel when the machine is out of memory."""
CHILD = "import sys; sys.path[:] = sys.argv[2:]; from operators.sandbox import serve; serve(int(sys.argv[1]))"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What is returned for an item that ended its child process."""

    status: Literal["crashed", "timed_out"]
    reason: str


class Sandbox(Generic[T, R]):
    """Applies a function to items in a child process; an item that ends the child gives a `Fault`.

    An item whose guilt is in doubt gets one second chance, as the first item of a fresh child: when the child was
    killed from outside, ran out of memory (earlier items may have used it up), or had not begun the item. An item that
    crashes the child or takes too long is not tried again.
    """

    _child: "_Child | None" = None
    _busy, _unready = False, 0

    def __init__(self, build: Callable[[], Callable[[T], R]], *, seconds: float, memory_bytes: int | None) -> None:
        """Note what to run; `start` or the first `map` starts the child.

        `build` is called once in every child and returns the function for the items. It travels pickled: a class, an
        importable function, or a `functools.partial` of one. `seconds` is the time limit of one item; the clock stands
        still while the consumer of `map` is busy elsewhere. `memory_bytes` is what the child may allocate on top of
        what `build` left allocated; None sets no limit.
        """
        if seconds <= 0 or (memory_bytes is not None and memory_bytes <= 0):
            raise ValueError(f"seconds and memory_bytes must be positive. Got {seconds} and {memory_bytes}.")
        self._first = pickle.dumps((build, memory_bytes), pickle.HIGHEST_PROTOCOL)
        self._seconds = seconds

    def start(self) -> "_Child":
        """Start the child if there is none: it builds its function while the caller goes on."""
        self._child = self._child or _Child(self._first, self._seconds)
        return self._child

    def map(self, items: Sequence[T]) -> Iterator[R | Fault]:
        """The function's result, or a Fault, for each item, in order.

        An exception of the function or of `build` is raised here and ends the iteration; it becomes a RuntimeError if
        it cannot be pickled. A child that ends in `build` is a RuntimeError, too. MemoryError is a Fault.
        """
        if self._busy:
            raise RuntimeError("a sandbox serves one `map` at a time. Finish the first one, or make two sandboxes.")
        self._busy, done, doubted = True, 0, -1
        try:
            while done < len(items):
                for value in self._until_loss(items, done):
                    done += 1
                    yield value
                if done < len(items):
                    fault = self._verdict(second=doubted == done)
                    doubted = doubted if self._unready else done
                    if fault is not None:
                        done += 1
                        yield fault
        finally:
            self._busy = False
            if done < len(items):
                self.close()

    def _until_loss(self, items: Sequence[T], done: int) -> Iterator[R]:
        """Results from item `done` on, until all are there or the child is lost."""
        child, sent = self.start(), done
        while done < len(items) and not child.lost:
            while sent < min(len(items), done + AHEAD_ITEMS) and len(child.unsent) < AHEAD_BYTES:
                child.unsent += pickle.dumps(items[sent], pickle.HIGHEST_PROTOCOL)
                sent += 1
            for value in child.values():
                done += 1
                yield pickle.loads(value)  # noqa: S301 - from this process's own child

    def _verdict(self, *, second: bool) -> Fault | None:
        """What becomes of the item at which the child was lost; None if it is tried again. Raises the child's error."""
        child = self._child
        if child is None:
            raise RuntimeError("the sandbox was closed while its results were being read.")
        self.close()
        if ERROR in child.words:
            raise pickle.loads(child.words[ERROR])  # noqa: S301 - from this process's own child
        if TEXT in child.words:
            raise RuntimeError(child.words[TEXT].decode())
        outside = -child.process.returncode in OUTSIDE and not child.late
        self._unready = 0 if READY in child.words else self._unready + 1
        if self._unready and outside and self._unready < STARTS:
            return None
        if self._unready:
            wrote = child.tail.decode("utf-8", "backslashreplace").strip() or "nothing"
            raise RuntimeError(f"the sandbox's child process {child.end()} before it was ready. It wrote: {wrote}")
        if not second and (child.latest != BEGIN or outside):
            return None
        return Fault(status="timed_out" if child.late else "crashed", reason=f"its process {child.end()}")

    def close(self) -> None:
        """End the child. A later `map` would start another."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class _Child:
    """A child process as its parent sees it; it inherits no file but its own pipes."""

    def __init__(self, first: bytes, seconds: float) -> None:
        self.seconds, self.left_s = seconds, START_SECONDS
        self.late = self.lost = False
        self.latest, self.tail = b"", b""
        self.words: dict[bytes, bytes] = {}
        self.unsent, self.received = bytearray(first), bytearray()
        self.poll = select.poll()
        inner, outer = os.pipe()
        self.lifeline = os.fdopen(outer, "wb", 0)
        with os.fdopen(inner, "rb", 0):
            command = [sys.executable, "-c", CHILD, str(inner), *sys.path]
            self.process = Popen(command, 0, stdin=PIPE, stdout=PIPE, stderr=PIPE, pass_fds=[inner])  # noqa: S603
        self.pipes = [pipe for pipe in (self.process.stdin, self.process.stdout, self.process.stderr) if pipe]
        self.inlet, self.outlet, self.notes = (pipe.fileno() for pipe in self.pipes)
        for pipe in (self.inlet, self.outlet, self.notes):
            os.set_blocking(pipe, False)
            self.poll.register(pipe, select.POLLIN)
            with suppress(OSError):  # the user's pipes hold all that they may: slower, not wrong
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.send()

    def values(self) -> list[bytes]:
        """Results that have arrived, perhaps none. Waits for news for a while; `lost` tells that none will come."""
        start = time.monotonic()
        self.send()
        for pipe, _ in self.poll.poll(min(self.left_s, STEP_SECONDS) * 1000):
            if pipe == self.outlet:
                self.received += (data := os.read(pipe, READ_BYTES))
                self.lost = not data
            elif pipe == self.notes:
                self._hear()
        self.left_s -= min(time.monotonic() - start, STEP_SECONDS)
        values = self._frames()
        if self.left_s <= 0 and not self.lost:
            self.late = self.lost = True
        return values

    def send(self) -> None:
        """Fill the pipe; if something is left, `poll` tells when there is room for more."""
        with suppress(BlockingIOError, BrokenPipeError):  # a child that is gone is noticed at the other pipe
            while self.unsent:
                del self.unsent[: os.write(self.inlet, self.unsent)]
        self.poll.register(self.inlet, select.POLLOUT if self.unsent else 0)

    def _hear(self) -> None:
        """Keep the end of what libraries write. It may name images, so it goes into no log."""
        with suppress(BlockingIOError, KeyError):
            self.tail = (self.tail + (data := os.read(self.notes, READ_BYTES)))[-TAIL_BYTES:]
            if not data:
                self.poll.unregister(self.notes)

    def _frames(self) -> list[bytes]:
        """Take the complete messages off what was received; each winds up the clock."""
        values, at = [], 0
        while len(self.received) >= at + FRAME.size:
            kind, length = FRAME.unpack_from(self.received, at)
            end = at + FRAME.size + length
            if len(self.received) < end:
                break
            body = bytes(memoryview(self.received)[at + FRAME.size : end])
            at, self.left_s, self.latest, self.words[kind] = end, self.seconds, kind, body
            if kind == VALUE:
                values.append(body)
        del self.received[:at]
        return values

    def end(self) -> str:
        """Let a dying child finish, kill any other, give everything back, and tell how it ended."""
        with suppress(TimeoutExpired):
            self.process.wait(STEP_SECONDS if self.lost and not self.late else 0)
        self.process.kill()
        code = self.process.wait()
        if not self.lifeline.closed:
            self._hear()
        self.lost = True
        for pipe in (*self.pipes, self.lifeline):
            pipe.close()
        if self.late:
            return f"did not answer within {self.seconds if READY in self.words else START_SECONDS:g} seconds"
        if self.latest == MEMORY:
            return "ran out of memory"
        return f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exited with code {code}"


def serve(lifeline: int) -> None:
    """The child's life: build the function, then answer until the parent closes its pipe."""
    _leave_nothing(lifeline)
    inlet, outlet = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print is no answer
    sys.excepthook = partial(_last_words, outlet)
    build, memory_bytes = pickle.load(inlet)  # noqa: S301 - from the parent
    function = build()
    if memory_bytes is not None:  # a limit of address space would count what runtimes reserve and never use
        held = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (held + memory_bytes,) * 2)
    _tell(outlet, READY)
    while inlet.peek(1):  # waits; empty when the parent has closed its end
        _tell(outlet, BEGIN)
        value = function(pickle.load(inlet))  # noqa: S301 - from the parent
        _tell(outlet, VALUE, pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    os._exit(0)


def _tell(outlet: BinaryIO, kind: bytes, body: bytes = b"") -> None:
    outlet.writelines((FRAME.pack(kind, len(body)), body))
    outlet.flush()


def _last_words(outlet: BinaryIO, kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """Tell the parent of an exception that nobody caught; first in words, which cannot fail."""
    try:
        if isinstance(error, MemoryError):
            return _tell(outlet, MEMORY)
        _tell(outlet, TEXT, f"{kind.__name__}: {error}".encode("utf-8", "backslashreplace"))
        error.add_note("In the sandbox's child process:\n" + "".join(traceback.format_tb(at)))
        pickle.loads(message := pickle.dumps(error))  # noqa: S301 - some can be pickled but not restored
        _tell(outlet, ERROR, message)
    finally:
        os._exit(1)


def _leave_nothing(lifeline: int) -> None:
    """Outlive nobody, dump no memory (it holds faces), and be the first to go where memory runs out.

    The kernel kills this process when the parent, which holds the other end of `lifeline`, is gone. Unlike
    PR_SET_PDEATHSIG this does not fire when merely the thread ends that started the child, and unlike a thread that
    waits for the end of a pipe it works while a library keeps the interpreter locked.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    (watch := select.poll()).register(lifeline, 0)
    if watch.poll(0):  # gone already
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE; a limit of 0 does not stop dumps into a program
