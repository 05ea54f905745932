import json
import os
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import storage
from cluster.faults import IncompleteTable, StorageError
from cluster.storage import Store, write_private

TABLE = pa.table({"key": ["a", "b", None], "value": [1.5, None, 3.0]})


def commit(store: Store, name: str = "part", table: pa.Table = TABLE, **facts: object) -> storage.Commit:
    return store.commit(name, table, contract="things/1", key="k", facts=facts)


def test_a_committed_table_is_read_back_and_is_plain_parquet(tmp_path: Path) -> None:
    store = Store(tmp_path).child("stage")
    made = commit(store, images=3)
    assert store.read("part").equals(TABLE)
    assert pq.read_table(tmp_path / "stage" / "part.parquet").equals(TABLE)
    assert store.find("part") == made
    assert (made.rows, made.contract, made.facts) == (3, "things/1", {"images": 3})


def test_equal_tables_give_equal_bytes(tmp_path: Path) -> None:
    assert commit(Store(tmp_path / "a")).sha256 == commit(Store(tmp_path / "b")).sha256
    assert commit(Store(tmp_path / "a")).sha256 != commit(Store(tmp_path / "b"), table=TABLE.slice(1)).sha256


def test_nothing_is_found_before_the_marker_and_reading_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store)
    (tmp_path / "part.commit.json").unlink()
    assert store.find("part") is None
    with pytest.raises(IncompleteTable, match="not committed"):
        store.read("part")


@pytest.mark.parametrize("step", ["before data", "after data"])
def test_a_crash_before_the_marker_leaves_nothing_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Even when an earlier version was committed: its marker must not vouch for new bytes."""
    store = Store(tmp_path)
    commit(store, table=TABLE.slice(1))
    real = write_private

    def crashing(path: Path, data: bytes) -> None:
        if path.name.endswith(".json") or step == "before data":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(storage, "write_private", crashing)
    with pytest.raises(KeyboardInterrupt):
        commit(store)
    assert store.find("part") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_bytes_are_refused(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    commit(store)
    path = tmp_path / "part.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-10])
    with pytest.raises(IncompleteTable, match=r"part\.parquet"):
        store.read("part")


def test_an_unreadable_marker_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store)
    (tmp_path / "part.commit.json").write_text("{")
    with pytest.raises(IncompleteTable, match=r"part\.commit\.json"):
        store.find("part")


def test_files_and_folders_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        commit(Store(tmp_path / "run" / "deep"))
    finally:
        os.umask(before)
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_sweep_removes_what_killed_writers_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store)
    (tmp_path / ".aside-0123").write_bytes(b"half a table")
    assert store.sweep() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.commit.json", "part.parquet"]


def test_an_output_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    for place in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(StorageError, match=r"taken.*Choose another `out`"):
            commit(Store(place))


def test_a_folder_without_write_permission_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere, so permission bits alone do not tell
    with pytest.raises(StorageError, match="not a folder that can be written"):
        commit(Store(tmp_path))


def test_a_full_disk_leaves_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_private(tmp_path / "x", b"data")
    assert list(tmp_path.iterdir()) == []


def test_json_refuses_nan_and_is_stable() -> None:
    assert storage.to_json({"b": 1, "a": "é"}) == b'{\n  "a": "\xc3\xa9",\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        storage.to_json({"a": float("nan")})
    assert json.loads(storage.to_json([1])) == [1]
