import os
import stat
import threading
from pathlib import Path

import pytest

from cluster.faults import StorageError
from cluster.files import write_new


def test_a_new_file_is_private_and_never_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"
    before = os.umask(0)
    try:
        assert write_new(path, b"first") is True
    finally:
        os.umask(before)
    assert write_new(path, b"second") is False
    assert path.read_bytes() == b"first" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_nlink == 1 and os.listdir(path.parent) == ["keys.json"]


def test_of_many_writers_one_makes_the_file_and_it_is_whole(tmp_path: Path) -> None:
    path, made, start = tmp_path / "keys.json", [], threading.Barrier(8)

    def write(value: int) -> None:
        start.wait()
        if write_new(path, bytes([value]) * 10_000):
            made.append(value)

    threads = [threading.Thread(target=write, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and path.read_bytes() == bytes(made) * 10_000
    assert os.listdir(tmp_path) == ["keys.json"]


def test_a_place_without_links_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(StorageError, match=r"keys\.json: cannot be made .Operation not permitted"):
        write_new(tmp_path / "keys.json", b"x")
    assert os.listdir(tmp_path) == []
