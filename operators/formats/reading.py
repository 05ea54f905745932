"""What the readers of all formats share: files of a source kept open, and windows into them."""

import io
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from itertools import chain
from types import TracebackType
from typing import Self

from operators.formats.listing import Entry
from operators.sources import LocalSource, Source

Content = bytes | memoryview | OSError
"""The bytes of a record, or why it cannot be read."""

OPEN_FILES = 8
"""Files that one reader keeps open."""

AHEAD, GAP = 2**18, 4096
"""Bytes read at once while records are asked for one after another, and those that may lie between two of them."""


class Reader:
    """Opens the records of one set. Not for use by several threads at once; close it, or use it as a context manager.

    A format derives from it and gives `open`; where a record's file is not its place, also `path`.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._held: OrderedDict[str, BufferedIOBase] = OrderedDict()
        self._block: tuple[BufferedIOBase | None, int, bytes] = (None, 0, b"")
        """What was read ahead: of which file, from where."""
        self._after: tuple[BufferedIOBase | None, int] = (None, 0)
        """Where the last record ended."""

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """One encoded image (or raw little-endian float32 vector) as a stream, so that callers bound what they take.

        Raises
        ------
        OSError
            If the record cannot be read; its text goes into the record's row.
        """
        raise NotImplementedError

    def read(self, place: str, version: str | None, limit: int) -> bytes:
        """All bytes that `open` gives, but at most `limit` + 1; OSError as `open` and its stream raise it.

        Forms in which a record can be had in fewer steps than by a stream override it.
        """
        with self.open(place, version) as file:
            return file.read(limit + 1)

    def each(self, entries: Sequence[Entry], limit: int) -> Iterator[Content]:
        """What `read` gives for each of some listed records, in their order; an OSError in place of one that fails.

        Of a record that the listing refuses it is said why. Views are of blocks that were read at once: who keeps one
        keeps the block. Files are read in the state that they have when they are opened.
        """
        return chain.from_iterable(self.some(entries, limit))

    def some(self, entries: Sequence[Entry], limit: int) -> Iterator[Sequence[Content]]:
        """As `each`, several records at a time; forms whose listing is kept as columns override it."""
        for entry in entries:
            yield (self.one(entry, limit),)

    def one(self, entry: Entry, limit: int) -> Content:
        """What `read` gives for one listed record, or why there is nothing."""
        if entry.error is not None:
            return OSError(entry.error)
        place = entry.place if entry.place is not None else entry.key
        try:
            version = None if isinstance(self.source, LocalSource) else self.version(place)  # there are none here
            return self.read(place, version, limit)
        except OSError as fault:
            return fault

    def ahead(self, file: BufferedIOBase, at: int, size: int) -> bytes:
        """`size` bytes of a held file from `at`; what follows is read too if the last record ended about there.

        Raises
        ------
        OSError
            If the file ends before.
        """
        of, start, block = self._block
        inside = at - start
        if of is file and inside >= 0 and inside + size <= len(block):
            data = block[inside : inside + size]
        else:
            before, end = self._after
            follows = before is file and 0 <= at - end <= GAP and size < AHEAD
            file.seek(at)
            block = file.read(AHEAD if follows else size)
            data = block[:size]
            if follows:
                self._block = file, at, block
            if len(data) < size:
                raise OSError("the file ends inside this record: it is truncated")
        self._after = file, at + size
        return data

    def path(self, place: str) -> str:
        """The source's file that holds the record."""
        return place

    def version(self, place: str) -> str | None:
        """What names the state of the record's file (an ETag); None where there is no such thing."""
        return self.source.version(self.path(place))

    def held(self, path: str, version: str | None = None) -> BufferedIOBase:
        """A file of the source, opened once and kept; never close it."""
        if path in self._held:
            self._held.move_to_end(path)
            return self._held[path]
        file = self.source.open(path, version)
        self._held[path] = file
        while len(self._held) > OPEN_FILES:
            self._held.popitem(last=False)[1].close()
        return file

    def close(self) -> None:
        """Close all files."""
        self._block, self._after = (None, 0, b""), (None, 0)
        while self._held:
            self._held.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Window(io.RawIOBase):
    """Bytes `offset` to `offset + size` of an open file as a stream of their own; closing it leaves the file open."""

    def __init__(self, file: BufferedIOBase, offset: int, size: int) -> None:
        self._file, self._at, self._left = file, offset, size

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Fill `buffer` with the next bytes; OSError if the file ends before the window does."""
        wanted = min(len(buffer), self._left)
        if wanted == 0:
            return 0
        self._file.seek(self._at)
        data = self._file.read(wanted)
        if not data:
            raise OSError("the file ends inside this record: it is truncated")
        buffer[: len(data)] = data
        self._at, self._left = self._at + len(data), self._left - len(data)
        return len(data)


def window(file: BufferedIOBase, offset: int, size: int) -> BufferedIOBase:
    """A buffered `Window`."""
    return io.BufferedReader(Window(file, offset, size))
