import importlib.util
import io
import json
import os
import pickle
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import objects, storage
from cluster.encrypted_parts import Cipher
from cluster.faults import EncryptionError, IncompleteTable, StorageError
from cluster.keys import forget_keys
from cluster.storage import Store, write_private

_spec = importlib.util.spec_from_file_location("object_store", Path(__file__).parents[1] / "object_store.py")
assert _spec is not None and _spec.loader is not None
tools: Any = sys.modules.setdefault("object_store", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(tools)
Fault = tools.Fault

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


def test_the_marker_of_another_part_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store)
    commit(store, "other", TABLE.slice(1))
    (tmp_path / "part.commit.json").write_bytes((tmp_path / "other.commit.json").read_bytes())
    with pytest.raises(IncompleteTable, match=r"part\.commit\.json: the commit marker is that of 'other'"):
        store.read("part")
    assert store.read("other").equals(TABLE.slice(1))


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
    write_private(tmp_path / ".aside-public" / "figures" / "a.svg", b"half a report")
    (tmp_path.parent / "elsewhere").mkdir()
    (tmp_path / ".aside-link").symlink_to(tmp_path.parent / "elsewhere")
    assert store.sweep() == 3 and (tmp_path.parent / "elsewhere").is_dir()
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


# --- object storage


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with tools.object_store() as made:
        yield made


@pytest.fixture
def bucket(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty bucket, with the pauses taken out."""
    server.clear()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "PAUSE_S", 0.01)
    monkeypatch.setattr(objects, "TRIES", 1)
    objects._files.cache_clear()
    yield server
    objects._files.cache_clear()


ADDRESS = f"s3://{tools.BUCKET}/audits/store"


def body(bucket: Any, key: str) -> bytes:
    return bytes(bucket.client.get_object(Bucket=tools.BUCKET, Key=key)["Body"].read())


def test_a_part_in_object_storage_is_the_part_in_a_folder(bucket: Any, tmp_path: Path) -> None:
    store = Store(ADDRESS).child("embeddings")
    made = commit(store, images=3)
    assert made == commit(Store(tmp_path), images=3) == store.find("part")
    assert store.read("part").equals(TABLE) and store.read("part", ["key"]).column_names == ["key"]
    keys = bucket.names()
    assert keys == [
        "audits/store/embeddings/part-" + made.sha256[:16] + ".parquet",
        "audits/store/embeddings/part.commit.json",
    ]
    assert body(bucket, keys[0]) == (tmp_path / "part.parquet").read_bytes()
    assert body(bucket, keys[1]) == (tmp_path / "part.commit.json").read_bytes()
    assert pq.read_table(io.BytesIO(body(bucket, keys[0]))).equals(TABLE)
    assert (store.address, store.name) == (f"{ADDRESS}/embeddings", "embeddings")
    assert Store(store.address).find("part") == made
    with pytest.raises(StorageError, match="not object storage"):
        _ = store.root


def test_an_encrypted_part_in_object_storage(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNVEIL_TEST_KEY", os.urandom(32).hex())
    forget_keys()
    store = Store(ADDRESS, Cipher.at(ADDRESS, "env:UNVEIL_TEST_KEY"))
    store.make_key()
    part = store.child("embeddings")
    made = commit(part, images=3)
    again = pickle.loads(pickle.dumps(part))
    assert again.read("part").equals(TABLE) and again.find("part") == made
    data = f"audits/store/embeddings/part-{made.sha256[:16]}.parquet"
    assert bucket.names() == [data, "audits/store/embeddings/part.commit.json", "audits/store/keys.json"]
    assert body(bucket, data)[:4] == b"PARE"
    commit(Store(ADDRESS).child("plain"))
    bucket.put(data, body(bucket, f"audits/store/plain/part-{made.sha256[:16]}.parquet"))
    with pytest.raises(IncompleteTable, match="cannot be decrypted"):
        part.read("part")
    assert (part.remove("part"), part.remove("part"), part.find("part")) == (True, False, None)
    bucket.client.delete_object(Bucket=tools.BUCKET, Key="audits/store/keys.json")
    with pytest.raises(EncryptionError, match=r"s3://.*keys\.json is gone"):
        commit(part)
    forget_keys()


def test_a_commit_is_two_requests_that_leave_access_lists_alone(bucket: Any) -> None:
    store = Store(ADDRESS)
    commit(store)
    assert bucket.proxy.counts() == {"PUT": 2}
    assert not any("acl" in name or "grant" in name for headers in bucket.proxy.headers for name in headers)
    for key in list(bucket.names()):
        grants = bucket.client.get_object_acl(Bucket=tools.BUCKET, Key=key)["Grants"]
        assert {grant["Grantee"]["Type"] for grant in grants} == {"CanonicalUser"}


def test_names_of_addresses_mean_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (Store("run").address, Store("run").child("x").name) == (str(tmp_path / "run"), "x")
    assert Store("run").root == Path("run")


@pytest.mark.parametrize("address", [f"s3://me:{tools.SECRET}@bucket/x", "https://place/x", "s3://", "s3://b/x?y=1"])
def test_addresses_that_cannot_hold_tables_are_refused(address: str) -> None:
    with pytest.raises(StorageError, match="without a name, password") as caught:
        Store(address)
    assert tools.SECRET not in str(caught.value)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_kill_between_data_and_marker_leaves_nothing_new(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    store = Store(ADDRESS)
    before = commit(store, table=TABLE.slice(1)) if earlier else None
    real = objects.ObjectFolder.put

    def killed(self: objects.ObjectFolder, name: str, data: bytes) -> None:
        if name.endswith(".json"):
            raise KeyboardInterrupt
        real(self, name, data)

    monkeypatch.setattr(objects.ObjectFolder, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        commit(store)
    assert store.find("part") == before
    if earlier:
        assert store.read("part").equals(TABLE.slice(1))
    else:
        with pytest.raises(IncompleteTable, match="not committed"):
            store.read("part")


def test_two_writers_of_a_part_are_harmless(bucket: Any) -> None:
    """Whatever the order of their writes: one of the two versions is committed, and it is whole."""
    tables = [TABLE, TABLE.slice(1)]
    start = threading.Barrier(2)

    def write(table: pa.Table) -> None:
        start.wait()
        for _ in range(5):
            commit(Store(ADDRESS), table=table)

    threads = [threading.Thread(target=write, args=(table,)) for table in tables]
    for thread in threads:
        thread.start()
    reader = Store(ADDRESS)
    while any(thread.is_alive() for thread in threads):
        if reader.find("part") is not None:
            found = reader.read("part")
            assert any(found.equals(table) for table in tables)
    for thread in threads:
        thread.join()
    found = reader.read("part")
    assert any(found.equals(table) for table in tables)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "marker"])
def test_damaged_objects_are_refused(bucket: Any, damage: str) -> None:
    store = Store(ADDRESS)
    commit(store)
    data, marker = bucket.names()
    held = body(bucket, data)
    if damage == "marker":
        bucket.put(marker, b"{")
    elif damage == "delete":
        bucket.client.delete_object(Bucket=tools.BUCKET, Key=data)
    else:
        bucket.put(data, held[:-10] if damage == "truncate" else b"?" + held[1:])
    with pytest.raises(IncompleteTable, match=r"s3://.*part.*\.(parquet|json)"):
        store.read("part")


@pytest.mark.parametrize("fault", [503, 429, 500, "drop"], ids=str)
@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD"])
def test_throttling_and_broken_connections_are_tried_again(bucket: Any, method: str, fault: int | str) -> None:
    store = Store(ADDRESS)
    bucket.proxy.faults.append(Fault(kind=fault, method=method, times=2))
    commit(store)
    assert store.read("part").equals(TABLE)


@pytest.mark.parametrize("kind", ["cut", "short"])
def test_a_short_answer_is_not_taken_for_the_object(bucket: Any, kind: str) -> None:
    store = Store(ADDRESS)
    commit(store)
    bucket.proxy.faults.append(Fault(kind=kind, times=2))
    assert store.find("part") is not None and store.read("part").equals(TABLE)


def test_what_stays_broken_is_said_without_secrets(bucket: Any) -> None:
    store = Store(ADDRESS)
    commit(store)
    for fault in (Fault(kind=403, code="AccessDenied", method="", times=100), Fault(kind=503, method="", times=1000)):
        bucket.proxy.faults[:] = [fault]
        for action in (lambda: commit(store), lambda: store.find("part"), lambda: store.noted("x"), store.sweep):
            with pytest.raises(StorageError, match=r"s3://sets/audits/store.*(ACCESS_DENIED|503|SLOW_DOWN)") as caught:
                action()
            assert tools.SECRET not in str(caught.value)


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_notes_are_replaced_read_and_forgotten(bucket: Any, tmp_path: Path, place: str) -> None:
    store = Store(tmp_path / "s") if place == "folder" else Store(ADDRESS)
    assert store.noted("a.json") is None
    store.note("a.json", b"1")
    store.note("a.json", b"")
    assert store.noted("a.json") == b""
    store.forget("a.json")
    store.forget("a.json")
    assert store.noted("a.json") is None


def test_sweep_removes_what_no_marker_names_once_it_is_old(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(ADDRESS)
    commit(store, table=TABLE.slice(1))
    kept = commit(store)
    commit(store.child("below"), name="other")
    store.note(".aside-attempts", b".")
    bucket.put("audits/store/killed-0123456789abcdef.parquet", b"never committed")
    bucket.put("audits/store/runtime.json", b"{}")
    assert store.sweep() == 1  # the note; data may belong to a commit that is under way
    later = time.time() + 2 * storage.STALE_S
    monkeypatch.setattr(time, "time", lambda: later)
    assert store.sweep() == 2
    assert store.find("part") == kept and store.read("part").equals(TABLE)
    assert store.child("below").read("other").equals(TABLE) and store.noted("runtime.json") == b"{}"
