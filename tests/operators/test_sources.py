import os
from pathlib import Path

import pytest

from operators.errors import FormatError
from operators.remote import RemoteSource
from operators.sources import LocalSource, absolute, expanded, open_source, remote_scheme, within


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set with files of two sizes, and things that are no files of it."""
    for name, data in {"a/1.jpg": b"x", "a/b/2.jpg": b"yy", "t-0.tar": b"0", "t-1.tar": b"11"}.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "secret.txt").write_bytes(b"secret")
    return tmp_path / "set"


def sizes(uri: Path | str) -> dict[str, int]:
    return {file.path: file.size for file in LocalSource(str(uri)).files() if file.error is None}


def data(source: LocalSource, path: str) -> bytes:
    with source.open(path) as file:
        return file.read()


def test_a_folder_is_listed_with_all_that_is_below(folder: Path) -> None:
    source = LocalSource(str(folder))
    assert sizes(folder) == {"a/1.jpg": 1, "a/b/2.jpg": 2, "t-0.tar": 1, "t-1.tar": 2}
    assert (source.single, source.version("a/1.jpg")) == (None, None)
    with source.open("a/b/2.jpg") as file:
        assert file.seekable() and file.read() == b"yy"


def test_a_file_is_a_source_of_one_file_also_through_a_link(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder / "t-1.tar")
    for uri in (folder / "t-1.tar", folder.parent / "link"):
        source = LocalSource(str(uri))
        assert (source.single, sizes(uri), data(source, "t-1.tar")) == ("t-1.tar", {"t-1.tar": 2}, b"11")


def test_patterns_name_files_relative_to_what_they_share(folder: Path) -> None:
    assert sizes(folder / "t-{0..1}.tar") == {"t-0.tar": 1, "t-1.tar": 2}
    assert sizes(folder / "*/[12].jpg") == {"1.jpg": 1}
    source = LocalSource(str(folder / "a/{1.jpg,b/2.jpg}"))
    assert [file.path for file in source.files()] == ["1.jpg", "b/2.jpg"] and data(source, "b/2.jpg") == b"yy"
    assert expanded(str(folder / "a*")) == []  # a folder is no file


def test_links_are_followed_inside_the_folder_only(folder: Path) -> None:
    (folder / "inside.jpg").symlink_to("a/1.jpg")
    (folder / "outside.jpg").symlink_to("../secret.txt")
    (folder / "lost.jpg").symlink_to("nowhere")
    (folder / "linked").symlink_to("a")
    os.mkfifo(folder / "pipe.jpg")
    source = LocalSource(str(folder))
    errors = {file.path: file.error for file in source.files()}
    assert {path for path, error in errors.items() if error} == {"outside.jpg", "lost.jpg", "pipe.jpg"}
    assert source.linked_folders() == 1
    assert data(source, "inside.jpg") == b"x"
    for path in ("outside.jpg", "../secret.txt", "lost.jpg", "pipe.jpg", "a"):
        with pytest.raises(OSError, match="regular file inside"):
            source.open(path)


def test_names_that_are_not_unicode_are_named_and_not_opened(folder: Path) -> None:
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jpg"))).write_bytes(b"x")
    errors = {file.path: file.error for file in LocalSource(str(folder)).files()}
    assert "not valid UTF-8" in str(errors["\\xff.jpg"])


def test_places_that_are_not_there_are_errors(folder: Path) -> None:
    for uri in (folder / "none", folder / "x-*"):
        with pytest.raises(FormatError, match="no such"):
            sizes(uri)


def test_addresses_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [remote_scheme(uri) for uri in ("s3://b/x", "gs://b", "https://h/x", "x", "/x:/y")] == [
        "s3",
        "gs",
        "https",
        None,
        None,
    ]
    for uri in ("ftp://h/x", "S3://b", "file:///x"):
        with pytest.raises(FormatError, match="not known"):
            open_source(uri)
    assert isinstance(open_source("s3://bucket/x"), RemoteSource) and isinstance(open_source("x"), LocalSource)
    assert (absolute("s3://b/x"), absolute("x")) == ("s3://b/x", str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        ("s3://b/set/a", "s3://b/set", True),
        ("s3://b/set", "s3://b/set/", True),
        ("s3://b/settled", "s3://b/set", False),
        ("gs://b/set", "s3://b/set", False),
        ("set", "s3://b/set", False),
        ("set/a", "set", True),
        ("set/../other", "set", False),
    ],
)
def test_whether_one_place_lies_in_another(inner: str, outer: str, expected: bool) -> None:
    assert within(inner, outer) is expected


def test_a_folder_that_is_replaced_by_a_link_while_it_is_read_leads_nowhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.jpg").write_bytes(b"secret")
    source = LocalSource(str(folder))
    assert source.read("a/1.jpg", 9) == b"x"
    (folder / "a").rename(folder / "old")
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    assert source.read("a/1.jpg", 9) == b"x"  # the folder that was entered
    assert source.read("t-1.tar", 9) == b"11"
    with pytest.raises(OSError, match="not a regular file inside the set's folder"):
        source.read("a/1.jpg", 9)


def test_a_file_that_is_replaced_by_a_link_or_a_pipe_is_not_read(folder: Path) -> None:
    source = LocalSource(str(folder))
    assert source.read("a/1.jpg", 9) == b"x"
    (folder / "a/1.jpg").unlink()
    (folder / "a/1.jpg").symlink_to(folder.parent / "secret.txt")
    for call in (lambda: source.read("a/1.jpg", 9), lambda: source.open("a/1.jpg")):
        with pytest.raises(OSError, match="not a regular file inside the set's folder"):
            call()
    (folder / "a/1.jpg").unlink()
    os.mkfifo(folder / "a/1.jpg")
    with pytest.raises(OSError, match="not a regular file"):
        source.read("a/1.jpg", 9)


@pytest.mark.parametrize(("limit", "found"), [(0, b"y"), (1, b"yy"), (2, b"yy"), (3, b"yy")])
def test_a_file_is_read_to_one_byte_more_than_the_limit(folder: Path, limit: int, found: bytes) -> None:
    assert LocalSource(str(folder)).read("a/b/2.jpg", limit) == found


def test_a_file_that_grew_after_its_size_was_taken_is_read_to_its_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.read

    def short(file: int, size: int) -> bytes:
        return real(file, 1)

    monkeypatch.setattr(os, "read", short)  # what a network's file system may do
    assert LocalSource(str(folder)).read("a/b/2.jpg", 9) == b"yy"


def test_what_was_listed_is_given_once_more_and_not_a_third_time(folder: Path) -> None:
    source = LocalSource(str(folder))
    source.remember(list(source.files()))
    (folder / "new.jpg").write_bytes(b"z")
    assert len(list(source.files())) == 4
    assert len(list(source.files())) == 5


def test_a_source_opens_the_same_files_in_another_process(folder: Path) -> None:
    import pickle

    source = LocalSource(str(folder))
    source.read("a/1.jpg", 9)
    assert data(pickle.loads(pickle.dumps(source)), "a/1.jpg") == b"x"
