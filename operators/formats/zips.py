"""Zip archives, read in place: one, or several in a folder.

The directory at the archive's end says what is in it (`zipdir`). Nothing is extracted: a member is decompressed while
it is read, must be as long as the directory says, and must have the CRC-32 that it says.
"""

import json
import stat
import struct
import zlib
from array import array
from io import BufferedIOBase, BufferedReader, BytesIO, RawIOBase
from typing import TYPE_CHECKING

import numpy as np

from operators.errors import FormatError
from operators.formats.listing import Listing
from operators.formats.members import WHOLE, Gathered, kinds_beside, located, located_near, named, tidy
from operators.formats.reading import Reader, window
from operators.formats.zipdir import Directory, ZipMember, directory, members
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

LOCAL = struct.Struct("<4s5H3L2H")
"""What goes before a member's name and data (APPNOTE.TXT, 4.3.7)."""

PIECE = 2**16
STORED, DEFLATED = 0, 8
ENCRYPTED = 0x2041
"""Flags (4.4.4) of the ways to encrypt a member."""
METHODS = {1: "shrink", 6: "implode", 9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "ppmd"}
OTHERS = (".npz", ".pt", ".pth", ".xlsx", ".docx", ".jar", ".whl", ".onnx")
"""Files that are zip archives inside, and something else to everybody."""


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether a file called `.zip`, or the only file, ends as zip archives do."""
    for file in named(files, (".zip",), source.single)[:8]:
        if file.error is not None or file.path.lower().endswith(OTHERS):
            continue
        try:
            with source.open(file.path) as opened:
                directory(opened)
        except OSError:
            continue
        return True
    return False


def listing(source: Source, options: "SetConfig") -> Listing:
    """All images of the archives; keys begin with the archive's name if there are several.

    The person's label is the folder that holds the image in its archive. If archives repeat each other's names, as
    those that number persons anew do, the archive's name goes before it.

    Raises
    ------
    FormatError
        If an archive is missing, cut short, split over several files or no zip archive, or there is no image.
    """
    files = list(source.files())
    chosen = named(files, (".zip",), source.single)
    if not chosen:
        raise FormatError(f"{source.uri}: no file called .zip. Correct the set's `uri`.")
    gathered = Gathered(source.uri, options, [file.path for file in chosen])
    gathered.unlisted.update(kinds_beside(files, chosen))
    for file in chosen:
        try:
            if file.error is not None:
                raise OSError(file.error)
            with source.open(file.path) as opened:
                _gather(opened, file.path, gathered, options.limits.max_ratio)
        except OSError as fault:
            raise FormatError(
                f"{source.uri}: {file.path}: cannot be read as a zip archive: {fault.strerror or fault}. "
                f"Download it again, or move it away."
            ) from fault
    return gathered.listing()


def _gather(file: BufferedIOBase, path: str, gathered: Gathered, max_ratio: float) -> None:
    """Add the members of one archive; OSError if its directory is damaged."""
    starts, ends, rows = array("q"), array("q"), array("q")
    quoted = json.dumps(path)
    where = directory(file)
    for member in members(file, where):
        starts.append(member.offset)
        ends.append(member.end)
        name = tidy(member.name)
        kind = stat.S_IFMT(member.mode)
        if not gathered.passes(name, "link" if kind == stat.S_IFLNK else None):
            rows.append(-1)
            continue
        rows.append(len(gathered.entries))
        place = f"[{quoted},{member.offset},{member.packed},{member.size},{member.method},{member.crc}]"
        error = _fault(member, where, max_ratio)
        gathered.add(path, name, member.size, place, error)
    for at in _overlapping(starts, ends):
        if rows[at] >= 0:
            gathered.reject(rows[at], "its data overlap another member's, as in zip bombs; pack the archive anew")


def _fault(member: ZipMember, where: Directory, max_ratio: float) -> str | None:
    """Why a member cannot be used."""
    kind = stat.S_IFMT(member.mode)
    if kind == stat.S_IFLNK:
        return "a link; pack the archive anew with the files that its links stand for"
    if kind not in (0, stat.S_IFREG):
        return "no regular file"
    if member.flags & ENCRYPTED:
        return "encrypted; pack the archive anew without a password"
    if member.method not in (STORED, DEFLATED):
        name = METHODS.get(member.method, "unknown")
        return f"compression method {member.method} ({name}) is not supported; pack the archive anew with deflate"
    if member.method == STORED and member.packed != member.size:
        return f"stored as {member.packed:,} bytes but said to have {member.size:,}; the archive is damaged"
    if member.end > where.start:
        return "its data reach into the archive's directory; the archive is damaged"
    if member.size > max_ratio * max(member.packed, 1):
        grows = f"unpacks to {member.size:,} bytes from {member.packed:,}"
        return f"{grows}; the limit is {max_ratio:g} times (limits.max_ratio)"
    return None


def _overlapping(starts: "array[int]", ends: "array[int]") -> "list[int]":
    """Members that share bytes with another (Fifield, A better zip bomb, WOOT 2019)."""
    order = np.argsort(np.frombuffer(starts, np.int64), kind="stable")
    first, last = np.frombuffer(starts, np.int64)[order], np.frombuffer(ends, np.int64)[order]
    if len(order) < 2:
        return []
    reached = np.maximum.accumulate(last)[:-1]
    into_earlier = np.append(False, first[1:] < reached)
    into_later = np.append(last[:-1] > first[1:], False)
    found: list[int] = order[into_earlier | into_later].tolist()
    return found


class ZipReader(Reader):
    """Opens members by `[archive, place, packed size, size, method, CRC-32]`."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._near: tuple[str, str] | None = None

    def path(self, place: str) -> str:
        """The archive."""
        return located(place, 5)[0]

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """The member's bytes; OSError, now or when reading, unless they are those that the directory describes."""
        path, (at, packed, size, method, crc) = located(place, 5)
        file = self.held(path, version)
        skipped = self._skipped(file, at, method)
        if max(packed, size) > WHOLE:
            return BufferedReader(_Unpacked(window(file, at + LOCAL.size + skipped, packed), size, method, crc), PIECE)
        data = file.read(skipped + packed)[skipped:]
        return BytesIO(_whole(data, packed, size, method, crc))

    def read(self, place: str, version: str | None, limit: int) -> bytes:
        """The member's bytes, at most `limit` + 1; OSError as `open` and its stream raise it."""
        path, (at, packed, size, method, crc), self._near = located_near(place, 5, self._near)
        if max(packed, size) > min(WHOLE, limit):
            return super().read(place, version, limit)
        file = self.held(path, version)
        skipped = self._skipped(file, at, method)
        return _whole(file.read(skipped + packed)[skipped:], packed, size, method, crc)

    def _skipped(self, file: BufferedIOBase, at: int, method: int) -> int:
        """Bytes between the header of the member at `at`, which is read, and its data; OSError if there is none."""
        file.seek(at)
        head = file.read(LOCAL.size)
        if len(head) < LOCAL.size or not head.startswith(b"PK\3\4"):
            raise OSError("no member begins where the directory says; the archive is damaged")
        fields = LOCAL.unpack(head)
        if fields[3] != method or fields[2] & ENCRYPTED:
            raise OSError("the member and the directory disagree; the archive is damaged")
        return int(fields[9] + fields[10])


def _whole(data: bytes, packed: int, size: int, method: int, crc: int) -> bytes:
    """A small member in one go."""
    if len(data) < packed:
        raise OSError("the file ends inside this record: it is truncated")
    if method == DEFLATED:
        decoder = zlib.decompressobj(-15)
        try:
            data = decoder.decompress(data, size + 1)
        except zlib.error as fault:
            raise OSError(f"cannot be unpacked: {fault}") from fault
        if not decoder.eof and len(data) <= size:
            raise OSError("its packed data end too early; the archive is damaged")
    _check(len(data), size, zlib.crc32(data), crc)
    return data


def _check(length: int, size: int, found: int, crc: int) -> None:
    if length > size:
        raise OSError(f"unpacks to more than the {size:,} bytes that the archive says")
    if length < size:
        raise OSError(f"unpacks to {length:,} bytes; the archive says {size:,}")
    if found != crc:
        raise OSError("its CRC-32 is not the one that the archive says; the archive is damaged")


class _Unpacked(RawIOBase):
    """A large member as a stream; its last bytes are given only if length and CRC-32 are right."""

    def __init__(self, packed: BufferedIOBase, size: int, method: int, crc: int) -> None:
        self._packed, self._size, self._crc = packed, size, crc
        self._decoder = zlib.decompressobj(-15) if method == DEFLATED else None
        self._length = self._found = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Fill `buffer` with the next bytes; OSError unless the member is as it should be."""
        if self._length == self._size:
            return 0
        data = self._next(min(len(buffer), self._size - self._length))
        self._length, self._found = self._length + len(data), zlib.crc32(data, self._found)
        if not data or self._length == self._size:
            more = self._next(1) if data else b""
            _check(self._length + len(more), self._size, self._found, self._crc)
        buffer[: len(data)] = data
        return len(data)

    def _next(self, wanted: int) -> bytes:
        """At most `wanted` unpacked bytes; none at the end."""
        if self._decoder is None:
            return self._packed.read(wanted)
        while not self._decoder.eof:
            packed = self._decoder.unconsumed_tail or self._packed.read(PIECE)
            try:
                data = self._decoder.decompress(packed, wanted)
            except zlib.error as fault:
                raise OSError(f"cannot be unpacked: {fault}") from fault
            if data:
                return data
            if not packed and not self._decoder.eof:
                raise OSError("its packed data end too early; the archive is damaged")
        return b""
