"""LMDB: files written by LMDB itself, read without it, byte for byte."""

import io
import pickle
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import pyarrow as pa
import pytest

from operators.errors import FormatError
from operators.formats import SetConfig, SourceLimits, lmdbs
from operators.formats.btree import Value
from operators.formats.listing import Entry, Listing
from operators.sources import LocalSource

JPEG = b"\xff\xd8\xff\xe0 an image"


def put(path: Path, values: Mapping[bytes, bytes], subdir: bool = False, **options: Any) -> None:
    with lmdb.open(str(path), subdir=subdir, map_size=1 << 26, **options) as env, env.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)


def hsface(images: list[tuple[bytes, int]], raw: bool = True) -> dict[bytes, bytes]:
    """As the writer of HSFace does it: msgpack of (image, label) by number, and three entries of its own."""
    packed = {b"%d" % n: msgpack.packb(pair, use_bin_type=raw) for n, pair in enumerate(images)}
    own = {b"__keys__": msgpack.packb(list(packed)), b"__len__": msgpack.packb(len(packed))}
    return packed | own | {b"__classnum__": msgpack.packb(3)}


def listed(uri: Path, **options: Any) -> Listing:
    return lmdbs.listing(LocalSource(str(uri)), SetConfig(uri=str(uri), **options))


def read(uri: Path, entries: "list[Entry] | Any") -> dict[str, bytes]:
    found = {}
    with lmdbs.LmdbReader(LocalSource(str(uri))) as opened:
        for entry in entries:
            if entry.error is None:
                with opened.open(entry.place) as file:
                    found[entry.key] = file.read()
                assert len(found[entry.key]) == entry.bytes
    return found


def random_image(rng: random.Random, size: int) -> bytes:
    return JPEG + rng.randbytes(size)


@pytest.mark.parametrize("raw", [True, False], ids=["bin", "old writers' str"])
@pytest.mark.parametrize("subdir", [True, False])
def test_hsface_comes_back_with_its_labels(tmp_path: Path, subdir: bool, raw: bool) -> None:
    rng = random.Random(0)
    labels = [0, 1, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, -1, -33]
    images = [(random_image(rng, rng.choice((0, 10, 250, 3000, 70000))), label) for label in labels]
    put(tmp_path / "hsface.lmdb", hsface(images, raw), subdir)
    for uri in (tmp_path / "hsface.lmdb", tmp_path):
        found = listed(uri)
        assert read(uri, found.entries) == {f"{label}/{n}": image for n, (image, label) in enumerate(images)}
        assert {e.key: e.identity for e in found.entries} == {
            f"{label}/{n}": str(label) for n, label in enumerate(labels)
        }
        assert found.unlisted == {"index of the writer": 3}
        assert found.notes == []


def test_vec2face_training_files_have_a_feature_between(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(512, np.float32))
    put(tmp_path / "a.lmdb", {b"0": msgpack.packb((JPEG, buffer.getvalue(), 7))})
    found = listed(tmp_path)
    assert read(tmp_path, found.entries) == {"7/0": JPEG}


def test_plain_images_are_named_by_their_keys(tmp_path: Path) -> None:
    rng = random.Random(1)
    values = {
        f"{n % 40:03d}/{n}.png".encode(): b"\x89PNG\r\n\x1a\n" + rng.randbytes(rng.randrange(9000)) for n in range(900)
    }
    put(tmp_path / "a.lmdb", values | {b"num-samples": b"900", b"\xff\x00": JPEG})
    found = listed(tmp_path)
    assert read(tmp_path, found.entries) == {k.decode(): v for k, v in values.items()} | {"0xff00": JPEG}
    assert {e.identity for e in found.entries} == {f"{n:03d}" for n in range(40)} | {None}
    assert found.unlisted == {"value that is no image": 1}


@pytest.mark.parametrize("deleted", [0, 1, 299])
def test_what_was_deleted_or_replaced_does_not_come_back(tmp_path: Path, deleted: int) -> None:
    put(tmp_path / "a.lmdb", {b"%d.jpg" % n: JPEG + bytes(3000) for n in range(300)})
    with (
        lmdb.open(str(tmp_path / "a.lmdb"), subdir=False, map_size=1 << 26) as env,
        env.begin(write=True) as transaction,
    ):
        for n in range(deleted):
            transaction.delete(b"%d.jpg" % n)
        transaction.put(b"299.jpg", JPEG)
    found = read(tmp_path, listed(tmp_path).entries)
    assert found == {f"{n}.jpg": JPEG + bytes(3000) for n in range(deleted, 299)} | {"299.jpg": JPEG}


def test_several_databases_are_told_apart(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / f"{name}.lmdb", {b"x/1.jpg": JPEG}, subdir=True)
    assert [e.key for e in listed(tmp_path).entries] == ["a.lmdb/x/1.jpg", "b.lmdb/x/1.jpg"]


class Bait:
    """What must never be made from a file."""

    def __reduce__(self) -> Any:
        raise AssertionError("unpickled")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_refused_and_never_loaded(tmp_path: Path, protocol: int) -> None:
    evil = pickle.dumps((JPEG * 9, 3), protocol)
    put(tmp_path / "a.lmdb", {b"0": evil, b"1": evil})
    with pytest.raises(FormatError, match=r"a\.lmdb: its values are Python pickles.*not read"):
        listed(tmp_path)
    put(tmp_path / "a.lmdb", {b"0": JPEG})
    assert [e.error for e in listed(tmp_path).entries] == [
        None,
        "its value is a Python pickle, which can run any code and is not read",
    ]


@pytest.mark.parametrize(
    "value",
    [
        msgpack.packb((JPEG, "seven")),
        msgpack.packb((JPEG, 7)) + b"\0",
        msgpack.packb((JPEG, 7))[:-1],
        msgpack.packb((JPEG, 70000))[:-1],
        msgpack.packb((5, 7)),
        b"\x92\xc6\xff\xff\xff\xff" + JPEG,
        b"\x93\xc4\x10" + JPEG,
        b"no image" * 9,
    ],
)
def test_a_value_of_another_kind_is_a_rejected_row(tmp_path: Path, value: bytes) -> None:
    put(tmp_path / "a.lmdb", {b"0": JPEG, b"1": value})
    good, bad = listed(tmp_path).entries
    assert good.error is None
    assert "msgpack of an image and a number" in str(bad.error)


def test_named_databases_and_several_values_are_counted(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "a.lmdb"), subdir=False, max_dbs=2) as env:
        inner = env.open_db(b"inner")
        with env.begin(write=True) as transaction:
            transaction.put(b"1.jpg", JPEG)
            transaction.put(b"2.jpg", JPEG, db=inner)
    found = listed(tmp_path)
    assert [e.key for e in found.entries] == ["1.jpg"]
    assert found.unlisted == {"named database": 1}


@pytest.mark.parametrize("left", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_says_what_is_missing(tmp_path: Path, left: float) -> None:
    with lmdb.open(str(tmp_path / "a.lmdb"), subdir=False, map_size=1 << 26) as env:
        for n in range(200):  # the tree comes to lie among the images
            with env.begin(write=True) as transaction:
                transaction.put(b"%03d.jpg" % n, JPEG + bytes(5000))
    data = (tmp_path / "a.lmdb").read_bytes()
    (tmp_path / "a.lmdb").write_bytes(data[: int(len(data) * left)])
    try:
        found = listed(tmp_path)
    except FormatError as refusal:
        assert "announces 200 keys, and 0 were found" in str(refusal)
        return
    assert 0 < len(read(tmp_path, found.entries)) < 200
    assert all("get it again" in str(e.error) for e in found.entries if e.error is not None)
    assert len(found.entries) == 200 or "announces 200 keys" in found.notes[0]


def test_a_tree_that_runs_in_circles_ends(tmp_path: Path) -> None:
    put(tmp_path / "a.lmdb", {b"%05d.jpg" % n: JPEG for n in range(3000)})
    data = bytearray((tmp_path / "a.lmdb").read_bytes())
    main = max((0, 4096), key=lambda at: struct.unpack_from("<Q", data, at + 16 + 24 + 96 + 8)[0])
    root = struct.unpack_from("<Q", data, main + 16 + 24 + 48 + 40)[0] * 4096
    assert struct.unpack_from("<H", data, root + 10)[0] & 1, "the root is a branch"
    for (at,) in struct.iter_unpack("<H", data[root + 16 : root + struct.unpack_from("<H", data, root + 12)[0]]):
        struct.pack_into("<HHH", data, root + at, root // 4096, 0, 0)
    (tmp_path / "a.lmdb").write_bytes(data)
    with pytest.raises(FormatError, match="announces 3,000 keys, and 0 were found"):
        listed(tmp_path)


def test_limits_and_names(tmp_path: Path) -> None:
    put(tmp_path / "a.lmdb", {b"../1.jpg": JPEG, b"2.jpg": JPEG + bytes(90)})
    found = listed(tmp_path, limits=SourceLimits(max_member_bytes=50))
    errors = {entry.key: str(entry.error) for entry in found.entries}
    assert "leads out" in errors["../1.jpg"]
    assert "max_member_bytes" in errors["2.jpg"]


def test_values_that_are_no_images_are_not_all_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.lmdb"
    put(path, {b"%06d" % at: JPEG if at < 3 else b"n" * 40 for at in range(3000)})
    assert len(listed(path).entries) == 3000
    monkeypatch.setattr("operators.formats.listing.MOST_FAULTS", 1000)
    refuse, refused = lmdbs.Spans.refuse, []
    monkeypatch.setattr(lmdbs.Spans, "refuse", lambda *given: refused.append(1) or refuse(*given))
    with pytest.raises(FormatError, match=r"1,004 records cannot be read and 3 can \(values that are no images"):
        listed(path)
    assert len(refused) == 1004


def test_a_database_of_too_many_values_is_not_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is scanned, before any value is looked at: plain values, and values that are damaged."""
    path = tmp_path / "x.lmdb"
    put(path, {b"%06d" % at: JPEG for at in range(3000)})
    looked: list[int] = []
    monkeypatch.setattr(lmdbs, "_usual", lambda *given: looked.append(1))
    with pytest.raises(FormatError, match=r"more than 100 records; raise limits\.max_records"):
        listed(path, limits=SourceLimits(max_records=100))
    monkeypatch.setattr("operators.formats.listing.MOST_FAULTS", 10)
    monkeypatch.setattr("operators.formats.lmdbscan._usual", lambda tree, numbers, pages: (
        pa.array([], pa.large_binary()), np.zeros((3, 0), np.int64), numbers.tolist()))  # fmt: skip
    monkeypatch.setattr(
        "operators.formats.lmdbscan._one_by_one", lambda tree, number: iter([Value(b"k", fault="damaged")])
    )
    with pytest.raises(FormatError, match="11 records cannot be read and 0 can"):
        listed(path)
    assert not looked


@pytest.mark.parametrize(
    ("change", "reason"),
    [((20, 2), "data version 2"), ((16, 0), "first pages are damaged"), ((40, 7), "first pages are damaged")],
)
def test_other_versions_and_damaged_first_pages_are_refused(
    tmp_path: Path, change: tuple[int, int], reason: str
) -> None:
    put(tmp_path / "a.lmdb", {b"1.jpg": JPEG})
    data = bytearray((tmp_path / "a.lmdb").read_bytes())
    for page in (0, 4096):
        struct.pack_into("<I", data, page + change[0], change[1])
    (tmp_path / "a.lmdb").write_bytes(data)
    with pytest.raises(FormatError, match=reason):
        listed(tmp_path)


def test_an_empty_database_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.lmdb", {})
    with pytest.raises(FormatError, match="no image can be read"):
        listed(tmp_path)


def test_a_page_that_claims_more_nodes_than_it_can_hold_is_damaged(tmp_path: Path) -> None:
    put(tmp_path / "a.lmdb", {b"%03d.jpg" % n: JPEG for n in range(400)})
    data = bytearray((tmp_path / "a.lmdb").read_bytes())
    leaf = next(at for at in range(8192, len(data), 4096) if data[at + 10] & 2)
    last = max(struct.unpack_from("<20H", data, leaf + 16))
    struct.pack_into("<H", data, leaf + 12, 3000)
    struct.pack_into("<1492H", data, leaf + 16, *[last] * 1492)
    (tmp_path / "a.lmdb").write_bytes(data)
    found = listed(tmp_path / "a.lmdb")
    wrong = [e.error for e in found.entries if e.error is not None]
    assert len(wrong) == 1 and "table of contents is damaged" in wrong[0] and 100 < len(found.entries) < 400


def test_recognised_by_content(tmp_path: Path) -> None:
    def recognised(uri: Path) -> bool:
        source = LocalSource(str(uri))
        return lmdbs.recognises(source, list(source.files()))

    for name, data in (("a.lmdb", b""), ("data.mdb", bytes(9000)), ("c.jpg", JPEG)):
        (tmp_path / name).write_bytes(data)
    assert not recognised(tmp_path)
    put(tmp_path / "db", {b"1.jpg": JPEG}, subdir=True)
    assert recognised(tmp_path)
    assert recognised(tmp_path / "db")
    assert not recognised(tmp_path / "c.jpg")


def test_damaged_files_never_crash_or_hang(
    tmp_path: Path, mutants: Callable[[bytes, int, int], Iterator[bytes]], survives: Callable[..., object]
) -> None:
    put(tmp_path / "a.lmdb", hsface([(JPEG + bytes(n * 90), n) for n in range(60)]))
    (tmp_path / "a.lmdb-lock").unlink()
    for data in mutants((tmp_path / "a.lmdb").read_bytes(), 1, 150):
        (tmp_path / "a.lmdb").write_bytes(data)
        survives("lmdb", tmp_path, 5)
