"""Files are read again when they may have changed, and not otherwise."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.storage import Store
from operators.formats import SetConfig, reader
from pipeline.known_files import KnownFiles, set_stamp


class Set:
    """A folder of files and what is known of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder / "set", Store(folder / "listings")
        self.chosen = SetConfig(uri=str(self.folder))
        for name in ("a/1.png", "a/2.png", "b.png"):
            self.write(name, name.encode())

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def look(self, days: float = 1.0) -> list[str]:
        """The files that had to be read; their digests are their own content here."""
        known, read = KnownFiles(self.store, self.chosen, "folder", days), []
        with reader("folder", str(self.folder)) as opened:
            for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
                place = str(path.relative_to(self.folder))
                digest = known.digest(opened, place)
                if digest is None:
                    read.append(place)
                    known.learn(opened, place, path.read_bytes().decode())
                else:
                    assert digest == path.read_bytes().decode()
        known.keep()
        assert known.taken == len(list(self.folder.rglob("*.png"))) - len(read)
        return read


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Set:
    monkeypatch.setattr("pipeline.known_files.YOUNG_NS", 0)
    return Set(tmp_path)


ALL = ["a/1.png", "a/2.png", "b.png"]


def test_what_looks_as_it_did_is_read_once(files: Set) -> None:
    assert files.look() == ALL
    assert files.look() == files.look() == []
    files.write("a/3.png", b"new")
    (files.folder / "a/1.png").unlink()
    assert files.look() == ["a/3.png"]
    assert files.look() == []


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


def restore_the_time(path: Path) -> None:
    was = path.stat()
    rewrite(path)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def replace_by_a_file_of_the_same_size_and_time(path: Path) -> None:
    was, other = path.stat(), path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(was.st_atime_ns, was.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, restore_the_time, replace_by_a_file_of_the_same_size_and_time])
def test_a_changed_file_is_read_even_if_its_size_and_time_are_as_before(
    files: Set, change: Callable[[Path], None]
) -> None:
    files.look()
    before = set_stamp(files.chosen)
    change(files.folder / "b.png")
    assert set_stamp(files.chosen) != before
    assert files.look() == ["b.png"]


def test_a_file_that_changed_just_now_is_not_trusted_yet(files: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.known_files.YOUNG_NS", 10**12)
    assert files.look() == files.look() == ALL and set_stamp(files.chosen) is None


def test_everything_is_read_again_after_so_many_days(files: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    files.look()
    later = time.time() + 86_400 * 1.5
    monkeypatch.setattr("pipeline.known_files.time.time", lambda: later)
    assert files.look(2.0) == [] and files.look(1.0) == ALL and files.look(1.0) == []


def test_what_a_clock_that_was_ahead_wrote_is_not_trusted(files: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr("pipeline.known_files.time.time", lambda: now + 86_400 * 30)
    files.look()
    monkeypatch.setattr("pipeline.known_files.time.time", lambda: now)
    assert files.look() == ALL and files.look() == []


def test_nothing_is_written_or_trusted_without_the_option(files: Set) -> None:
    assert files.look(0) == files.look(0) == ALL
    assert not files.store.root.exists()


def test_a_set_is_stamped_by_all_its_files_and_its_list(files: Set, tmp_path: Path) -> None:
    one = set_stamp(files.chosen)
    assert one is not None and set_stamp(files.chosen) == one
    files.write("c.png", b"c")
    assert set_stamp(files.chosen) != one
    (files.folder / "c.png").unlink()
    assert set_stamp(files.chosen) == one
    listed = tmp_path / "list.csv"
    listed.write_text("path\nb.png\n")
    chosen = SetConfig(uri=str(files.folder), list_file=str(listed))
    two = set_stamp(chosen)
    listed.write_text("path\na/1.png\n")
    assert len({one, two, set_stamp(chosen)}) == 3
