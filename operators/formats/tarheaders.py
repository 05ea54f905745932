"""The members of tar archives, read as a stream.

Layout by POSIX.1-2017, `pax` (ustar and pax headers), and GNU tar's manual, appendix D (long names, sparse files). It
is our own code because `tarfile` keeps every member (about 1.5 kB each), reads extended headers of any size into memory
and stops without a word where a second archive was appended.
"""

from collections.abc import Iterator, Mapping
from io import BufferedIOBase
from typing import NamedTuple

from operators.formats.members import decoded

BLOCK = 512
EMPTY = bytes(BLOCK)
PIECE = 2**16
HEADER_BYTES = 2**20
"""Of one extended header or long name; POSIX has no limit, real ones take some hundred bytes."""
FAR = 2**61

KINDS = {"1": "link", "2": "link", "3": "device", "4": "device", "5": "folder", "6": "device"}
"""Types without data."""
OTHERS = {"D": "folder", "S": "sparse file", "M": "part of another volume", "V": "volume label", "N": "list of names"}
"""GNU tar's types with data; every other type is a file (POSIX)."""


class TarMember(NamedTuple):
    """One member."""

    name: str
    kind: str
    """`file`, or a word of `KINDS` or `OTHERS`."""
    start: int
    """Of its data."""
    size: int


class Members:
    """The members of one archive, once, in order.

    Iterating raises OSError where the archive is damaged or cut short: what comes after cannot be found.
    """

    def __init__(self, file: BufferedIOBase) -> None:
        self._file = file
        self._at = 0
        self._global: dict[bytes, bytes] = {}
        self.note: str | None = None
        """How the archive ended, if not as it should; known afterwards."""

    def __iter__(self) -> Iterator[TarMember]:
        own: dict[bytes, bytes] = {}
        while (head := self._head(pending=bool(own))) is not None:
            try:
                size, kind = _number(head[124:136]), chr(head[156])
                if kind in "xXgLK":
                    self._extend(kind, size, own)
                    continue
                yield self._member(head, kind, size, {**self._global, **own})
            except ValueError as fault:
                raise OSError(f"the member at byte {self._at:,} is damaged ({fault})") from fault
            own = {}

    def _head(self, pending: bool) -> bytes | None:
        """The next header block, None at the end."""
        head = self._read(self._at, BLOCK)
        if head == EMPTY and not pending:
            return self._after_mark()
        if len(head) < BLOCK:
            end = self._file.seek(0, 2)
            if head.strip(b"\0") or pending or end < self._at or self._at == 0:
                raise OSError(f"it is cut short: it ends at byte {end:,}, inside a member")
            self.note = "has no end mark, as if it were cut short"
            return None
        if not _valid(head):
            raise OSError(f"no member at byte {self._at:,}, where one should begin; the archive is damaged")
        return head

    def _after_mark(self) -> bytes | None:
        """The first header of an archive that was appended to this one; None if only zeros follow."""
        while piece := self._read(self._at, PIECE):
            rest = piece.lstrip(b"\0")
            if not rest:
                self._at += len(piece)
                continue
            self._at += (len(piece) - len(rest)) // BLOCK * BLOCK
            head = self._read(self._at, BLOCK)
            if len(head) == BLOCK and _valid(head):
                self.note = "consists of several archives, one after the other; all were read"
                return head
            self.note = f"has bytes after its end mark (from byte {self._at:,}) that are no members; they were not read"
            return None
        return None

    def _extend(self, kind: str, size: int, own: dict[bytes, bytes]) -> None:
        """Take what an extended header says of the next member, or of all that follow."""
        if size > HEADER_BYTES:
            raise ValueError(f"an extended header of {size:,} bytes")
        data = self._read(self._at + BLOCK, size)
        if len(data) < size:
            raise ValueError("an extended header is cut short")
        if kind == "L":
            own[b"path"] = data.split(b"\0", 1)[0]
        elif kind != "K":
            (self._global if kind == "g" else own).update(_records(data))
        self._at += BLOCK + _padded(size)

    def _member(self, head: bytes, kind: str, size: int, said: Mapping[bytes, bytes]) -> TarMember:
        start = self._at + BLOCK
        name = said.get(b"GNU.sparse.name") or said.get(b"path") or _name(head)
        word = KINDS.get(kind) or OTHERS.get(kind, "file")
        if kind == "\0" and name.endswith(b"/"):
            word, size = "folder", 0
        elif kind in KINDS:
            size = 0
        elif b"size" in said:
            size = _digits(said[b"size"], 10)
        if kind == "S":
            start = self._sparse(head, start)
        elif any(key.startswith(b"GNU.sparse.") for key in said):
            word = "sparse file"
        if start + size > FAR:
            raise ValueError(f"a size of {size:,} bytes")
        self._at = start + _padded(size)
        return TarMember(decoded(name), word, start, size)

    def _sparse(self, head: bytes, start: int) -> int:
        """Where the data of an old GNU sparse file begin, after more blocks of its map."""
        more = head[482]
        while more:
            block = self._read(start, BLOCK)
            if len(block) < BLOCK:
                raise ValueError("the map of a sparse file is cut short")
            more, start = block[504], start + BLOCK
        return start

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(size)


def _valid(head: bytes) -> bool:
    """Whether a block's checksum, of bytes or (old Sun) signed bytes, is right."""
    try:
        said = _number(head[148:156])
    except ValueError:
        return False
    total = sum(head) - sum(head[148:156]) + 8 * 32
    return said == total or said == total - 256 * sum(byte > 127 for byte in head[:148] + head[156:])


def _name(head: bytes) -> bytes:
    name = head[:100].split(b"\0", 1)[0]
    if head[257:263] == b"ustar\0" and head[345]:
        return head[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _number(field: bytes) -> int:
    """A number in octal digits, or in binary (GNU) where the first bit is set; ValueError for others."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ValueError("a number below zero or beyond reason")
        return int.from_bytes(field[1:], "big")
    return _digits(field.split(b"\0", 1)[0].strip(), 8)


def _digits(text: bytes, base: int) -> int:
    if not text:
        return 0
    if not text.isdigit() or len(text) > 30:
        raise ValueError("a number that is none")
    return int(text, base)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a pax header: `length key=value` and a newline, each."""
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 20)
        length = _digits(data[at:space], 10) if space > at else 0
        key, mark, value = data[space + 1 : at + length - 1].partition(b"=")
        if not key or not mark or data[at + length - 1 : at + length] != b"\n":
            raise ValueError("a broken extended header")
        yield key, value
        at += length
