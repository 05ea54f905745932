import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from cluster.encrypted_parts import Cipher
from cluster.faults import EncryptionError, IncompleteTable
from cluster.keys import data_key, forget_keys
from cluster.storage import Commit, Store

KEYS = [str(i) + "-person.jpg" for i in range(40)]
TABLE = pa.table({"key": KEYS, "vector": pa.array([[0.1 * i, 0.2] for i in range(40)], pa.list_(pa.float32(), 2))})


@pytest.fixture(autouse=True)
def _master(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("UNVEIL_TEST_KEY", os.urandom(32).hex())
    monkeypatch.setenv("UNVEIL_OTHER_KEY", os.urandom(32).hex())
    forget_keys()
    yield
    forget_keys()


def made(folder: Path, reference: str = "env:UNVEIL_TEST_KEY") -> Store:
    store = Store(folder, Cipher.at(folder, reference))
    store.make_key()
    return store


def commit(store: Store, table: pa.Table = TABLE, name: str = "part", **facts: object) -> Commit:
    return store.commit(name, table, contract="things/1", key="k", facts=facts)


def test_an_encrypted_table_is_read_back_and_its_marker_is_that_of_the_plain_one(tmp_path: Path) -> None:
    store, plain = made(tmp_path / "a").child("search"), Store(tmp_path / "b").child("search")
    one, other = commit(store, images=3, share=0.1, by={"ok": 2}), commit(plain, images=3, share=0.1, by={"ok": 2})
    assert store.read("part").equals(TABLE) and store.find("part") == one
    assert store.read("part", ["vector"]).equals(TABLE.select(["vector"]))
    assert one.encrypted and dataclasses.replace(one, encrypted="") == other
    assert "encrypted" not in json.loads((tmp_path / "b/search/part.commit.json").read_bytes())


def test_nothing_of_the_table_is_in_the_file(tmp_path: Path) -> None:
    commit(made(tmp_path).child("search"))
    held = (tmp_path / "search/part.parquet").read_bytes()
    assert held[:4] == held[-4:] == b"PARE"
    assert not any(word in held for word in (b"person", b"vector", b"key", b"ARROW"))


def test_any_parquet_reader_with_key_and_aad_reads_the_file(tmp_path: Path) -> None:
    """As docs/security.md says, written out here."""
    store = made(tmp_path)
    commit(store.child("search"), n=1)
    marker = json.loads((tmp_path / "search/part.commit.json").read_bytes())
    opened = data_key("env:UNVEIL_TEST_KEY", (tmp_path / "keys.json").read_bytes(), "")
    key = opened.part_key(json.dumps(["search", "part", marker["sha256"]]).encode())
    aad = hashlib.sha256(json.dumps({**marker, "place": "search"}, sort_keys=True).encode()).digest()
    properties = pe.create_decryption_properties(key, aad_prefix=aad)
    assert pq.read_table(tmp_path / "search/part.parquet", decryption_properties=properties).equals(TABLE)


@pytest.mark.parametrize(
    "damage", ["cut", "longer", "swapped", "moved", "marker", "exchanged", "plain", "plain with marker"]
)
def test_what_is_not_the_committed_part_is_refused(tmp_path: Path, damage: str) -> None:
    store = made(tmp_path).child("search")
    commit(store, n=1)
    commit(store, TABLE.slice(1), "other", n=1)
    data, marker = tmp_path / "search/part.parquet", tmp_path / "search/part.commit.json"
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-40])
    elif damage == "longer":
        data.write_bytes(data.read_bytes() + b"PARE")
    elif damage == "swapped":
        shutil.copy(tmp_path / "search/other.parquet", data)
    elif damage == "exchanged":
        shutil.copy(tmp_path / "search/other.commit.json", marker)
    elif damage == "moved":
        shutil.copytree(tmp_path / "search", tmp_path / "scan")
        store = made(tmp_path).child("scan")
    elif damage == "marker":
        marker.write_text(marker.read_text().replace('"n": 1', '"n": 2'))
    else:
        shutil.rmtree(tmp_path / "plain", ignore_errors=True)
        commit(Store(tmp_path / "plain" / "search"), n=1)
        shutil.copy(tmp_path / "plain/search/part.parquet", data)
        if damage == "plain with marker":
            shutil.copy(tmp_path / "plain/search/part.commit.json", marker)
    said = {"plain with marker": "encryption.key is set", "exchanged": "is that of 'other'"}
    told = said.get(damage, "cannot be decrypted")
    with pytest.raises((IncompleteTable, EncryptionError), match=rf"part\.(parquet|commit\.json).*{told}"):
        store.read("part")


def test_no_changed_byte_changes_what_is_read(tmp_path: Path) -> None:
    """A random bit of every fourth byte: refused, but for a few that say nothing, where the table is the same."""
    store = made(tmp_path).child("search")
    small = pa.table({"key": ["a", "b"]})
    commit(store, small)
    path = tmp_path / "search/part.parquet"
    held, rng, unread = path.read_bytes(), random.Random(0), 0
    for at in range(rng.randrange(4), len(held), 4):
        damaged = bytearray(held)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert store.read("part").equals(small)
            unread += 1
        except IncompleteTable:
            continue
    assert unread <= 3  # type bits of the two fields that name the algorithm, which the library skips


def test_another_master_key_opens_nothing_and_begins_nothing(tmp_path: Path) -> None:
    commit(made(tmp_path).child("search"))
    other = Store(tmp_path, Cipher.at(tmp_path, "env:UNVEIL_OTHER_KEY"))
    for action in (other.make_key, lambda: other.child("search").read("part"), lambda: commit(other.child("search"))):
        with pytest.raises(EncryptionError, match=r"keys\.json: cannot be opened .* this is another key"):
            action()
    assert made(tmp_path).child("search").read("part").equals(TABLE)


def test_without_the_key_encrypted_places_are_neither_read_nor_written(tmp_path: Path) -> None:
    commit(made(tmp_path).child("search"))
    plain = Store(tmp_path, Cipher.at(tmp_path, ""))
    with pytest.raises(EncryptionError, match="the tables here are encrypted"):
        plain.make_key()
    for store in (plain, Store(tmp_path)):
        with pytest.raises(EncryptionError, match=r"part\.parquet is encrypted, and encryption\.key is empty"):
            store.child("search").find("part")


def test_a_key_is_not_begun_over_tables_without(tmp_path: Path) -> None:
    commit(Store(tmp_path).child("search"))
    with pytest.raises(EncryptionError, match="made without encryption"):
        made(tmp_path)
    assert not (tmp_path / "keys.json").exists()


def test_a_master_key_within_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "key"
    path.write_bytes(os.urandom(32))
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    for place in (path, tmp_path / "link"):
        with pytest.raises(EncryptionError, match="Put it elsewhere"):
            made(tmp_path / "run", f"file:{place}")


def test_a_destroyed_data_key_leaves_nothing_readable(tmp_path: Path) -> None:
    store = made(tmp_path).child("search")
    commit(store)
    (tmp_path / "keys.json").unlink()
    with pytest.raises(EncryptionError, match="is gone, and with it the key"):
        store.read("part")
    shutil.move(tmp_path / "search", tmp_path.parent / "kept")
    made(tmp_path)
    shutil.move(tmp_path.parent / "kept", tmp_path / "search")
    with pytest.raises(EncryptionError, match="is not the one here"):
        store.read("part")


def test_a_store_that_is_pickled_carries_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made(tmp_path).child("search")
    commit(store)
    sent = pickle.dumps(store)
    opened = data_key("env:UNVEIL_TEST_KEY", (tmp_path / "keys.json").read_bytes(), "")
    secrets = [bytes.fromhex(os.environ["UNVEIL_TEST_KEY"]), opened.secret]
    assert not any(secret in sent or secret.hex().encode() in sent for secret in secrets)
    monkeypatch.chdir("/")
    assert pickle.loads(sent).read("part").equals(TABLE) and Store(pickle.loads(sent)).read("part").equals(TABLE)


def test_a_folder_within_a_run_shares_its_key_and_a_place_outside_has_its_own(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    assert run.cipher is not None
    inner = Cipher.at(tmp_path / "run" / "clean" / "audit", "env:UNVEIL_TEST_KEY")
    assert inner == run.cipher == run.cipher.covering(tmp_path / "run" / "store") and inner.like(run.cipher)
    outer = run.cipher.covering(tmp_path / "store")
    assert outer.scope == str(tmp_path / "store") and not outer.like(run.cipher)
    assert run.cipher.covering("s3://bucket/store/").scope == "s3://bucket/store"
    assert Cipher("", "a").like(Cipher("", "b")) and Cipher("", "a").like(None)


@pytest.mark.parametrize("reference", ["", "env:UNVEIL_TEST_KEY"])
def test_a_keys_json_of_another_program_above_the_run_is_left_alone(tmp_path: Path, reference: str) -> None:
    (tmp_path / "keys.json").write_text('{"api": "secret"}')
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "keys.json").write_bytes(b"\xff")
    store = made(tmp_path / "a" / "run", reference)
    assert commit(store) == store.find("part") and store.read("part").equals(TABLE)
    assert (tmp_path / "a" / "run" / "keys.json").exists() == bool(reference)


def test_two_writers_of_a_part_write_one_marker(tmp_path: Path) -> None:
    """So in whatever order their two files arrive, the part is whole."""
    store = made(tmp_path).child("search")
    markers, files = set(), []
    for _ in range(2):
        commit(store)
        markers.add((tmp_path / "search/part.commit.json").read_bytes())
        files.append((tmp_path / "search/part.parquet").read_bytes())
    assert len(markers) == 1 and files[0] != files[1]
    (tmp_path / "search/part.parquet").write_bytes(files[0])
    assert store.read("part").equals(TABLE)
