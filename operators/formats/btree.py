"""LMDB's files as they lie, by the layout of data version 1 (`mdb.c`): meta pages, a B+ tree, overflow pages.

Every number that the file gives is checked against the file before it is followed.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase

import numpy as np
from numpy.typing import NDArray

from operators.errors import FormatError
from operators.formats.blocks import gather, numbers

META = struct.Struct("<QHHIIIQQ48s48sQQ")
"""A page's header, then magic, version, address, map size, the free and main databases, last page, transaction."""
DATABASE = struct.Struct("<IHHQQQQQ")
"""Page size (of the free database only), flags, depth, branch, leaf and overflow pages, entries, root page."""
PAGE, NODE = struct.Struct("<QHHHH"), struct.Struct("<HHHH")
MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW = 1, 2, 4
BIG, SUB, SEVERAL = 1, 2, 4
EMPTY = 2**64 - 1
MAX_DEPTH = 32
PAGES = 512
"""Pages looked at in one go."""

NOTHING = np.zeros(0, np.int64)


class Damaged(OSError):
    """A page or value is not what the tree says that it is."""


@dataclass(frozen=True, slots=True)
class Tree:
    """One database file."""

    file: BufferedIOBase
    end: int
    page: int
    """Bytes of a page."""
    root: int
    entries: int
    """How many the file announces."""


def open_tree(file: BufferedIOBase, path: str) -> Tree:
    """The newer of the two states of the database that its file holds; FormatError if there is none."""
    end, newest, page = file.seek(0, io.SEEK_END), -1, 4096
    found = None
    for at in (0, 1):
        file.seek(at * page)
        data = file.read(META.size)
        if len(data) < META.size:
            continue
        *_, magic, version, _, _, free, main, _, transaction = META.unpack(data)
        if magic != MAGIC:
            continue
        if version != VERSION:
            raise FormatError(
                f"{path}: LMDB data version {version}; only {VERSION} can be read. Copy it with LMDB 0.9."
            )
        size = DATABASE.unpack(free)[0]
        if size not in (2**power for power in range(8, 17)):
            continue
        page = size
        if transaction > newest:
            *_, entries, root = DATABASE.unpack(main)
            newest, found = transaction, Tree(file, end, page, root, entries)
    if found is None:
        raise FormatError(
            f"{path}: no LMDB database of a 64-bit machine, or its first pages are damaged. Get it again."
        )
    return found


def _page(tree: Tree, number: int) -> tuple[bytes, int]:
    """A page's bytes and flags; Damaged if the file does not hold it."""
    tree.file.seek(number * tree.page if number < tree.end else tree.end)
    data = tree.file.read(tree.page)
    if len(data) < tree.page:
        raise Damaged(f"page {number:,} lies behind the end of the file: it is truncated; get it again")
    own, _, flags, *_ = PAGE.unpack_from(data)
    if own != number:
        raise Damaged(f"page {number:,} is not where it should be: the file is damaged; get it again")
    return data, flags


def _nodes(data: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
    """Of each node of a page: its three numbers, where its data begin in the page, and its key."""
    lower = PAGE.unpack_from(data)[3]
    if not PAGE.size <= lower <= len(data) or (lower - PAGE.size) // 2 * NODE.size > len(data) - lower:
        raise Damaged("a page's table of contents is damaged; get the file again")
    for (at,) in struct.iter_unpack("<H", data[PAGE.size : lower // 2 * 2]):
        if not lower <= at <= len(data) - NODE.size:
            raise Damaged("a page's table of contents is damaged; get the file again")
        low, high, flags, size = NODE.unpack_from(data, at)
        begin = at + NODE.size
        if begin + size > len(data):
            raise Damaged("a key is longer than its page; get the file again")
        yield low, high, flags, begin + size, data[begin : begin + size]


@dataclass(frozen=True, slots=True)
class Value:
    """A key and where its value lies in the file, or what is wrong."""

    key: bytes
    start: int = 0
    size: int = 0
    head: bytes = b""
    """The first bytes of the value."""
    fault: str | None = None
    kind: str | None = None
    """What it is if no value."""


def leaves(tree: Tree) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8], list[Value]]]:
    """All leaf pages, many at once: their numbers (P,) and bytes (P, page), and what was damaged on the way there.

    A damaged page is one fault, and the rest goes on.
    """
    level, left = np.array([tree.root] if tree.root != EMPTY else [], np.uint64), tree.end // tree.page + 1
    for depth in range(MAX_DEPTH + 2):
        below: list[int] = []
        for at in range(0, len(level), PAGES):
            some = level[at : at + PAGES]
            if depth > MAX_DEPTH or left < len(some):
                circle = "the tree runs in circles: the file is damaged; get it again"
                yield NOTHING, np.zeros((0, tree.page), np.uint8), [Value(b"damaged-page-%d" % some[0], fault=circle)]
                return
            left -= len(some)
            there_N = some < tree.end // tree.page
            numbers_N = some[there_N].astype(np.int64)
            pages_NB = gather(tree.file, numbers_N * tree.page, tree.page)
            flags_N = numbers(pages_NB, 10, "<u2")
            right_N = numbers(pages_NB, 0, "<i8") == numbers_N
            leaf_N = right_N & (flags_N & (LEAF | BRANCH) == LEAF)
            faults = []
            for number in [*some[~there_N].tolist(), *numbers_N[~leaf_N].tolist()]:
                try:
                    below += _below(tree, number) if len(below) <= left else []  # more is told as a circle, below
                except Damaged as fault:
                    faults.append(Value(b"damaged-page-%d" % number, fault=str(fault)))
            yield numbers_N[leaf_N], pages_NB[leaf_N], faults
        level = np.array(below, np.uint64)


def _below(tree: Tree, number: int) -> list[int]:
    """The pages that a branch page leads to; Damaged if it is none."""
    data, flags = _page(tree, number)
    if not flags & BRANCH:
        raise Damaged(f"page {number:,} is no page of a tree: the file is damaged; get it again")
    return [low | high << 16 | bits << 32 for low, high, bits, _, _ in _nodes(data)]


def values(tree: Tree, number: int) -> Iterator[Value]:
    """What the keys of one leaf page stand for; Damaged if it is none."""
    data, _ = _page(tree, number)
    for node in list(_nodes(data)):
        yield _value(tree, number, data, *node)


def _value(tree: Tree, number: int, data: bytes, low: int, high: int, flags: int, begin: int, key: bytes) -> Value:
    """One node of a leaf."""
    size = low | high << 16
    if flags & (SUB | SEVERAL):
        return Value(key, kind="named database" if flags & SUB else "key with several values")
    start = number * tree.page + begin
    if flags & BIG and begin + 8 <= len(data):
        first = int.from_bytes(data[begin : begin + 8], "little")
        start = first * tree.page + PAGE.size
        tree.file.seek(min(start - PAGE.size, tree.end))
        block = tree.file.read(PAGE.size + 16)
        if len(block) < PAGE.size or PAGE.unpack_from(block)[0] != first or not block[10] & OVERFLOW:
            return Value(key, fault="its pages are not where they should be: the file is damaged; get it again")
        head = block[PAGE.size :]
    else:
        head = data[begin : begin + min(size, 16)]
        if begin + size > len(data):
            return Value(key, fault="its value is longer than its page: the file is damaged; get it again")
    if start + size > tree.end:
        return Value(key, fault="its value lies behind the end of the file: it is truncated; get it again")
    return Value(key, start, size, head[:size])
