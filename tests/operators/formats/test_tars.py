"""Tar archives are read as Python's `tarfile` wrote them; hostile and broken ones become rows or refusals."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from operators.errors import FormatError
from operators.formats import SetConfig, SourceLimits, compressed, reader, tarheaders, tars, webdataset
from operators.formats.listing import Entry, Listing
from operators.sources import open_source

NOISE = random.Random(3).randbytes(3000)
LONG = "/".join(["folder" * 8] * 6)
MEMBERS = {"./ann/1.jpg": b"one", f"{LONG}/{'é' * 60}.png": NOISE, "bob/2.webp": b"", "3.bmp": bytes(512), "y.txt": b""}
KEYS = {name.removeprefix("./"): data for name, data in MEMBERS.items() if not name.endswith(".txt")}
PACK = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}
LAYOUTS = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    one = tarfile.TarInfo(name)
    one.type = kind
    for field, value in fields.items():
        setattr(one, field, value)
    return one


def archive(*members: str | tuple[str, bytes] | tarfile.TarInfo, layout: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=layout) as made:
        for one in members:
            name, data = one if isinstance(one, tuple) else (one, f"bytes of {one}".encode())
            info = one if isinstance(one, tarfile.TarInfo) else member(str(name), size=len(data))
            made.addfile(info, io.BytesIO(data if info is not one else bytes(info.size)))
    return file.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def listed(place: Path, **options: object) -> Listing:
    return tars.listing(open_source(str(place)), SetConfig(uri=str(place), **options))


def images(place: Path, found: Listing) -> dict[str, bytes]:
    with reader("tar", str(place)) as opened:
        return {one.key: opened.open(str(one.place)).read() for one in found.entries if one.error is None}


def errors(found: Listing) -> dict[str, str | None]:
    return {one.key: one.error for one in found.entries}


def only(found: Listing) -> Entry:
    (entry,) = found.entries
    return entry


def recognised(place: Path) -> bool:
    source = open_source(str(place))
    return tars.recognises(source, list(source.files()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["gnu", "pax"])
@pytest.mark.parametrize("ending", PACK)
def test_members_are_read_as_they_were_packed(tmp_path: Path, layout: int, ending: str) -> None:
    path = put(tmp_path / f"set.{ending}", PACK[ending](archive(*MEMBERS.items(), layout=layout)))
    found = listed(path)
    assert images(path, found) == KEYS
    assert {one.key: one.identity for one in found.entries} == {key: key.rpartition("/")[0] or None for key in KEYS}
    assert found.unlisted == {".txt": 1}
    assert recognised(path)
    assert recognised(tmp_path)
    assert (ending == "tar") == (list(found.notes) == [])


def test_ustar_names_in_two_parts(tmp_path: Path) -> None:
    name = "a" * 90 + "/" + "b" * 90 + ".jpg"
    path = put(tmp_path / "set.tar", archive((name, b"x"), layout=tarfile.USTAR_FORMAT))
    assert images(path, listed(path)) == {name: b"x"}


@pytest.mark.parametrize("ending", PACK)
def test_members_are_read_in_any_order(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "DISTANCE", 10_000)
    monkeypatch.setattr(compressed, "COPIES", 8)
    rng = random.Random(1)
    made = {f"{at}.jpg": rng.choice([rng.randbytes(3000), bytes(5000), b"hello " * 900]) for at in range(100)}
    path = put(tmp_path / f"set.{ending}", PACK[ending](archive(*made.items())))
    entries = list(listed(path).entries)
    compressed._known.clear()
    for _ in range(2):
        rng.shuffle(entries)
        with reader("tar", str(path)) as opened:
            for one in entries[:40]:
                assert opened.open(str(one.place)).read() == made[one.key]


def test_threads_share_the_places_to_start_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "DISTANCE", 10_000)
    made = {f"{at}.jpg": random.Random(at).randbytes(2000) for at in range(400)}
    path = put(tmp_path / "set.tar.gz", gzip.compress(archive(*made.items())))
    entries = listed(path).entries

    def read(first: int) -> bool:
        with reader("tar", str(path)) as opened:
            return all(opened.open(str(one.place)).read() == made[one.key] for one in entries[first :: first + 7])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(24)))


def test_gzip_of_several_streams_and_zeros_at_its_end(tmp_path: Path) -> None:
    data = archive(("1.jpg", NOISE), ("2.jpg", NOISE[::-1]))
    packed = gzip.compress(data[:1000]) + gzip.compress(data[1000:2500]) + gzip.compress(data[2500:]) + bytes(600)
    path = put(tmp_path / "set.tgz", packed)
    assert images(path, listed(path)) == {"1.jpg": NOISE, "2.jpg": NOISE[::-1]}


def test_large_members_are_streamed(tmp_path: Path) -> None:
    data = NOISE * 2000
    path = put(tmp_path / "set.tar.gz", gzip.compress(archive(("1.jpg", data), ("2.jpg", b"2")), 1))
    assert images(path, listed(path)) == {"1.jpg": data, "2.jpg": b"2"}


def test_several_archives_put_their_names_before_the_keys(tmp_path: Path) -> None:
    put(tmp_path / "part.1.tar", archive("ann/1.jpg"))
    put(tmp_path / "part.2.tar.gz", gzip.compress(archive("ann/2.jpg")))
    assert {one.key: one.identity for one in listed(tmp_path).entries} == {
        "part.1/ann/1.jpg": "ann",
        "part.2/ann/2.jpg": "ann",
    }


def test_an_archive_that_was_appended_is_read(tmp_path: Path) -> None:
    path = put(tmp_path / "set.tar", archive("1.jpg") + archive("2.jpg"))
    found = listed(path)
    assert images(path, found) == {"1.jpg": b"bytes of 1.jpg", "2.jpg": b"bytes of 2.jpg"}
    assert "consists of several archives" in found.notes[0]


def test_what_stands_after_the_end_is_told(tmp_path: Path) -> None:
    found = listed(put(tmp_path / "set.tar", archive("1.jpg") + NOISE))
    assert "has bytes after its end mark" in found.notes[0]


def test_an_archive_cut_anywhere_is_refused_or_complete(tmp_path: Path) -> None:
    """A cut between two members cannot be told from an archive without an end mark: that is a note."""
    whole = archive(("1.jpg", NOISE), (LONG + ".jpg", b"2"), ("3.jpg", NOISE))
    with tarfile.open(fileobj=io.BytesIO(whole)) as made:
        ends = [one.offset_data + -(-one.size // 512) * 512 for one in made.getmembers()]
        data_ends = [one.offset_data + one.size for one in made.getmembers()]
    for length in sorted({*range(0, len(whole), 100), *range(512, len(whole), 512), *data_ends}):
        path = put(tmp_path / "set.tar", whole[:length])
        if length not in ends and length <= ends[-1]:
            with pytest.raises(FormatError, match=r"set\.tar: cannot be read as a tar archive: .*cut short"):
                listed(path)
        else:
            found = listed(path)
            assert len(found.entries) == sum(end <= length for end in data_ends)
            assert length > ends[-1] or "has no end mark" in found.notes[0]


@pytest.mark.parametrize("ending", ["tar.gz", "tar.bz2", "tar.xz"])
def test_a_compressed_archive_that_is_cut_or_damaged_is_refused(tmp_path: Path, ending: str) -> None:
    whole = PACK[ending](archive(("1.jpg", NOISE), ("2.jpg", NOISE)))
    for length in (0, 20, len(whole) // 2, len(whole) - 1):
        with pytest.raises(FormatError, match="cannot be read as a tar archive"):
            listed(put(tmp_path / f"set.{ending}", whole[:length]))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    with pytest.raises(FormatError, match="stream is damaged"):
        listed(put(tmp_path / f"set.{ending}", bytes(flipped)))


def test_a_damaged_header_is_refused_with_its_place(tmp_path: Path) -> None:
    data = bytearray(archive("1.jpg", "2.jpg"))
    data[1024 + 30] ^= 1
    with pytest.raises(FormatError, match="no member at byte 1,024, where one should begin"):
        listed(put(tmp_path / "set.tar", bytes(data)))


def test_links_devices_and_sparse_files_are_rows(tmp_path: Path) -> None:
    kinds = {
        "a.jpg": (tarfile.SYMTYPE, "link"),
        "b.jpg": (tarfile.LNKTYPE, "link"),
        "c.jpg": (tarfile.CHRTYPE, "device"),
        "d.jpg": (tarfile.FIFOTYPE, "device"),
        "e.jpg": (tarfile.GNUTYPE_SPARSE, "sparse file"),
        "f.jpg": (b"M", "continued from another volume"),
    }
    members = [member(name, kind, linkname="/etc/passwd") for name, (kind, _) in kinds.items()]
    dull = [member("dev", tarfile.BLKTYPE), member("latest", tarfile.SYMTYPE), member("dir.jpg/", tarfile.DIRTYPE)]
    found = listed(put(tmp_path / "set.tar", archive("1.jpg", *members, *dull, "2.jpg", layout=tarfile.GNU_FORMAT)))
    said = errors(found)
    assert (said.pop("1.jpg"), said.pop("2.jpg")) == (None, None)
    assert {name: kinds[name][1] in str(error) for name, error in said.items()} == dict.fromkeys(kinds, True)
    assert found.unlisted == {"device": 1, "link": 1}


def test_sparse_files_with_maps_are_passed_over(tmp_path: Path) -> None:
    """GNU tar, appendix D: byte 482 of the header and 504 of each further block say whether the map goes on."""
    data = bytearray(archive(member("a.jpg", tarfile.GNUTYPE_SPARSE, size=600), "2.jpg", layout=tarfile.GNU_FORMAT))
    data[482] = 1
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    maps = bytes(504) + b"\1" + bytes(7) + bytes(512)
    path = put(tmp_path / "set.tar", bytes(data[:512]) + maps + bytes(data[512:]))
    found = listed(path)
    assert "sparse" in str(errors(found)["a.jpg"])
    assert images(path, found) == {"2.jpg": b"bytes of 2.jpg"}
    modern = member("GNUSparseFile.0/x", size=5, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "a/b.jpg"})
    assert "sparse" in str(errors(listed(put(tmp_path / "set.tar", archive(modern))))["a/b.jpg"])


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a\\b.jpg", "a\nb.jpg", "a/../../x.jpg"])
def test_names_that_must_not_be_used_are_rows(tmp_path: Path, name: str) -> None:
    bad, good = listed(put(tmp_path / "set.tar", archive(name, "good.jpg"))).entries
    assert (bad.error is None, good.error) == (False, None)
    assert "its name" in str(bad.error)
    assert bad.key.isprintable()


def test_a_name_that_is_no_utf8_is_a_row(tmp_path: Path) -> None:
    data = archive(("\udcff\udcfe.jpg", b""), layout=tarfile.GNU_FORMAT)
    bad = only(listed(put(tmp_path / "set.tar", data)))
    assert "not valid UTF-8" in str(bad.error)
    assert bad.key == "\\udcff\\udcfe.jpg"


def test_names_that_occur_twice_keep_all_images_visible(tmp_path: Path) -> None:
    found = listed(put(tmp_path / "set.tar", archive("1.jpg", "./1.jpg", "1.jpg (2)", "1.jpg", "2.jpg")))
    assert [(one.key, one.error is None) for one in found.entries] == [
        ("1.jpg", True),
        ("1.jpg (2)", False),
        ("1.jpg (3)", False),
        ("2.jpg", True),
    ]


def test_many_equal_names_take_no_longer_each(tmp_path: Path) -> None:
    entries = listed(put(tmp_path / "set.tar", archive(*["1.jpg"] * 3000, layout=tarfile.USTAR_FORMAT))).entries
    assert len({one.key for one in entries}) == 3000


def test_sizes_that_lie(tmp_path: Path) -> None:
    data = bytearray(archive("1.jpg", layout=tarfile.GNU_FORMAT))
    far = [b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7, b"\x80" + b"\xff" * 11]
    for number in (b"77777777777\0", *far, b"\xff" * 12, b"x" * 12):
        data[124:136] = number
        data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
        with pytest.raises(FormatError, match=r"cut short|is damaged"):
            listed(put(tmp_path / "set.tar", bytes(data)))


def test_old_checksums_of_signed_bytes(tmp_path: Path) -> None:
    data = bytearray(archive("é.jpg", layout=tarfile.GNU_FORMAT))
    signed = sum(byte - 256 * (byte > 127) for byte in data[:148] + data[156:512]) + 256
    data[148:156] = b"%06o\0 " % signed
    assert only(listed(put(tmp_path / "set.tar", bytes(data)))).key == "é.jpg"


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_huge_extended_headers_are_refused(tmp_path: Path, kind: bytes) -> None:
    data = archive(member("x", kind, size=2**21), "1.jpg", layout=tarfile.USTAR_FORMAT)
    with pytest.raises(FormatError, match="an extended header of 2,097,152 bytes"):
        listed(put(tmp_path / "set.tar", data))


RECORDS = [b"9999999999 path=x.jpg\n", b"12 path=x.jp", b"-5 path=x\n", b"6 path\n", b"0 a=b\n", b"1_0 a=bcd\n"]


@pytest.mark.parametrize("said", RECORDS)
def test_broken_extended_headers_are_refused(tmp_path: Path, said: bytes) -> None:
    head = member("x", tarfile.XHDTYPE, size=len(said)).tobuf(tarfile.USTAR_FORMAT)
    data = head + said.ljust(512, b"\0") + archive("1.jpg", layout=tarfile.USTAR_FORMAT)
    with pytest.raises(FormatError, match="the member at byte 0 is damaged"):
        listed(put(tmp_path / "set.tar", data))


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "SLACK", 2**20)
    path = put(tmp_path / "set.tar.gz", gzip.compress(archive(("1.png", bytes(2**23))), 1))
    with pytest.raises(FormatError, match=r"unpacks to more than 200 times its size \(limits\.max_ratio\)"):
        listed(path)
    assert only(listed(path, limits=SourceLimits(max_ratio=2000))).error is None


def test_an_xz_dictionary_bomb_is_refused(tmp_path: Path) -> None:
    chain = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**20}]
    data = bytearray(lzma.compress(archive("1.jpg"), filters=chain))
    at = 12 + 4  # the block's header: its size, flags, filter, size of properties, then the dictionary's size
    data[at] = 40  # 4 GiB - 1
    data[20:24] = zlib.crc32(data[12:20]).to_bytes(4, "little")
    with pytest.raises(FormatError, match=r"[Mm]emory"):
        listed(put(tmp_path / "set.tar.xz", bytes(data)))


def test_zstd_is_named(tmp_path: Path) -> None:
    put(tmp_path / "set.tar.zst", b"\x28\xb5\x2f\xfd rest")
    assert recognised(tmp_path)
    with pytest.raises(FormatError, match=r"zstd, which is not supported; unpack it first \(`zstd -d`\)"):
        listed(tmp_path)


def test_limits(tmp_path: Path) -> None:
    path = put(tmp_path / "set.tar", archive(("1.jpg", b"123"), ("2.jpg", b"1")))
    assert errors(listed(path, limits=SourceLimits(max_member_bytes=2))) == {
        "1.jpg": "3 bytes; the limit is 2 (limits.max_member_bytes)",
        "2.jpg": None,
    }
    with pytest.raises(FormatError, match=r"more than 1 images"):
        listed(path, limits=SourceLimits(max_records=1))


def test_it_is_recognised_by_its_content(tmp_path: Path) -> None:
    for name, data in {"a.tar": b"", "b.tar": bytes(10240), "c.tar": NOISE, "d.tgz": gzip.compress(NOISE)}.items():
        put(tmp_path / "set" / name, data)
    put(tmp_path / "set" / "e.txt", archive("1.jpg"))
    assert not recognised(tmp_path / "set")
    put(tmp_path / "set" / "f.tar", archive("1.jpg"))
    assert recognised(tmp_path / "set")
    put(tmp_path / "other" / "release", gzip.compress(archive("1.jpg")))
    assert not recognised(tmp_path / "other")
    assert recognised(tmp_path / "other" / "release")


def test_shards_with_sidecars_are_of_the_other_form(tmp_path: Path) -> None:
    path = put(tmp_path / "set.tar", archive("1.jpg", "1.cls"))
    source = open_source(str(path))
    assert not recognised(path)
    assert webdataset.recognises(source, list(source.files()))
    put(path, archive("1.jpg", "2.cls"))
    assert recognised(path)
    assert not webdataset.recognises(source, list(source.files()))


def test_an_archive_that_changes_after_listing(tmp_path: Path) -> None:
    path = put(tmp_path / "set.tar", archive(("1.jpg", NOISE)))
    packed = put(tmp_path / "set.tar.gz", gzip.compress(archive(("1.jpg", NOISE))))
    for one in (path, packed):
        entry = only(listed(one))
        one.write_bytes(one.read_bytes()[:1500])
        with reader("tar", str(one)) as opened, pytest.raises(OSError, match=r"truncated|cut short"):
            opened.open(str(entry.place)).read()


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_damaged_archives_end_in_rows_or_refusals(
    tmp_path: Path, ending: str, mutants: Callable[..., Iterator[bytes]], survives: Callable[..., object]
) -> None:
    made = PACK[ending](archive("ann/1.jpg", (LONG + ".jpg", NOISE[:600]), "é.png", member("4.jpg", tarfile.SYMTYPE)))
    for data in mutants(made, 12, 200):
        put(tmp_path / f"set.{ending}", data)
        survives("tar", tmp_path)


def test_headers_agree_with_tarfile(tmp_path: Path) -> None:
    """Every mixture of long names, sizes and kinds: the same names, sizes and places."""
    rng = random.Random(9)
    for at in range(60):
        names = [f"{'dé' * rng.choice((1, 40, 90, 200))}/{number}.jpg" for number in range(6)]
        layout = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        data = archive(*((name, rng.randbytes(rng.choice((0, 1, 511, 512, 513)))) for name in names), layout=layout)
        with tarfile.open(fileobj=io.BytesIO(data)) as made:
            expected = [(one.name, one.offset_data, one.size) for one in made.getmembers()]
        found = tarheaders.Members(io.BytesIO(data))
        assert [(one.name, one.start, one.size) for one in found] == expected, at
        assert found.note is None
