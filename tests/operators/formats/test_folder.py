"""Image folders: what is listed under which name and label, and that nothing outside the folder is ever read."""

import os
import signal
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from operators.errors import FormatError
from operators.formats import SetConfig, folder, listed, reader
from operators.formats.listing import Listing
from operators.sources import open_source


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def put(root: Path, *keys: str) -> Path:
    for key in keys:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(f"bytes of {key}".encode())
    return root


def read(uri: str, key: str) -> bytes:
    with reader("folder", uri) as opened, opened.open(key) as file:
        return file.read()


def listing(root: Path | str, identity: str = "parent") -> Listing:
    return folder.listing(open_source(str(root)), SetConfig(uri=str(root), identity=identity))


def labels(root: Path, identity: str = "parent") -> dict[str, str | None]:
    return {entry.key: entry.identity for entry in listing(root, identity).entries}


def errors(root: Path) -> dict[str, str | None]:
    return {entry.key: entry.error for entry in listing(root, "parent").entries}


def test_the_label_is_the_folder_that_holds_the_image(tmp_path: Path) -> None:
    put(tmp_path, "flat.jpg", "ann/1.jpg", "ann/2.png", "2019/ben/1.webp", "2019/cy/x/y/z/1.bmp")
    assert labels(tmp_path) == {
        "flat.jpg": None,
        "ann/1.jpg": "ann",
        "ann/2.png": "ann",
        "2019/ben/1.webp": "2019/ben",
        "2019/cy/x/y/z/1.bmp": "2019/cy/x/y/z",
    }


def test_a_set_without_labels_has_none(tmp_path: Path) -> None:
    put(tmp_path, "flat.jpg", "ann/1.jpg")
    assert labels(tmp_path, "none") == {"flat.jpg": None, "ann/1.jpg": None}


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    put(tmp_path, "ann/1.jpg")
    (tmp_path / "empty.png").write_bytes(b"")
    entries = listing(tmp_path).entries
    assert {e.key: (e.bytes, e.error) for e in entries} == {"ann/1.jpg": (18, None), "empty.png": (0, None)}


def test_a_path_with_a_trailing_slash_or_dots_gives_the_same_keys(tmp_path: Path) -> None:
    put(tmp_path, "ann/1.jpg")
    for uri in (f"{tmp_path}/", f"{tmp_path}/ann/..", f"{tmp_path}/./"):
        assert [e.key for e in listing(uri).entries] == ["ann/1.jpg"]
        assert read(uri, "ann/1.jpg") == b"bytes of ann/1.jpg"


def test_extensions_count_in_any_case_and_the_rest_is_counted_not_listed(tmp_path: Path) -> None:
    listed = {"a.JPG", "b.Jpeg", "c.PNG", "d.webp", "e.bmp", "f.pgm"}
    put(tmp_path, *listed, "g.gif", "p/h.TIF", "p/i.tif", "README", "jpg", ".hidden", "j.jpg.txt", "p/k.csv")
    found = listing(tmp_path)
    assert {entry.key for entry in found.entries} == listed
    assert found.unlisted == {".gif": 1, ".tif": 2, "no extension": 3, ".txt": 1, ".csv": 1}


UNICODE = [
    unicodedata.normalize("NFC", "Zoë/é.jpg"),
    unicodedata.normalize("NFD", "Zoë/é.jpg"),
    "😀/👩🏽‍🚀.jpg",
    "محمد/صورة.jpg",
    "two\nlines/a\nb.jpg",
    " spaced /tab\t.jpg",
    "back\\slash/c\\d.jpg",
    "-rf/%2e%2e.jpg",
]


def test_names_of_any_script_are_kept_to_the_letter(tmp_path: Path) -> None:
    put(tmp_path, *UNICODE)
    assert labels(tmp_path) == {key: key.rpartition("/")[0] for key in UNICODE}
    assert errors(tmp_path) == dict.fromkeys(UNICODE)
    assert {key: read(str(tmp_path), key) for key in UNICODE} == {k: f"bytes of {k}".encode() for k in UNICODE}


@pytest.mark.parametrize("name", [b"\xff.jpg", b"caf\xe9/1.jpg"])
def test_a_name_that_is_not_utf8_is_an_entry_with_an_error(tmp_path: Path, name: bytes) -> None:
    put(tmp_path, "good.jpg")
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    (bad,) = [entry for entry in listing(tmp_path).entries if entry.key != "good.jpg"]
    assert bad.error is not None
    assert "not valid UTF-8" in bad.error
    assert bad.key == name.decode("utf-8", "backslashreplace")
    bad.key.encode()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return put(tmp_path / "outside", "secret.jpg", "sub/secret.jpg")


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    return put(tmp_path / "set", "ann/1.jpg")


def test_a_link_to_a_file_outside_is_an_entry_with_an_error_and_is_never_read(inside: Path, outside: Path) -> None:
    (inside / "ann/2.jpg").symlink_to(outside / "secret.jpg")
    (inside / "ann/3.jpg").symlink_to("../../outside/secret.jpg")
    found = errors(inside)
    assert found["ann/1.jpg"] is None
    for key in ("ann/2.jpg", "ann/3.jpg"):
        assert "links that leave it are not followed" in str(found[key])
        with pytest.raises(OSError, match="not a regular file inside the set's folder"):
            read(str(inside), key)


def test_a_neighbouring_folder_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    root = put(tmp_path / "set", "1.jpg")
    put(tmp_path / "set2", "secret.jpg")
    (root / "2.jpg").symlink_to(tmp_path / "set2/secret.jpg")
    assert errors(root)["2.jpg"] is not None
    with pytest.raises(OSError, match="not a regular file inside"):
        read(str(root), "../set2/secret.jpg")


def test_a_link_inside_the_set_is_an_image(inside: Path) -> None:
    (inside / "ann/link.jpg").symlink_to("1.jpg")
    entry = next(e for e in listing(inside).entries if e.key == "ann/link.jpg")
    assert (entry.error, entry.identity, entry.bytes) == (None, "ann", len(b"bytes of ann/1.jpg"))
    assert read(str(inside), "ann/link.jpg") == b"bytes of ann/1.jpg"


def test_a_set_that_is_itself_a_link_is_read(tmp_path: Path, inside: Path) -> None:
    (tmp_path / "alias").symlink_to(inside)
    assert errors(tmp_path / "alias") == {"ann/1.jpg": None}
    assert read(str(tmp_path / "alias"), "ann/1.jpg") == b"bytes of ann/1.jpg"


def test_linked_folders_are_counted_and_not_followed(inside: Path, outside: Path) -> None:
    (inside / "elsewhere").symlink_to(outside)
    (inside / "again").symlink_to(inside / "ann")
    (inside / "ann/round").symlink_to(inside)
    with deadline(10):
        found = listing(inside)
    assert [entry.key for entry in found.entries] == ["ann/1.jpg"]
    assert found.unlisted == {"linked folder": 3}
    with pytest.raises(OSError, match="not a regular file inside the set's folder"):
        read(str(inside), "elsewhere/secret.jpg")


@pytest.mark.parametrize("target", ["gone.jpg", "broken.jpg", "ann/1.jpg/x.jpg", "a" * 300], ids=lambda t: t[:12])
def test_a_broken_link_is_an_entry_with_an_error_and_leaves_the_others_alone(inside: Path, target: str) -> None:
    (inside / "broken.jpg").symlink_to(target)
    found = errors(inside)
    assert found.keys() == {"ann/1.jpg", "broken.jpg"}
    assert found["ann/1.jpg"] is None
    assert found["broken.jpg"] is not None
    with pytest.raises(OSError):
        read(str(inside), "broken.jpg")


def test_a_file_behind_a_closed_door_is_an_entry_with_an_error(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a link into a folder of someone else does to anyone but root."""
    put(inside, "ann/closed")
    (inside / "ann/closed.jpg").symlink_to("closed")
    real = os.stat

    def closed(path: object, **options: object) -> os.stat_result:
        if str(path).endswith("closed.jpg"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", closed)
    found = errors(inside)
    assert found["ann/1.jpg"] is None
    assert found["ann/closed.jpg"] is not None


def test_a_pipe_with_an_image_name_is_an_error_and_never_waited_for(inside: Path) -> None:
    os.mkfifo(inside / "x.jpg")
    with deadline(10):
        assert "not a regular file" in str(errors(inside)["x.jpg"])
        with pytest.raises(OSError):
            read(str(inside), "x.jpg")


def test_a_folder_with_an_image_name_is_entered(inside: Path) -> None:
    put(inside, "album.jpg/1.jpg")
    assert labels(inside) == {"ann/1.jpg": "ann", "album.jpg/1.jpg": "album.jpg"}


@pytest.mark.parametrize(
    "key", ["../outside/secret.jpg", "ann/../../outside/secret.jpg", "..", ".", "ann", "a\0b.jpg", ""]
)
def test_a_key_that_is_no_image_of_the_set_is_not_read(inside: Path, outside: Path, key: str) -> None:
    with pytest.raises(OSError):
        read(str(inside), key)


def test_an_absolute_key_is_not_read(inside: Path, outside: Path) -> None:
    with pytest.raises(OSError, match="not a regular file inside the set's folder"):
        read(str(inside), str(outside / "secret.jpg"))


def test_a_key_that_is_gone_is_an_os_error(inside: Path) -> None:
    with pytest.raises(OSError):
        read(str(inside), "ann/9.jpg")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"/nowhere: no such file or folder\. Correct the set's `uri`"):
        listing(tmp_path / "nowhere")


def test_one_image_file_is_a_set_of_one(inside: Path) -> None:
    put(inside, "ann/2.jpg")
    assert [(entry.key, entry.identity) for entry in listing(inside / "ann/1.jpg").entries] == [("1.jpg", None)]
    assert read(str(inside / "ann/1.jpg"), "1.jpg") == b"bytes of ann/1.jpg"


def test_a_pattern_names_its_files_below_their_common_folder(inside: Path) -> None:
    put(inside, "ann/2.jpg", "ben/1.jpg", "cy/1.jpg")
    found = listing(f"{inside}/{{ann,ben}}/[1]*.jpg")
    assert {entry.key: entry.identity for entry in found.entries} == {"ann/1.jpg": "ann", "ben/1.jpg": "ben"}
    assert read(f"{inside}/{{ann,ben}}/[1]*.jpg", "ben/1.jpg") == b"bytes of ben/1.jpg"


def test_a_folder_without_images_says_which_names_count(tmp_path: Path) -> None:
    put(tmp_path, "a/notes.txt", "b.gif")
    with pytest.raises(FormatError, match=r"no image file \(\.bmp, \.jpeg, \.jpg, \.pgm, \.png, \.ppm, \.webp\)"):
        listing(tmp_path)


def test_a_folder_that_cannot_be_listed_stops_the_scan_by_name(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images would be missing from the audit without a trace."""
    put(inside, "closed/2.jpg")
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FormatError, match=r"/closed: cannot be listed \(Permission denied\)\. Give access"):
        listing(inside)


def test_the_form_is_recognised_and_others_are_refused(inside: Path) -> None:
    form, found = listed(SetConfig(uri=str(inside)))
    assert (form, [entry.key for entry in found.entries]) == ("folder", ["ann/1.jpg"])
    with pytest.raises(FormatError, match=r"format 'rar' is not known\. Use one of: .*folder"):
        reader("rar", str(inside))


def test_a_folder_of_nothing_known_says_which_forms_are(tmp_path: Path) -> None:
    put(tmp_path, "a/notes.txt")
    with pytest.raises(FormatError, match=r"no file of a known form \(zip, tar.*\) among 1\."):
        listed(SetConfig(uri=str(tmp_path)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "rar"}, "format.*'rar'"),
        ({"identity": "x"}, "identity.*'x'"),
        ({"identity": "attribute:"}, "identity.*'attribute:'"),
    ],
)
def test_a_set_is_declared_with_known_words_only(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SetConfig(uri="x", **wrong)
