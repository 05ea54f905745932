"""Zip archives are read as Python's `zipfile` wrote them, and hostile ones become rows or refusals."""

import io
import json
import random
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from operators.errors import FormatError
from operators.formats import SetConfig, SourceLimits, reader, zips
from operators.formats.listing import Entry, Listing
from operators.sources import open_source

MIXED = random.Random(5).randbytes(3000) + bytes(3000)


def packed(path: Path, *members: str | tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for member in members:
            name, data = (member, f"bytes of {member}".encode()) if isinstance(member, str) else member
            file.writestr(name, data)
    return path


def listed(place: Path, **options: object) -> Listing:
    return zips.listing(open_source(str(place)), SetConfig(uri=str(place), **options))


def images(place: Path, found: Listing) -> dict[str, bytes]:
    with reader("zip", str(place)) as opened:
        return {one.key: opened.open(str(one.place)).read() for one in found.entries if one.error is None}


def only(found: Listing) -> Entry:
    (entry,) = found.entries
    return entry


def recognised(place: Path) -> bool:
    source = open_source(str(place))
    return zips.recognises(source, list(source.files()))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("whole", [zips.WHOLE, 100], ids=["at once", "as a stream"])
def test_members_are_read_as_they_were_packed(
    tmp_path: Path, method: int, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zips, "WHOLE", whole)
    made = {"ann/1.jpg": b"small", "ann/2.PNG": MIXED, "bob/deep/3.webp": bytes(150), "top.bmp": b""}
    path = packed(tmp_path / "set.zip", *made.items(), method=method)
    found = listed(path)
    assert images(path, found) == made
    assert {one.key: (one.identity, one.bytes) for one in found.entries} == {
        "ann/1.jpg": ("ann", 5),
        "ann/2.PNG": ("ann", 6000),
        "bob/deep/3.webp": ("bob/deep", 150),
        "top.bmp": (None, 0),
    }
    assert recognised(path)


class Pipe(io.RawIOBase):
    """A file that cannot seek: zipfile then writes data descriptors."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:  # type: ignore[override]
        self.data += bytes(data)  # type: ignore[call-overload]
        return len(bytes(data))  # type: ignore[call-overload]


def test_data_descriptors_zip64_comments_and_bytes_in_front(tmp_path: Path) -> None:
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as file:  # type: ignore[call-overload]
        file.writestr("ann/1.jpg", MIXED)
        with file.open("ann/2.jpg", "w", force_zip64=True) as member:
            member.write(MIXED)
        file.comment = b"PK\5\6 in the comment looks like an end"
    path = tmp_path / "set.zip"
    path.write_bytes(b"#!/bin/sh self-extracting\n" + bytes(pipe.data))
    assert images(path, listed(path)) == {"ann/1.jpg": MIXED, "ann/2.jpg": MIXED}


def test_a_directory_of_zip64_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    path = packed(tmp_path / "set.zip", ("ann/1.jpg", MIXED), ("ann/2.jpg", MIXED))
    assert b"PK\6\6" in path.read_bytes()
    assert images(path, listed(path)) == {"ann/1.jpg": MIXED, "ann/2.jpg": MIXED}


def test_names_in_other_alphabets(tmp_path: Path) -> None:
    path = packed(tmp_path / "set.zip", "éva/ß.jpg", "李/1.jpg", "x/zz.jpg")
    raw = path.read_bytes().replace(b"x/zz.jpg", b"x/\x81\x82.jpg")  # code page 437, unflagged
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as file:
        assert {one.key for one in listed(path).entries} == set(file.namelist())


def test_a_name_in_the_unicode_field_and_one_that_is_utf8_without_saying_so(tmp_path: Path) -> None:
    raw = "ü.jpg".encode("cp437")
    field = struct.pack("<HHBL", 0x7075, 5 + len("ü.jpg".encode()), 1, zipfile.crc32(raw)) + "ü.jpg".encode()
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        one = zipfile.ZipInfo("1.jpg")
        one.extra = field
        file.writestr(one, b"x")
        file.writestr("12.jpg", b"y")
    data = (tmp_path / "set.zip").read_bytes()
    data = data.replace(b"12.jpg", "ö.jpg".encode()).replace(b"1.jpg", raw)
    (tmp_path / "set.zip").write_bytes(data)
    assert [one.key for one in listed(tmp_path / "set.zip").entries] == ["ü.jpg", "ö.jpg"]


def test_several_archives_put_their_names_before_the_keys_and_share_persons(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    packed(tmp_path / "a.zip", "ann/1.jpg")
    packed(tmp_path / "sub/b.ZIP", "ann/2.jpg")
    (tmp_path / "readme.txt").write_text("no record")
    found = listed(tmp_path)
    assert {one.key: one.identity for one in found.entries} == {"a/ann/1.jpg": "ann", "sub/b/ann/2.jpg": "ann"}
    assert images(tmp_path, found) == {"a/ann/1.jpg": b"bytes of ann/1.jpg", "sub/b/ann/2.jpg": b"bytes of ann/2.jpg"}
    assert (found.unlisted, list(found.notes)) == ({".txt": 1}, [])


def test_archives_that_number_persons_anew_hold_different_persons(tmp_path: Path) -> None:
    packed(tmp_path / "a.zip", "0/1.jpg", "1/1.jpg")
    packed(tmp_path / "b.zip", "0/1.jpg")
    found = listed(tmp_path)
    assert {one.key: one.identity for one in found.entries} == {
        "a/0/1.jpg": "a/0",
        "a/1/1.jpg": "a/1",
        "b/0/1.jpg": "b/0",
    }
    assert "different persons" in found.notes[0]
    assert {one.identity for one in listed(tmp_path, identity="none").entries} == {None}


def test_archives_in_a_folder_named_like_another_archive_keep_unique_keys(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    packed(tmp_path / "a.zip", "b/1.jpg")
    packed(tmp_path / "a/b.zip", "1.jpg")
    assert {one.key for one in listed(tmp_path).entries} == {"a.zip/b/1.jpg", "a/b.zip/1.jpg"}


def test_other_members_are_counted(tmp_path: Path) -> None:
    litter = ["ann/._1.jpg", "__MACOSX/ann/._2.jpg", ".DS_Store"]
    names = ["ann/", "./ann//1.jpg", *litter, "more.zip", "x.tar.gz", "LICENSE", "a.b.TXT"]
    found = listed(packed(tmp_path / "set.zip", *names))
    assert [one.key for one in found.entries] == ["ann/1.jpg"]
    assert found.unlisted == {
        ".txt": 1,
        "archive inside the archive": 2,
        "file of the desktop (._*, __MACOSX, .DS_Store)": 3,
        "no extension": 1,
    }
    assert list(found.notes) == ["2 archives inside the archive were not read; unpack them if they hold images."]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_occur_twice_keep_all_images_visible(tmp_path: Path) -> None:
    path = packed(
        tmp_path / "set.zip", ("1.jpg", b"a"), ("1.jpg", b"b"), ("1.jpg (2)", b""), ("1.jpg", b"c"), "1 (2).jpg"
    )
    found = listed(path)
    assert [(one.key, one.error is None) for one in found.entries] == [
        ("1.jpg", True),
        ("1.jpg (2)", False),
        ("1.jpg (3)", False),
        ("1 (2).jpg", True),
    ]
    assert found.entries[1].error == "another record has the same name '1.jpg'; give each its own"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("../x.jpg", "leads out of the archive"),
        ("/etc/x.jpg", "leads out of the archive"),
        ("a\\b.jpg", "leads out of the archive"),
        ("a\nb.jpg", "control characters"),
    ],
)
def test_names_that_must_not_be_used_are_rows(tmp_path: Path, name: str, error: str) -> None:
    found = listed(packed(tmp_path / "set.zip", name, "good.jpg"))
    assert [one.error is None for one in found.entries] == [False, True]
    assert error in str(found.entries[0].error)
    assert found.entries[0].key.isprintable()


@pytest.fixture
def spoil(tmp_path: Path) -> Callable[..., Path]:
    """A function that packs one image and changes what the directory says of it."""

    def make(data: bytes = MIXED, method: int = zipfile.ZIP_DEFLATED, **said: int) -> Path:
        with zipfile.ZipFile(tmp_path / "set.zip", "w", method) as file:
            file.writestr("1.jpg", data)
            for name, value in said.items():
                setattr(file.filelist[0], name, getattr(file.filelist[0], name) + value)
        return tmp_path / "set.zip"

    return make


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"flag_bits": 1}, "encrypted; pack the archive anew without a password"),
        ({"compress_type": 84}, "compression method 92 (unknown) is not supported"),
        ({"compress_size": 10**6}, "reach into"),
        ({"header_offset": 10**9}, "reach into the archive's directory"),
    ],
    ids=["encrypted", "method", "too long", "outside"],
)
def test_members_that_cannot_be_read_are_rows(spoil: Callable[..., Path], said: dict[str, int], error: str) -> None:
    assert error in str(only(listed(spoil(**said))).error)


def test_stored_members_of_two_sizes_are_rows(spoil: Callable[..., Path]) -> None:
    path = spoil(b"123", zipfile.ZIP_STORED, file_size=1)
    assert "stored as 3 bytes but said to have 4" in str(only(listed(path)).error)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_rare_compression_is_named(tmp_path: Path, method: int) -> None:
    found = only(listed(packed(tmp_path / "set.zip", "1.jpg", method=method)))
    assert f"compression method {method} (" in str(found.error)
    assert "pack the archive anew with deflate" in str(found.error)


def test_links_and_devices(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name, kind in (
            ("1.jpg", stat.S_IFLNK),
            ("2.jpg", stat.S_IFCHR),
            ("3", stat.S_IFLNK),
            ("4.jpg", stat.S_IFREG),
        ):
            one = zipfile.ZipInfo(name)
            one.external_attr = (kind | 0o777) << 16
            file.writestr(one, b"/etc/passwd")
    found = listed(path)
    assert [one.error and one.error.split(";")[0] for one in found.entries] == ["a link", "no regular file", None]
    assert found.unlisted == {"link": 1}


@pytest.mark.parametrize("whole", [zips.WHOLE, 100], ids=["at once", "as a stream"])
@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"file_size": 1}, "unpacks to 6,000 bytes; the archive says 6,001"),
        ({"file_size": -1}, "unpacks to more than the 5,999 bytes"),
        ({"CRC": 1}, "its CRC-32 is not the one"),
        ({"compress_size": -40}, "end too early"),
    ],
    ids=["longer", "shorter", "crc", "cut"],
)
def test_members_that_are_not_as_described_are_errors_when_read(
    spoil: Callable[..., Path], whole: int, said: dict[str, int], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zips, "WHOLE", whole)
    path = spoil(**said)
    entry = only(listed(path))
    assert entry.error is None
    with pytest.raises(OSError, match=error), reader("zip", str(path)) as opened:
        opened.open(str(entry.place)).read()


@pytest.mark.parametrize("whole", [zips.WHOLE, 100], ids=["at once", "as a stream"])
def test_broken_data_are_errors_when_read(
    spoil: Callable[..., Path], whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zips, "WHOLE", whole)
    path = spoil()
    entry = only(listed(path))
    data = bytearray(path.read_bytes())
    data[40:60] = b"\xff" * 20
    path.write_bytes(data)
    with pytest.raises(OSError, match="cannot be unpacked"), reader("zip", str(path)) as opened:
        opened.open(str(entry.place)).read()


def test_a_bomb_is_a_row(tmp_path: Path) -> None:
    path = packed(tmp_path / "set.zip", ("1.png", bytes(10**6)), ("2.png", MIXED))
    first, second = listed(path).entries
    assert "unpacks to 1,000,000 bytes from" in str(first.error)
    assert "the limit is 200 times (limits.max_ratio)" in str(first.error)
    assert second.error is None
    assert only(listed(packed(path, ("1.png", bytes(10**6))), limits=SourceLimits(max_ratio=2000))).error is None


def test_members_that_share_bytes_are_rows(tmp_path: Path) -> None:
    """As in Fifield's bombs, where one compressed kernel belongs to every member."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as file:
        for at in range(5):
            file.writestr(f"{at}.jpg", MIXED)
        file.filelist[2].header_offset = file.filelist[1].header_offset
        file.filelist[3].compress_size = file.filelist[3].file_size = 7000
    found = listed(path)
    assert [one.error and "overlap" in one.error for one in found.entries] == [None, True, True, True, True]


def test_limits(tmp_path: Path) -> None:
    path = packed(tmp_path / "set.zip", ("1.jpg", b"123"), ("2.jpg", b"1"))
    found = listed(path, limits=SourceLimits(max_member_bytes=2))
    assert [one.error for one in found.entries] == ["3 bytes; the limit is 2 (limits.max_member_bytes)", None]
    with pytest.raises(FormatError, match=r"more than 1 images; raise limits\.max_records"):
        listed(path, limits=SourceLimits(max_records=1))


def test_an_archive_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    whole = packed(tmp_path / "set.zip", "1.jpg", "2.jpg").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "set.zip").write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"set\.zip: cannot be read as a zip archive: .*Download it again"):
            listed(tmp_path)
        assert not recognised(tmp_path)


def test_a_directory_that_lists_fewer_than_it_says_is_refused(tmp_path: Path) -> None:
    data = bytearray(packed(tmp_path / "set.zip", "1.jpg", "2.jpg").read_bytes())
    data[-12:-10] = (3).to_bytes(2, "little")
    (tmp_path / "set.zip").write_bytes(data)
    with pytest.raises(FormatError, match="lists 2 members and says 3"):
        listed(tmp_path)


def test_a_part_of_a_split_archive_is_refused(tmp_path: Path) -> None:
    data = bytearray(packed(tmp_path / "set.zip", "1.jpg").read_bytes())
    data[-18:-16] = (1).to_bytes(2, "little")
    (tmp_path / "set.zip").write_bytes(data)
    with pytest.raises(FormatError, match=r"split archive; join the parts first"):
        listed(tmp_path)


def test_an_archive_without_images_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no image \(.*\.jpg.*it holds 2 \.txt, 1 archive inside the archive"):
        listed(packed(tmp_path / "set.zip", "a.txt", "b.txt", "c.zip"))


def test_a_place_without_archives_or_with_a_link_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(FormatError, match=r"no file called \.zip"):
        listed(tmp_path / "set")
    packed(tmp_path / "other.zip", "1.jpg")
    (tmp_path / "set/a.zip").symlink_to(tmp_path / "other.zip")
    with pytest.raises(FormatError, match="not a regular file inside the set's folder"):
        listed(tmp_path / "set")


def test_it_is_recognised_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"PK\3\4 and nothing more")
    assert not recognised(tmp_path)
    packed(tmp_path / "release", "1.jpg")
    assert not recognised(tmp_path)
    assert recognised(tmp_path / "release")
    packed(tmp_path / "vectors.npz", "ids.npy")
    assert not recognised(tmp_path / "vectors.npz")
    packed(tmp_path / "more.zip", "1.jpg")
    assert recognised(tmp_path)


@pytest.mark.parametrize("place", ["", "x", "[]", '["set.zip",1]', '["set.zip",0,0,0,0,-1]', "[1,0,0,0,0,0]", "[" * 99])
def test_a_place_that_is_none_is_an_os_error(tmp_path: Path, place: str) -> None:
    path = packed(tmp_path / "set.zip", "1.jpg")
    with reader("zip", str(path)) as opened, pytest.raises(OSError, match="place cannot be understood"):
        opened.open(place)


@pytest.mark.parametrize(("at", "method"), [(5, 0), (0, 8), (10**6, 0)])
def test_a_place_where_no_such_member_begins_is_an_os_error(tmp_path: Path, at: int, method: int) -> None:
    path = packed(tmp_path / "set.zip", "1.jpg", method=zipfile.ZIP_STORED)
    with reader("zip", str(path)) as opened, pytest.raises(OSError, match="the archive is damaged"):
        opened.open(json.dumps(["set.zip", at, 1, 1, method, 0]))


def test_an_archive_that_is_cut_after_listing(tmp_path: Path) -> None:
    path = packed(tmp_path / "set.zip", ("1.jpg", MIXED), method=zipfile.ZIP_STORED)
    entry = only(listed(path))
    path.write_bytes(path.read_bytes()[:1000])
    with reader("zip", str(path)) as opened, pytest.raises(OSError, match="truncated"):
        opened.open(str(entry.place))


def test_damaged_archives_end_in_rows_or_refusals(
    tmp_path: Path, mutants: Callable[..., Iterator[bytes]], survives: Callable[..., object]
) -> None:
    made = packed(tmp_path / "set.zip", ("ann/1.jpg", MIXED[2900:3300]), "ann/2.jpg", "b.txt", "bob/é.png").read_bytes()
    for data in mutants(made, 11, 250):
        (tmp_path / "set.zip").write_bytes(data)
        survives("zip", tmp_path)
