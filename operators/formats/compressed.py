"""Compressed files as streams that can seek: gzip with places to start again, bzip2 and xz from the beginning only.

Compressed streams are read forwards. For gzip, copies of the decoder (about 40 kB each: its window and tables) are kept
at regular distances the first time that a process goes through a file, so that going back costs the unpacking of one
distance instead of everything before; the idea is that of zran.c (Mark Adler, zlib/examples), whose index needs a
compiled library (`indexed_gzip`) and a file to keep it in. Our copies live in the process: each worker goes through a
file once. bzip2's and xz's decoders cannot be copied in the standard library: going back means beginning anew.
"""

import bz2
import io
import lzma
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from io import BufferedIOBase
from typing import Protocol

PIECE = 2**18
"""Unpacked bytes taken at once."""
PACKED = 2**16
"""Compressed bytes taken at once."""
DISTANCE = 2**20
"""Unpacked bytes between two copies at first; twice that each time that there are too many."""
COPIES = 512
"""Copies kept of one file: 20 MB."""
FILES = 4
"""Files of which copies are kept."""
SLACK = 2**24
"""Unpacked bytes that are no bomb whatever they come from."""
MEMORY = 2**27
"""Bytes that an xz decoder may take; `xz -9` needs 65 MiB."""

MAGIC = {b"\x1f\x8b\x08": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class _Decoder(Protocol):
    """What bz2 and lzma have; `_Gzip` makes zlib look like it."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Gzip:
    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def needs_input(self) -> bool:
        return not self._inflate.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)

    def copy(self) -> "_Gzip":
        twin = _Gzip.__new__(_Gzip)
        twin._inflate = self._inflate.copy()
        return twin


def _decoder(kind: str) -> _Decoder:
    if kind == "gzip":
        return _Gzip()
    return bz2.BZ2Decompressor() if kind == "bzip2" else lzma.LZMADecompressor(memlimit=MEMORY)


class Copies:
    """Decoders as they were at places of one gzip file; shared by the threads of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._distance = DISTANCE
        self._at: list[int] = []
        self._kept: list[tuple[int, _Gzip]] = []

    def between(self, after: int, at: int) -> tuple[int, int, _Decoder] | None:
        """Unpacked place, compressed place and decoder of the last copy later than `after` and not later than `at`."""
        with self._lock:
            found = bisect_right(self._at, at) - 1
            if found < 0 or self._at[found] <= after:
                return None
            return self._at[found], self._kept[found][0], self._kept[found][1].copy()

    def offer(self, at: int, packed_at: int, decoder: _Decoder) -> None:
        """Keep a copy if the last one is far enough before `at`."""
        with self._lock:
            if not isinstance(decoder, _Gzip) or at < (self._at[-1] if self._at else 0) + self._distance:
                return
            self._at.append(at)
            self._kept.append((packed_at, decoder.copy()))
            if len(self._at) > COPIES:
                self._distance *= 2
                del self._at[::2], self._kept[::2]


_known: OrderedDict[tuple[object, ...], Copies] = OrderedDict()
"""Copies by the file's place, size and ends: workers open a set anew for each unit, and would begin anew each time."""
_known_lock = threading.Lock()


def _copies(file: BufferedIOBase, name: str) -> Copies:
    size = file.seek(0, 2)
    ends = []
    for at in (0, max(0, size - 4096)):  # gzip ends in the CRC-32 and size of what it holds
        file.seek(at)
        ends.append(zlib.crc32(file.read(4096)))
    key = (name, size, *ends)
    with _known_lock:
        made = _known.setdefault(key, Copies())
        _known.move_to_end(key)
        while len(_known) > FILES:
            _known.popitem(last=False)
        return made


def compression(file: BufferedIOBase) -> str | None:
    """`gzip`, `bzip2`, `xz` or `zstd` by the file's first bytes; None for others."""
    file.seek(0)
    head = file.read(6)
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)


def unpacked(file: BufferedIOBase, name: str, max_ratio: float | None = None) -> BufferedIOBase:
    """`file` itself, or its unpacked content as a stream that can seek; OSError if it is not known here.

    Parameters
    ----------
    file
        Is used, not closed.
    name
        What names the file in this process, for the copies of decoders.
    max_ratio
        OSError when reading if the content is larger than the file by this factor.
    """
    kind = compression(file)
    if kind is None:
        return file
    if kind == "zstd":
        raise OSError("compressed with zstd, which is not supported; unpack it first (`zstd -d`)")
    return Unpacked(file, kind, _copies(file, name), max_ratio)


class Unpacked(io.BufferedIOBase):
    """The content of a compressed file. Errors of the data are OSErrors."""

    def __init__(self, file: BufferedIOBase, kind: str, copies: Copies, max_ratio: float | None) -> None:
        self._file, self._kind, self._copies, self._max_ratio = file, kind, copies, max_ratio
        self._target = 0
        self._begin()

    def _begin(self) -> None:
        self._at, self._packed_at, self._piece, self._decoder = 0, 0, b"", _decoder(self._kind)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to an unpacked place, counted from the beginning or (`whence` 2) the end, which unpacks everything."""
        if whence == 2:
            while self._next():
                pass
            offset += self._at
        elif whence == 1:
            offset += self._target
        self._target = offset
        return offset

    def tell(self) -> int:
        """The unpacked place."""
        return self._target

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes, fewer only at the end; all that are left without a size."""
        wanted = 2**63 if size is None or size < 0 else size
        self._approach()
        parts = []
        while wanted:
            skipped = self._target - self._at
            part = self._piece[skipped : skipped + wanted]
            if part:
                parts.append(part)
                self._target, wanted = self._target + len(part), wanted - len(part)
            elif not self._next():
                break
        return b"".join(parts)

    def _approach(self) -> None:
        """Have a piece that begins not after the target, from the nearest place to start at."""
        back = self._target < self._at
        nearest = self._copies.between(-1 if back else self._at + len(self._piece), self._target)
        if nearest is not None:
            self._at, self._packed_at, self._decoder = nearest
            self._piece = b""
        elif back:
            self._begin()

    def _next(self) -> bool:
        """Replace the piece by the one after it; False, and no piece, at the end."""
        try:
            piece = self._decoded()
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as fault:
            self._begin()
            raise OSError(f"the {self._kind} stream is damaged: {fault}") from fault
        self._at, self._piece = self._at + len(self._piece), piece
        end = self._at + len(piece)
        if self._max_ratio is not None and end > self._max_ratio * self._packed_at + SLACK:
            raise OSError(f"unpacks to more than {self._max_ratio:g} times its size (limits.max_ratio), as bombs do")
        if piece and self._decoder.needs_input and not self._decoder.eof:
            self._copies.offer(end, self._packed_at, self._decoder)
        return bool(piece)

    def _decoded(self) -> bytes:
        """The next bytes, none at the end."""
        while True:
            if self._decoder.eof and not self._another():
                return b""
            packed = self._packed() if self._decoder.needs_input else b""
            starved = self._decoder.needs_input and not packed
            piece = self._decoder.decompress(packed, PIECE)
            if piece:
                return piece
            if starved and not self._decoder.eof:
                raise EOFError("it is cut short")

    def _another(self) -> bool:
        """Whether another stream follows the one that ended (`cat a.gz b.gz`); zeros may fill up the file."""
        rest = self._decoder.unused_data.lstrip(b"\0")
        while not rest and (packed := self._packed()):
            rest = packed.lstrip(b"\0")
        if not rest:
            return False
        self._packed_at -= len(rest)
        self._decoder = _decoder(self._kind)
        return True

    def _packed(self) -> bytes:
        self._file.seek(self._packed_at)
        packed = self._file.read(PACKED)
        self._packed_at += len(packed)
        return packed
