import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from cluster.encrypted_parts import Cipher
from cluster.faults import EncryptionError, FolderInUse
from cluster.keys import forget_keys
from cluster.storage import Store, write_private
from operators.errors import ConfigError
from operators.tables import UNITS
from pipeline import purge as module
from pipeline.__main__ import main
from pipeline.config import AuditConfig, load
from pipeline.embed import unit_store
from pipeline.protection import stores
from pipeline.purge import HOLD, RECEIPT, purge

KEY = "env:UNVEIL_TEST_KEY"
NAMES = pa.table({"key": ["anna.jpg", "boris.jpg"], "vector": pa.array([[0.25, 0.5]] * 2, pa.list_(pa.float32(), 2))})
UNIT = {"set": "release", "uri": "-", "format": "folder", "first_row": 0, "anonymous": True, "members": []}


@pytest.fixture(autouse=True)
def _master(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("UNVEIL_TEST_KEY", os.urandom(32).hex())
    forget_keys()
    yield
    forget_keys()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., AuditConfig]:
    """A run folder with tables, embeddings and files, made once; the configuration with overrides."""
    sets = {role: {"uri": str(tmp_path / "sets" / role)} for role in ("release", "training")}
    path = tmp_path / "audit.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "run"), "title": "An audit", "sets": sets}))

    def build(*overrides: str) -> AuditConfig:
        config = load(str(path), overrides)
        if not (tmp_path / "run").exists():
            _fill(config)
        return config

    return build


def _fill(config: AuditConfig) -> None:
    folder = Path(config.out)
    store, embeddings = stores(config)
    folder.mkdir(mode=0o700)
    store.make_key()
    embeddings.make_key()
    store.child("assess").commit("findings", NAMES, contract="findings/1", key="k")
    scanned = UNITS.from_rows([{**UNIT, "unit": name} for name in ("unit0", "unit1")])
    store.child("scan").commit("release", scanned, contract=UNITS.contract, key="k")
    for name in ("unit0", "unit1", "unit2"):
        config_store = embeddings.child(unit_name(config))
        config_store.commit(name, NAMES, contract="embeddings/1", key=name)
    made = {"created": datetime.now(UTC).isoformat(), "unveil": "1"}
    write_private(folder / "run.json", json.dumps(made).encode())
    write_private(folder / "findings.csv", b"anna.jpg")
    write_private(folder / "figures" / "deep" / "face.png", b"anna")
    (folder / "figures" / "outside").symlink_to(folder.parent / "audit.yaml")
    (folder / "figures" / "folder").symlink_to(folder.parent / "elsewhere")
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "kept").write_text("")


def unit_name(config: AuditConfig) -> str:
    from pipeline.stage import Run

    return unit_store(Run(config)).name


def left(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("key", ["", KEY])
def test_a_purged_run_holds_a_receipt_and_nothing_else(run: Callable[..., AuditConfig], key: str) -> None:
    config = run(f"encryption.key='{key}'", "purge.confirm=run")
    folder = Path(config.out)
    assert main(["purge", str(folder.parent / "audit.yaml"), f"encryption.key='{key}'", "purge.confirm=run"]) == 0
    assert set(left(folder)) <= {RECEIPT, ".lock"}
    receipt = json.loads((folder / RECEIPT).read_bytes())
    assert receipt["state"] == "done" and (receipt["data_key"] is None) == (key == "")
    tables = receipt["held"]["tables"]
    assert (tables["assess"], tables["scan"], sum(tables.values())) == (1, 1, 5)
    assert b"anna" not in (folder / RECEIPT).read_bytes()
    assert stat.S_IMODE((folder / RECEIPT).stat().st_mode) == 0o600
    assert (folder.parent / "elsewhere" / "kept").exists() and (folder.parent / "audit.yaml").exists()


def test_copies_of_the_tables_are_unreadable_when_the_key_is_destroyed(run: Callable[..., AuditConfig]) -> None:
    """As a backup of all but the key file would be."""
    config = run(f"encryption.key={KEY}", "purge.confirm=run")
    folder, backup = Path(config.out), Path(config.out).parent / "backup"
    assert Store(folder, Cipher.at(folder, KEY)).child("assess").read("findings").equals(NAMES)
    shutil.copytree(folder, backup, symlinks=True)
    (backup / "keys.json").unlink()
    purge(config)
    for path in backup.rglob("*.parquet"):
        name, store = path.stem, Store(path.parent, Cipher.at(backup, KEY))
        with pytest.raises(EncryptionError, match="is gone, and with it the key"):
            store.read(name)
        assert b"anna" not in path.read_bytes()


def test_it_asks_for_the_name_of_the_folder_and_says_what_would_go(run: Callable[..., AuditConfig]) -> None:
    config = run()
    before = left(Path(config.out))
    for given in ("''", "An audit", "Run"):
        with pytest.raises(ConfigError, match=r"5 tables, \d+ files, .* Give purge\.confirm=run"):
            purge(run(f"purge.confirm={given}"))
    assert left(Path(config.out)) == sorted([*before, ".lock"])


def test_a_legal_hold_is_respected_until_it_ends(run: Callable[..., AuditConfig]) -> None:
    config, folder = run("purge.confirm=run"), Path(run().out)
    purge(run("purge.hold=true"))
    with pytest.raises(ConfigError, match="legal hold"):
        purge(config)
    assert (folder / "findings.csv").exists() and (folder / HOLD).exists()
    purge(run("purge.hold=false"))
    write_private(folder / "inner" / HOLD, b"{}")  # another run's folder in this one
    with pytest.raises(ConfigError, match="inner is under a legal hold"):
        purge(config)
    (folder / "inner" / HOLD).unlink()
    purge(config)
    assert not (folder / "findings.csv").exists()


@pytest.mark.parametrize(("days", "gone"), [(29.9, False), (30.1, True)])
def test_expired_runs_only(run: Callable[..., AuditConfig], days: float, gone: bool) -> None:
    config = run("purge.confirm=run", "purge.expired=true")
    path = Path(config.out) / "run.json"
    path.write_text(json.dumps({"created": (datetime.now(UTC) - timedelta(days=days)).isoformat()}))
    said = purge(config)
    assert ("is kept for 30" in said) == (not gone) == path.exists()


def test_folders_that_are_not_runs_or_hold_sets_are_left_alone(run: Callable[..., AuditConfig], tmp_path: Path) -> None:
    run()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("")
    with pytest.raises(ConfigError, match="no run folder"):
        purge(run(f"out={tmp_path}/home", "purge.confirm=home"))
    (tmp_path / "home" / "keys.json").write_text('{"api": "of another program"}')
    with pytest.raises(ConfigError, match="no run folder"):
        purge(run(f"out={tmp_path}/home", "purge.confirm=home"))
    with pytest.raises(ConfigError, match=r"sets\.training\.uri: .* lies in the run folder"):
        purge(run(f"sets.training.uri={tmp_path}/run/set", "purge.confirm=run"))
    with pytest.raises(ConfigError, match=r"embedder|model"):
        purge(run(f"embedder.path={tmp_path}/run/m.onnx", f"embedder.sha256={'a' * 64}", "purge.confirm=run"))
    assert (tmp_path / "run" / "run.json").exists() and (tmp_path / "home" / "letter").exists()


def test_a_run_under_way_is_not_purged(run: Callable[..., AuditConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    config = run("purge.confirm=run")

    def taken(folder: Path) -> None:
        raise FolderInUse(f"{folder}: in use")

    monkeypatch.setattr("cluster.run_lock._taken", taken)
    with pytest.raises(FolderInUse):
        purge(config)
    assert (Path(config.out) / "findings.csv").exists()


def test_a_run_under_way_within_the_folder_is_not_purged(run: Callable[..., AuditConfig], root: Path) -> None:
    config = run("purge.confirm=run")
    inner = Path(config.out) / "second"
    inner.mkdir()
    told = "import sys; from pathlib import Path; from cluster.run_lock import locked\n" \
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"  # fmt: skip
    command = [sys.executable, "-c", told, str(inner)]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse, match="second: in use"):
            purge(config)
        process.communicate("")
    assert (Path(config.out) / "findings.csv").exists()
    assert "is purged" in purge(config) and not inner.exists()


@pytest.mark.parametrize("name", ["keys.json", "audience.key"])
def test_a_key_that_a_link_leads_to_is_not_destroyed(run: Callable[..., AuditConfig], name: str) -> None:
    config = run("purge.confirm=run")
    folder = Path(config.out)
    (folder.parent / "shared").write_bytes(b"of several runs")
    (folder / name).symlink_to(folder.parent / "shared")
    with pytest.raises(ConfigError, match="is a link: the key"):
        purge(config)
    with pytest.raises(OSError, match="symbolic links"):
        module._destroy_key(folder / name)
    assert (folder.parent / "shared").read_bytes() == b"of several runs" and (folder / "findings.csv").exists()


def test_a_run_after_a_purge_that_was_cut_short_is_a_new_one(run: Callable[..., AuditConfig]) -> None:
    config = run("purge.confirm=run", "purge.expired=true")
    begun = {"contract": "purge/1", "state": "begun", "begun": "2020-01-01T00:00:00+00:00"}
    write_private(Path(config.out) / RECEIPT, json.dumps(begun).encode())
    assert "nothing was removed" in purge(config)
    assert "is purged" in purge(run("purge.confirm=run"))
    receipt = json.loads((Path(config.out) / RECEIPT).read_bytes())
    assert receipt["earlier"] == [begun | {"earlier": []}] and receipt["held"]["files"] > 0


def test_a_shared_store_is_left_unless_asked_for_and_then_only_this_runs_part_goes(
    run: Callable[..., AuditConfig], tmp_path: Path
) -> None:
    given = (f"store={tmp_path}/store", f"encryption.key={KEY}", "purge.confirm=run")
    config = run(*given)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
    assert f"{tmp_path}/store may serve other runs" in purge(config)
    embeddings = tmp_path / "store" / "embeddings" / unit_name(config)
    assert len(list(embeddings.glob("*.parquet"))) == 3
    shutil.rmtree(tmp_path / "run")
    shutil.move(tmp_path / "copy", tmp_path / "run")
    assert "removed (2 tables)" in purge(run(*given, "purge.store=true"))
    assert [path.name for path in embeddings.glob("*.parquet")] == ["unit2.parquet"]
    assert (tmp_path / "store" / "keys.json").exists()


def test_a_kill_at_any_step_is_gone_on_from(run: Callable[..., AuditConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first step on the key is gone or the receipt says that it is about to go; the end is the same."""
    config = run(f"encryption.key={KEY}", "purge.confirm=run")
    folder = Path(config.out)
    shutil.copytree(folder, folder.parent / "kept", symlinks=True)
    step, ends = 0, False
    while not ends:
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "kept", folder, symlinks=True)
        forget_keys()
        with monkeypatch.context() as patched:
            ends = _killed_at(step, patched, config)
        if not ends and not (folder / RECEIPT).exists():
            assert (folder / "keys.json").exists() and (folder / "findings.csv").exists()
        if not ends:
            if not (folder / "findings.csv").exists():
                assert not (folder / "keys.json").exists()
            assert "is purged" in purge(config)
        receipt = json.loads((folder / RECEIPT).read_bytes())
        assert receipt["state"] == "done" and receipt["held"]["tables"]["assess"] == 1
        assert set(left(folder)) <= {RECEIPT, ".lock"}
        step += 1
    assert step > 15


def _killed_at(step: int, patched: pytest.MonkeyPatch, config: AuditConfig) -> bool:
    """Purge, ended at the given step before it; whether it came to its end."""
    calls = iter(range(10_000))

    def before(real: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **options: object) -> object:
            if next(calls) == step:
                raise KeyboardInterrupt
            return real(*args, **options)

        return counted

    patched.setattr(Path, "unlink", before(Path.unlink))
    patched.setattr(module, "write_private", before(write_private))
    patched.setattr(module.shutil, "rmtree", before(shutil.rmtree))
    patched.setattr(module.os, "fsync", before(os.fsync))
    try:
        purge(config)
    except KeyboardInterrupt:
        return False
    return True


def test_purging_twice_says_so_and_a_new_run_keeps_the_old_receipt(run: Callable[..., AuditConfig]) -> None:
    config = run("purge.confirm=run")
    purge(config)
    first = json.loads((Path(config.out) / RECEIPT).read_bytes())
    assert "was purged at" in purge(config)
    write_private(Path(config.out) / "run.json", b"{}")
    purge(config)
    receipt = json.loads((Path(config.out) / RECEIPT).read_bytes())
    assert [one["begun"] for one in receipt["earlier"]] == [first["begun"]]
    assert receipt["statements"]["run.json"] == hashlib.sha256(b"{}").hexdigest()
