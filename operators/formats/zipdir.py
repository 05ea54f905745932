"""The central directory of zip archives, read as a stream.

Layout by PKWARE's APPNOTE.TXT, sections 4.3 (records), 4.4 (fields) and 4.5.3 (zip64). It is our own code because
`zipfile` reads the whole directory at once and keeps about 1 kB for each member.
"""

import struct
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from typing import NamedTuple

from operators.formats.members import decoded

END = struct.Struct("<4s4H2LH")
"""End of the central directory (4.3.16)."""
END64 = struct.Struct("<4sQ2H2L4Q")
"""Its zip64 form (4.3.14)."""
END64_PLACE = struct.Struct("<4sLQL")
"""Where that is (4.3.15)."""
CENTRAL = struct.Struct("<4s2B5H3L5H2L")
"""One member in the directory, before its name (4.3.12)."""

PIECE = 2**20
UNIX, DARWIN = 3, 19
"""Systems (4.4.2.1) whose archives hold file modes."""
UTF8 = 0x0800
"""Flag (4.4.4): the name is UTF-8."""
FAR = 2**61
"""Places and sizes beyond are taken for this: no archive reaches so far, and sums still fit 64 bits."""


class Directory(NamedTuple):
    """Where the central directory is, and how many members it lists (modulo 65536 in old archives)."""

    start: int
    size: int
    total: int
    shift: int
    """Bytes before the archive's own beginning, as of a self-extracting program."""


class ZipMember(NamedTuple):
    """One member as the directory describes it."""

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    mode: int
    """As in `stat`; 0 where the archive has none."""
    offset: int
    end: int
    """Its data end here or later."""


def members(file: BufferedIOBase, where: Directory) -> Iterator[ZipMember]:
    """All members, in the directory's order; OSError if it is damaged."""
    file.seek(where.start)
    data, at, left, count = b"", 0, where.size, 0
    while left or at < len(data):
        if len(data) - at < CENTRAL.size + 3 * 65535 and left:
            taken = _exactly(file, min(PIECE, left))
            data, at, left = data[at:] + taken, 0, left - len(taken)
        if len(data) - at < CENTRAL.size or data[at : at + 4] != b"PK\1\2":
            raise OSError(f"its directory is damaged after {count:,} members")
        fields = CENTRAL.unpack_from(data, at)
        after = at + CENTRAL.size + fields[11] + fields[12] + fields[13]
        if after > len(data):
            raise OSError(f"its directory is damaged after {count:,} members")
        yield _member(fields, data, at + CENTRAL.size, where.shift)
        at, count = after, count + 1
    if (count - where.total) % 65536:
        raise OSError(f"its directory lists {count:,} members and says {where.total:,}; the archive is damaged")


def _member(fields: tuple[int, ...], data: bytes, at: int, shift: int) -> ZipMember:
    flags, crc, packed, size = fields[4], *fields[8:11]
    offset, length = fields[17], fields[11]
    raw, extra = data[at : at + length], data[at + length : at + length + fields[12]] if fields[12] else b""
    if 0xFFFFFFFF in (size, packed, offset):
        size, packed, offset = _wide_numbers(extra, size, packed, offset)
    offset += shift
    mode = fields[16] >> 16 if fields[2] in (UNIX, DARWIN) else 0
    end = offset + 30 + length + packed
    return ZipMember(_name(raw, flags, extra), flags, fields[5], crc, packed, size, mode, offset, end)


def _wide_numbers(extra: bytes, *numbers: int) -> Iterator[int]:
    """Size, packed size and offset, each from the zip64 field (4.5.3) where the directory has all ones."""
    wide, at = _extra(extra, 0x0001), 0
    for number in numbers:
        if number == 0xFFFFFFFF and len(wide) >= at + 8:
            number, at = int.from_bytes(wide[at : at + 8], "little"), at + 8
        yield min(number, FAR)


def _name(raw: bytes, flags: int, extra: bytes) -> str:
    """UTF-8 where flagged, in the extra field 0x7075 (4.6.9), or where it reads as that; else code page 437."""
    if raw.isascii() or flags & UTF8:
        return decoded(raw)
    unicode = _extra(extra, 0x7075)
    if len(unicode) > 5 and int.from_bytes(unicode[1:5], "little") == zlib.crc32(raw):
        return decoded(unicode[5:])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("cp437")


def _extra(extra: bytes, wanted: int) -> bytes:
    """One of the extra fields (4.5), empty if it is not there."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == wanted:
            return extra[at + 4 : at + 4 + length]
        at += 4 + length
    return b""


def directory(file: BufferedIOBase) -> Directory:
    """Find the central directory; OSError if there is none."""
    length = file.seek(0, 2)
    tail_at = max(0, length - END.size - 65535)
    file.seek(tail_at)
    tail = file.read(length - tail_at)
    at = tail.rfind(b"PK\5\6")
    while at >= 0:
        if len(tail) - at >= END.size:
            found = _described(file, tail_at + at, END.unpack_from(tail, at), length)
            if found is not None:
                return found
        at = tail.rfind(b"PK\5\6", 0, at)
    raise OSError("no zip archive, or cut short: its directory is not at its end")


def _described(file: BufferedIOBase, end: int, fields: tuple[int, ...], length: int) -> Directory | None:
    """The directory that an end record at `end` describes; None if it is not there."""
    _, disk, first_disk, _, count, size, offset, comment = fields
    exact = end + END.size + comment == length
    wide = _wide(file, end)
    if wide is not None:
        end, (disk, first_disk, _, count, size, offset) = wide[0], wide[1][4:]
    if disk != first_disk or disk not in (0, 0xFFFF):
        if not exact:
            return None
        raise OSError("one part of a split archive; join the parts first (`zip -s 0 in.zip --out joined.zip`)")
    start = end - size
    if start < 0 or offset > start:
        return None
    file.seek(start)
    if size and file.read(4) != b"PK\1\2":
        return None
    return Directory(start, size, count, start - offset)


def _wide(file: BufferedIOBase, end: int) -> tuple[int, tuple[int, ...]] | None:
    """Place and fields of the zip64 end record that goes before the end record at `end`, if there is one."""
    if end < END64_PLACE.size + END64.size:
        return None
    file.seek(end - END64_PLACE.size)
    mark, _, said, _ = END64_PLACE.unpack(_exactly(file, END64_PLACE.size))
    if mark != b"PK\6\7":
        return None
    for at in (end - END64_PLACE.size - END64.size, said):
        if at <= end - END64_PLACE.size - END64.size:
            file.seek(at)
            fields = END64.unpack(_exactly(file, END64.size))
            if fields[0] == b"PK\6\6":
                return at, fields
    raise OSError("its zip64 end record is missing; the archive is damaged")


def _exactly(file: BufferedIOBase, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise OSError("it ends before its directory does; the archive is cut short")
    return data
