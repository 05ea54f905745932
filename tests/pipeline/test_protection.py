"""An audit with encryption gives what one without gives, and leaves nothing of it readable."""

import base64
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from cluster.encrypted_parts import Cipher
from cluster.faults import ClusterError, EncryptionError
from cluster.keys import data_key, forget_keys
from cluster.storage import MARKER, Store
from operators.vectors import from_arrow
from pipeline.audit import audit
from pipeline.config import AuditConfig, load
from pipeline.embed import unit_store
from pipeline.protection import IN_CLEAR, protect
from pipeline.purge import purge
from pipeline.stage import Run

ASKED = ("clean.findings=candidates", "verify.images=4", "purge.confirm=encrypted")
SECOND = "dlib_resnet_v1"


class Both(NamedTuple):
    plain: AuditConfig
    encrypted: AuditConfig
    master: bytes
    session: Path
    """What Ray wrote."""


@pytest.fixture(scope="module")
def both(audited_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """A finished run without encryption, and one with it, made from nothing, with embeddings of a second model."""
    import ray

    folder, master = tmp_path_factory.mktemp("both"), os.urandom(32)
    (folder / "key").write_bytes(master)
    (folder / "key").chmod(0o600)
    shutil.copytree(audited_once / "run", folder / "plain")
    path = str(audited_once / "audit.yaml")
    plain = load(path, [f"out={folder}/plain", *ASKED])
    more = [
        "search.engine=mixed",
        "embed.prepare.workers=1",
        f"encryption.key=file:{folder}/key",
        f"embedders=[sface_2021dec, {SECOND}]",
    ]
    encrypted = load(path, [f"out={folder}/encrypted", *ASKED, *more])
    audit(plain, "clean")
    audit(encrypted, "scan", "embed", "search", "assess", "report", "clean", "verify")
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    yield Both(plain, encrypted, master, session)
    forget_keys()


def tables(config: AuditConfig) -> dict[str, pa.Table]:
    """Every committed table of a run, by its place in the folder."""
    cipher, found = Cipher.at(config.out, config.encryption.key), {}
    for marker in sorted(Path(config.out).rglob(f"*{MARKER}")):
        name = marker.name.removesuffix(MARKER)
        found[(marker.parent / name).relative_to(config.out).as_posix()] = Store(marker.parent, cipher).read(name)
    return found


def vectors(config: AuditConfig) -> np.ndarray:
    """All stored embeddings of a run, shape (N, D)."""
    found = []
    for model in config.models():
        for name, table in tables_of(unit_store(Run(config), model)):
            assert name
            found.append(from_arrow(table["vector"].combine_chunks().drop_null()))
    return found


def tables_of(store: Store) -> Iterator[tuple[str, pa.Table]]:
    for marker in sorted(store.root.glob(f"*{MARKER}")):
        name = marker.name.removesuffix(MARKER)
        yield name, store.read(name)


def slices(config: AuditConfig, count: int) -> list[bytes]:
    """Random pieces of 32 bytes of stored embeddings."""
    rng = np.random.default_rng(0)
    held = [block.tobytes() for block in vectors(config)]
    chosen = [held[at] for at in rng.integers(len(held), size=count)]
    return [block[at : at + 32] for block in chosen for at in [int(rng.integers(len(block) - 32))]]


def names(config: AuditConfig) -> list[bytes]:
    """Keys of images, and names of persons that are no common words."""
    found = set()
    for role in ("release", "training", "control"):
        units = Store(config.out, Cipher.at(config.out, config.encryption.key)).child("scan").read(role)
        members = units["members"].combine_chunks().flatten()
        found |= {*members.field("key").to_pylist(), *members.field("identity").to_pylist()}
    return [name.encode() for name in sorted(filter(None, found)) if len(name) >= 8]


def hits(files: list[Path], wanted: list[bytes]) -> list[tuple[str, bytes]]:
    """Which of the texts, of 8 bytes or more, occur in which files."""
    heads = np.unique(np.array([int.from_bytes(text[:8], "little") for text in wanted], np.uint64))
    found = []
    for path in files:
        data = path.read_bytes()
        for shift in range(max(0, min(8, len(data) - 7))):
            windows = np.frombuffer(data, np.uint64, (len(data) - shift) // 8, shift)
            at = np.searchsorted(heads, windows).clip(max=len(heads) - 1)
            places = np.flatnonzero(heads[at] == windows) * 8 + shift
            found += [(str(path), text) for place in places.tolist() for text in wanted if data.startswith(text, place)]
    return found


def in_clear(path: Path, out: str) -> bool:
    place = path.relative_to(out).as_posix()
    return any(fnmatch(place, one + "*" if one.endswith("/") else one) for one in IN_CLEAR)


def files(config: AuditConfig) -> list[Path]:
    return [path for path in sorted(Path(config.out).rglob("*")) if path.is_file()]


def test_an_encrypted_audit_has_the_tables_of_one_without(both: Both) -> None:
    plain, encrypted = tables(both.plain), tables(both.encrypted)
    second = unit_store(Run(both.encrypted), both.encrypted.models()[1]).name
    assert plain.keys() == {place for place in encrypted if second not in place}
    assert len(encrypted) > len(plain) > 20 and any("clean/audit/assess/" in place for place in plain)
    for place, table in plain.items():
        assert table.equals(encrypted[place]), place
        one, other = (json.loads(Path(c.out, place + MARKER).read_bytes()) for c in (both.plain, both.encrypted))
        assert other.pop("encrypted") and (one["sha256"], one["key"]) == (other["sha256"], other["key"]), place
    for name in ("findings.csv", "clean/manifest.csv", "clean/removed.csv"):
        assert Path(both.plain.out, name).read_bytes() == Path(both.encrypted.out, name).read_bytes()


def test_no_table_shows_a_name_or_a_piece_of_an_embedding(both: Both) -> None:
    wanted = [*slices(both.encrypted, 2000), *names(both.encrypted)]
    stored = [
        path for path in files(both.encrypted) if path.suffix == ".parquet" and not in_clear(path, both.encrypted.out)
    ]
    assert len(stored) > 20 and hits(stored, wanted) == []
    assert all(path.read_bytes()[:4] == b"PARE" for path in stored)
    unhidden = [path for path in files(both.plain) if path.suffix == ".parquet"]
    assert hits(unhidden, wanted)  # so the search itself finds what is there


def test_everything_is_private_and_logs_and_other_files_hold_no_embedding(both: Both) -> None:
    """Row 12 of the checklist, for a run with and one without encryption, and for what Ray wrote."""
    for config in (both.plain, both.encrypted):
        for path in (Path(config.out), *Path(config.out).rglob("*")):
            assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path
        others = [path for path in files(config) if path.suffix != ".parquet"]
        logs = [path for path in others if path.name in ("unveil.log", "run.json")]
        assert hits(others, slices(config, 1000)) == [] == hits(logs, names(config)[:1000])
    written = [path for path in both.session.rglob("*") if path.is_file() and not path.is_socket()]
    assert hits(written, [*slices(both.encrypted, 1000), *names(both.encrypted)[:1000]]) == []


def test_what_is_not_encrypted_is_what_the_run_says(both: Both) -> None:
    """No other file holds the name of an image."""
    left = [path for path in files(both.encrypted) if not in_clear(path, both.encrypted.out)]
    assert hits(left, names(both.encrypted)) == []


def test_keys_are_in_no_file_and_no_command_line(both: Both) -> None:
    held = Path(both.encrypted.out, "keys.json").read_bytes()
    secret = data_key(both.encrypted.encryption.key, held, "").secret
    forms = [form for key in (both.master, secret) for form in (key, key.hex().encode(), base64.b64encode(key))]
    written = [path for path in both.session.rglob("*") if path.is_file() and not path.is_socket()]
    assert written and hits([*written, *files(both.encrypted)], forms) == []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        assert not any(form in line for form in forms)


def test_pictures_of_the_report_carry_nothing_but_pixels(both: Both) -> None:
    """Row 16: no EXIF, comment or other segment of an application beside JFIF."""
    page = Path(both.plain.out, "report.html").read_text()
    pictures = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page)
    assert pictures
    for text in pictures:
        assert set(_segments(base64.b64decode(text))) <= {0xC0, 0xC2, 0xC4, 0xDB, 0xDD, 0xE0}


def _segments(data: bytes) -> Iterator[int]:
    """Markers of a JPEG file up to its pixels (ITU T.81, B.1.1)."""
    at = 2
    while data[at + 1] != 0xDA:
        yield data[at + 1]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def test_an_encrypted_run_says_what_stays_in_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("UNVEIL_TEST_KEY", os.urandom(32).hex())
    caplog.set_level("INFO")
    for reference in ("env:UNVEIL_TEST_KEY", ""):
        place = tmp_path / (reference[:3] or "plain")
        protect(*(Store(place, Cipher.at(place, reference)),) * 2)
        told = [record.getMessage() for record in caplog.records if "in clear" in record.getMessage()]
        assert len(told) == bool(reference) and all(one in told[0] for one in IN_CLEAR if reference)
        assert os.environ["UNVEIL_TEST_KEY"] not in caplog.text
        caplog.clear()


@pytest.mark.parametrize("key", ["", "other"])
def test_no_verb_works_without_the_key(both: Both, tmp_path: Path, key: str) -> None:
    (tmp_path / "other").write_bytes(os.urandom(32))
    (tmp_path / "other").chmod(0o600)
    config = load_again(both, f"encryption.key='{'file:' + str(tmp_path / key) if key else ''}'")
    before = {
        path: path.stat().st_mtime_ns for path in files(both.encrypted) if path.name not in ("unveil.log", ".lock")
    }
    for verb in ("run", "scan", "assess", "report", "verify", "clean"):
        with pytest.raises(EncryptionError, match=r"keys\.json"):
            audit(config, *(() if verb == "run" else (verb,)))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def load_again(both: Both, *overrides: str) -> AuditConfig:
    path = str(Path(both.encrypted.out).parent / "again.yaml")
    from pipeline.config import to_yaml

    Path(path).write_text(to_yaml(both.encrypted))
    return load(path, overrides)


def test_a_run_without_encryption_is_not_gone_on_with_a_key(both: Both) -> None:
    config = load_again(both, f"out={both.plain.out}")
    with pytest.raises(EncryptionError, match="made without encryption"):
        audit(config, "assess")
    assert not Path(both.plain.out, "keys.json").exists()


def test_a_purged_run_is_gone(both: Both, tmp_path: Path) -> None:
    """Row 13: the key goes at once, and nothing of names or embeddings is left."""
    shutil.copytree(both.encrypted.out, tmp_path / "encrypted")
    wanted = [*slices(both.encrypted, 1000), *names(both.encrypted)]
    config = load_again(both, f"out={tmp_path}/encrypted")
    purge(config)
    assert hits(files(config), wanted) == [] and len(files(config)) <= 2
    with pytest.raises(ClusterError):
        Run(config).commit("scan", "release")
