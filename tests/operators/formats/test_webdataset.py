"""WebDataset shards are read as the `webdataset` library and `tarfile` wrote them."""

import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from operators.errors import FormatError
from operators.formats import SetConfig, SourceLimits, reader, tars, webdataset
from operators.formats.listing import Entry, Listing
from operators.sources import open_source


def shard(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as made:
        for name, data in members:
            one = tarfile.TarInfo(name)
            one.size = len(data)
            made.addfile(one, io.BytesIO(data))
    return path


def sample(key: str, **parts: bytes | str | int | dict[str, object]) -> list[tuple[str, bytes]]:
    """Members of one sample, the image first."""
    made = [(f"{key}.jpg", f"image of {key}".encode())]
    for ending, value in parts.items():
        text = json.dumps(value) if isinstance(value, dict) else value
        made.append((f"{key}.{ending}", text if isinstance(text, bytes) else str(text).encode()))
    return made


def listed(place: Path, **options: object) -> Listing:
    return webdataset.listing(open_source(str(place)), SetConfig(uri=str(place), **options))


def images(place: Path, found: Listing) -> dict[str, bytes]:
    with reader("webdataset", str(place)) as opened:
        return {one.key: opened.open(str(one.place)).read() for one in found.entries if one.error is None}


def identities(found: Listing) -> dict[str, str | None]:
    return {one.key: one.identity for one in found.entries}


def only(found: Listing) -> Entry:
    (entry,) = found.entries
    return entry


def recognised(place: Path) -> bool:
    source = open_source(str(place))
    files = list(source.files())
    assert not (tars.recognises(source, files) and webdataset.recognises(source, files))
    return webdataset.recognises(source, files)


def test_shards_of_the_webdataset_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # it does without, and is imported in a tenth of the time
    library = pytest.importorskip("webdataset")
    written = {}
    for number in range(2):
        with library.TarWriter(str(tmp_path / f"train-{number:04}.tar")) as writer:
            for at in range(4):
                key, said = f"p{at % 2}/{number}-{at}", {"age": 20 + at, "more": {"group": "ä"}}
                written[key + ".jpg"] = image = f"{key} as JPEG".encode()
                writer.write({"__key__": key, "jpg": image, "cls": at % 2, "json": said, "txt": "hi"})
    place = tmp_path / "train-{0000..0009}.tar"
    found = listed(place, attributes=["age", "more.group", "txt", "other"])
    assert images(place, found) == written
    assert identities(found) == {key: key[1] for key in written}
    assert {one.key: one.attributes for one in found.entries} == {
        key: {"age": f"2{key[-5]}", "more.group": "ä", "txt": "hi"} for key in written
    }
    assert (found.unlisted, list(found.notes)) == ({}, [])
    assert recognised(place)
    for name in ("a/b.c/0001.seg.png", "0001.jpg", "x/y/0.cls"):
        assert tars.sample_of(name) == library.tariterators.base_plus_ext(name)


def test_images_of_a_sample_share_what_its_sidecars_say(tmp_path: Path) -> None:
    members = [("a/0.png", b"1"), ("a/0.cls", b" 7\n"), ("a/0.crop.webp", b"2"), ("a/1.jpg", b"3"), ("a/1.npy", b"")]
    found = listed(shard(tmp_path / "x.tar", *members))
    assert identities(found) == {"a/0.png": "7", "a/0.crop.webp": "7", "a/1.jpg": "a"}
    assert images(tmp_path / "x.tar", found) == {"a/0.png": b"1", "a/0.crop.webp": b"2", "a/1.jpg": b"3"}
    assert found.unlisted == {".npy": 1}


def test_identities_by_each_rule(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", *sample("f/0", cls=3, json={"who": "ann", "n": 1.50}), *sample("f/1"))
    expected = {
        "auto": ["3", "f"],
        "label": ["3", None],
        "parent": ["f", "f"],
        "none": [None, None],
        "attribute:who": ["ann", None],
        "attribute:n": ["1.5", None],
        "attribute:cls": ["3", None],
    }
    assert {rule: list(identities(listed(path, identity=rule)).values()) for rule in expected} == expected


def test_members_of_a_sample_anywhere_in_its_shard(tmp_path: Path) -> None:
    """As archives hold them that were packed by ending, or in no order."""
    parts = [sample(str(at), cls=at * 10, json={"age": at}) for at in range(5)]
    by_ending = [member for ending in range(3) for member in (part[ending] for part in parts)]
    shuffled = [
        parts[0][2],
        parts[1][1],
        parts[0][0],
        parts[1][0],
        parts[0][1],
        parts[1][2],
        *parts[2],
        *parts[3],
        *parts[4],
    ]
    for members in (by_ending, by_ending[::-1], shuffled):
        found = listed(shard(tmp_path / "x.tar", *members), attributes=["age"])
        assert identities(found) == {f"{at}.jpg": str(at * 10) for at in range(5)}
        assert {one.key: one.attributes for one in found.entries} == {f"{at}.jpg": {"age": str(at)} for at in range(5)}


def test_names_of_several_shards_stay_unless_they_are_repeated(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", *sample("0", cls=1), *sample("1", cls=1))
    shard(tmp_path / "b.tar", *sample("1", cls=2), *sample("2", cls=2))
    found = listed(tmp_path)
    assert identities(found) == {"0.jpg": "1", "a/1.jpg": "1", "b/1.jpg": "2", "2.jpg": "2"}
    assert [one.error for one in found.entries] == [None] * 4
    assert len(images(tmp_path, found)) == 4


def test_names_repeated_in_one_shard_are_rows(tmp_path: Path) -> None:
    found = listed(shard(tmp_path / "a.tar", *sample("0", cls=1), ("0.jpg", b"another"), *sample("1", cls=1)))
    assert [(one.key, one.error is None) for one in found.entries] == [
        ("0.jpg", True),
        ("0.jpg (2)", False),
        ("1.jpg", True),
    ]


@pytest.mark.parametrize(
    ("sidecars", "error"),
    [
        ([("0.cls", b"\xff\xfe")], ".cls member is no UTF-8 text"),
        ([("0.cls", b"1" * 5000)], ".cls member has 5,000 bytes; the limit is 4,096"),
        ([("0.cls", b"1"), ("0.cls", b"2")], "two members of the same kind"),
        ([("0.cls", b"1"), ("1.jpg", b""), ("0.cls", b"2")], "two members of the same kind"),
        ([("0.json", b"{")], ".json member is no JSON text"),
        ([("0.json", b"[" * 100_000)], ".json member is no JSON text"),
        ([("0.json", b'"' + b" " * 2**20 + b'"')], ".json member has 1,048,578 bytes"),
    ],
)
def test_sidecars_that_cannot_be_used_make_a_row(tmp_path: Path, sidecars: list[tuple[str, bytes]], error: str) -> None:
    found = listed(shard(tmp_path / "x.tar", ("0.jpg", b"x"), *sidecars), attributes=["age"])
    assert error in str(found.entries[0].error)
    assert [one.error for one in found.entries[1:]] == [None] * (len(found.entries) - 1)


def test_sidecars_that_nobody_asks_for_are_not_read(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", *sample("0", json=b"{", txt=b"\xff", cls=1))
    assert only(listed(path)).error is None


def test_values_of_other_kinds(tmp_path: Path) -> None:
    said = b'{"a": true, "b": null, "c": [1], "d": "", "e": 1e400, "f": %s, "g": "\\ud800\\n"}' % (b"9" * 5000)
    found = only(listed(shard(tmp_path / "x.tar", *sample("0", json=said)), attributes=list("abcdefg")))
    assert found.attributes == {"a": "true", "d": "", "e": "1e400", "f": "9" * 5000, "g": "\\ud800\\x0a"}


def test_samples_without_an_image_are_counted(tmp_path: Path) -> None:
    members = [*sample("0", cls=1), ("1.cls", b"2"), ("1.json", b"{}"), ("2.mp4", b""), ("._3.cls", b"")]
    found = listed(shard(tmp_path / "x.tar", *members))
    assert found.unlisted == {
        ".mp4": 1,
        "file of the desktop (._*, __MACOSX, .DS_Store)": 1,
        "sample without an image": 1,
    }


def test_links_and_bad_names_are_rows(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", *sample("../0", cls=1), *sample("1", cls=1))
    with tarfile.open(path, "a") as made:
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
        label = tarfile.TarInfo("1.txt")
        label.type, label.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(label)
    found = listed(path, attributes=["txt"])
    assert [one.error and one.error.split(";")[0] for one in found.entries] == [
        "its name leads out of the archive",
        None,
        "a link",
    ]
    assert found.unlisted == {"link": 1}


def test_limits(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", *sample("0", cls=1), *sample("1", cls=1))
    assert "the limit is 5" in str(listed(path, limits=SourceLimits(max_member_bytes=5)).entries[0].error)
    with pytest.raises(FormatError, match="more than 1 images"):
        listed(path, limits=SourceLimits(max_records=1))


def test_a_missing_or_cut_shard_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file or folder"):
        listed(tmp_path / "x-{0..3}.tar")
    path = shard(tmp_path / "x-1.tar", *sample("0", cls=1))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(FormatError, match=r"x-1\.tar: cannot be read as a tar archive: it is cut short"):
        listed(tmp_path / "x-{0..3}.tar")


def test_it_is_told_from_other_archives_by_its_sidecars(tmp_path: Path) -> None:
    for members, expected in [
        (sample("0", cls=1), True),
        (sample("a/0", json={}), True),
        (sample("0"), False),
        ([("0.jpg", b""), ("1.cls", b"")], False),
        ([("0.jpg", b""), ("._0.cls", b"")], False),
        ([("0.txt", b""), ("0.cls", b"")], False),
    ]:
        assert recognised(shard(tmp_path / "x.tar", *members)) == expected, members


def test_damaged_shards_end_in_rows_or_refusals(
    tmp_path: Path, mutants: Callable[..., Iterator[bytes]], survives: Callable[..., object]
) -> None:
    members = [*sample("a/0", cls=1, json={"age": 3, "b": {"c": "d"}}), *sample("1", cls="x", txt="é")]
    made = shard(tmp_path / "x.tar", *members).read_bytes()[:8192]
    shard(tmp_path / "y.tar", *sample("1", cls="y"))
    for data in mutants(made, 13, 120):
        (tmp_path / "x.tar").write_bytes(data)
        survives("webdataset", tmp_path, attributes=["age", "b.c", "txt"])
