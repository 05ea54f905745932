"""A remote file as a stream that can seek, read in few and large requests."""

import io
from collections import deque
from io import BufferedIOBase
from typing import Protocol

WHOLE_BYTES = 1 << 20
"""Files up to this size, as images are, come with one request."""
FIRST_BYTES = 256 << 10
"""Asked for where a reader has jumped to."""
BLOCK_BYTES = 4 << 20
"""Most that one request asks for. Requests grow to it while a reader goes on from where it was."""
HELD_BYTES = 2 * BLOCK_BYTES
"""Most that a stream keeps, so that going to and fro between two places costs nothing."""


class Remote(Protocol):
    """One state of a remote file, opened."""

    size: int
    etag: str | None

    def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes of this very state of the file.

        Raises
        ------
        OSError
            If the file is gone or has changed.
        FormatError
            If the place does not answer, again and again.
        """


class _Ranges(io.RawIOBase):
    """Reads of a remote file, through the blocks that were fetched last."""

    def __init__(self, remote: Remote) -> None:
        self._remote, self._at, self._step = remote, 0, FIRST_BYTES
        self._held: deque[tuple[int, bytes]] = deque()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; nothing is fetched before a read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._remote.size}[whence]
        if base + offset < 0:
            raise OSError("a stream has no place before its begin")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Fill `buffer` with the next bytes, or a part of it; 0 at the file's end only."""
        if self._at >= self._remote.size or not len(buffer):
            return 0
        start, data = self._block(len(buffer))
        at = self._at - start
        part = memoryview(data)[at : at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _block(self, wanted: int) -> tuple[int, bytes]:
        """A block with the byte at the present place, fetched if it is not held."""
        for start, data in reversed(self._held):
            if start <= self._at < start + len(data):
                return start, data
        start, size = self._plan(wanted)
        block = start, self._remote.read(start, size)
        self._held.append(block)
        while len(self._held) > 1 and sum(len(data) for _, data in self._held) > HELD_BYTES:
            self._held.popleft()
        return block

    def _plan(self, wanted: int) -> tuple[int, int]:
        """Where the next request begins and how much it asks for."""
        if self._remote.size <= WHOLE_BYTES:
            return 0, self._remote.size
        ends = [start + len(data) for start, data in self._held]
        on = any(end <= self._at <= end + self._step for end in ends)
        self._step = min(2 * self._step, BLOCK_BYTES) if on else FIRST_BYTES
        most = max(self._step, min(wanted, BLOCK_BYTES))
        return self._at, min(most, self._remote.size - self._at)

    def close(self) -> None:
        """Let the blocks go."""
        self._held.clear()
        super().close()


def stream(remote: Remote) -> BufferedIOBase:
    """A remote file as a buffered stream; errors as `Remote.read` raises them."""
    return io.BufferedReader(_Ranges(remote), 64 << 10)
