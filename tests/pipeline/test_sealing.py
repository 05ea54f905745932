"""The signed manifest of a run: what changes after it is named, and nobody else can make one."""

import base64
import hashlib
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.faults import IncompleteTable
from operators.errors import ConfigError
from pipeline.sealing import SealConfig, check_seal, seal, seal_lines, seal_run, verify_seal

pytest.importorskip("cryptography")
FILES = (
    "summary.json",
    "assess/findings.parquet",
    "report.html",
    "clean/release/store/a.jpg",
    "name with\nnewline.csv",
)
ASIDE = (
    "run.json",
    "unveil.log",
    "store/embeddings/a.parquet",
    "search/tile-1.parquet",
    "models/m/search/tile-2.parquet",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*FILES, *ASIDE):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json.dumps({"stages": {}}).encode() if name == "run.json" else name.encode())
    return tmp_path / "run"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "seal.pem"


def test_a_sealed_folder_is_whole_and_the_statement_holds_every_digest(folder: Path, key: Path) -> None:
    signer = seal(folder, key)
    statement = json.loads((folder / "seal.json").read_bytes())
    assert statement["files"] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    assert statement["record"] == {"stages": {}}
    found = check_seal(folder)
    assert found.whole
    assert (found.signer, found.trusted) == (signer, False)
    assert seal_lines(found)[-1] == "every result file is as it was sealed"
    assert check_seal(folder, folder / "seal.pub").trusted
    for name in ASIDE:  # what goes on after the seal
        (folder / name).write_text("changed")
    assert check_seal(folder).whole


def test_every_changed_missing_or_added_file_is_named(folder: Path, key: Path) -> None:
    seal(folder, key)
    (folder / FILES[0]).write_text("other")
    (folder / FILES[1]).unlink()
    (folder / "search/more.parquet").write_text("new")
    (folder / FILES[2]).unlink()
    (folder / FILES[2]).symlink_to("/etc/hostname")
    (folder / "linked").symlink_to("/etc")
    os.mkfifo(folder / "pipe")
    (folder / FILES[4]).write_text("other")
    found = check_seal(folder)
    assert found.signed
    assert not found.whole
    assert found.changed == sorted([FILES[0], FILES[2], FILES[4]])
    assert found.missing == [FILES[1]]
    assert found.added == ["linked", "pipe", "search/more.parquet"]
    lines = seal_lines(found)
    assert "missing: assess/findings.parquet" in lines
    assert r"changed: name with\u000anewline.csv" in lines
    assert "every result file is as it was sealed" not in lines


def test_a_changed_statement_or_another_signer_is_told(folder: Path, key: Path, tmp_path: Path) -> None:
    seal(folder, key)
    shutil.copy(folder / "seal.pub", tmp_path / "mine.pub")
    (folder / FILES[0]).write_text("forged")
    forged = json.loads((folder / "seal.json").read_bytes())
    forged["files"][FILES[0]] = hashlib.sha256(b"forged").hexdigest()
    whole = (folder / "seal.json").read_bytes()
    (folder / "seal.json").write_text(json.dumps(forged))
    assert not check_seal(folder).signed
    assert "not to be trusted" in seal_lines(check_seal(folder))[0]
    (folder / "seal.json").write_bytes(whole)
    seal(folder, tmp_path / "others.pem")  # signed anew by somebody else, after the change
    assert check_seal(folder).whole
    found = check_seal(folder, tmp_path / "mine.pub")
    assert not found.signed
    assert not found.whole


def test_verify_refuses_what_is_not_as_sealed(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def run(**options: str) -> Any:
        return SimpleNamespace(folder=folder, config=SimpleNamespace(seal=SealConfig(**options)))

    verify_seal(run())  # neither sealed nor said to be
    with pytest.raises(IncompleteTable, match="unveil seal"):
        verify_seal(run(public=str(folder / "seal.pub")))
    seal_run(run(key=str(tmp_path / "a.pem")))
    verify_seal(run())
    assert "every result file is as it was sealed" in caplog.text
    (folder / FILES[0]).write_text("other")
    with pytest.raises(IncompleteTable, match=f"(?s)not as it was sealed.*changed: {FILES[0]}"):
        verify_seal(run())


@pytest.mark.parametrize("signature", [b"", b"not base64 !", base64.b64encode(bytes(64)), b"\xff\xfe", b"AAAA"])
def test_what_is_no_signature_signs_nothing(folder: Path, key: Path, signature: bytes) -> None:
    seal(folder, key)
    (folder / "seal.sig").write_bytes(signature)
    assert not check_seal(folder).signed


def test_every_flipped_bit_of_the_statement_breaks_the_signature(folder: Path, key: Path) -> None:
    seal(folder, key)
    data = (folder / "seal.json").read_bytes()
    for at in range(0, len(data), 97):
        (folder / "seal.json").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            assert not check_seal(folder).signed
        except IncompleteTable as error:
            assert "seal" in str(error)


def test_openssl_agrees(folder: Path, key: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    seal(folder, key)
    (tmp_path / "sig").write_bytes(base64.b64decode((folder / "seal.sig").read_bytes()))
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-in", str(folder / "seal.json"), "-sigfile"]
    command += [str(tmp_path / "sig"), "-pubin", "-inkey", str(folder / "seal.pub")]
    assert b"Verified Successfully" in subprocess.run(command, capture_output=True, check=True).stdout


def test_the_key_is_made_once_private_and_never_logged(
    folder: Path, key: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    first = seal(folder, key)
    assert (key.stat().st_mode & 0o777, key.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    secret = key.read_bytes()
    assert seal(folder, key) == first
    assert key.read_bytes() == secret
    assert [path.name for path in key.parent.iterdir()] == ["seal.pem"]
    assert {(folder / name).stat().st_mode & 0o777 for name in ("seal.json", "seal.sig", "seal.pub")} == {0o600}
    line = secret.split(b"\n")[1]
    assert line.decode() not in caplog.text
    assert not [path for path in folder.rglob("*") if path.is_file() and line in path.read_bytes()]


def test_a_key_that_others_could_have_is_refused(folder: Path, key: Path, tmp_path: Path) -> None:
    seal(folder, key)
    key.chmod(0o640)
    with pytest.raises(ConfigError, match="nobody else may read"):
        seal(folder, key)
    with pytest.raises(ConfigError, match="lies in the run folder"):
        seal(folder, folder / "sub" / "seal.pem")
    assert not (folder / "sub").exists()
    (tmp_path / "text").write_text("no key")
    (tmp_path / "text").chmod(0o600)
    with pytest.raises(ConfigError, match="holds no ed25519 key"):
        seal(folder, tmp_path / "text")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot be read"):
        seal(folder, tmp_path / "gone")


def test_keys_of_another_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    other = ec.generate_private_key(ec.SECP256R1())
    path = tmp_path / "ec.pem"
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="another kind"):
        seal(folder, path)
    seal(folder, tmp_path / "seal.pem")
    path.write_bytes(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ConfigError, match="another kind"):
        check_seal(folder, path)
    with pytest.raises(ConfigError, match="cannot be read"):
        check_seal(folder, tmp_path / "nothing")


def test_a_folder_without_a_seal_is_told(folder: Path, key: Path) -> None:
    with pytest.raises(IncompleteTable, match="unveil seal"):
        check_seal(folder)
    seal(folder, key)
    for text in ("[]", "{}", "no json", '{"files": {}, "left_out": [], "contract": "seal/9"}'):
        (folder / "seal.json").write_text(text)
        with pytest.raises(IncompleteTable, match="Seal the run again"):
            check_seal(folder)


def test_the_options_name_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SealConfig().key_file == tmp_path / ".config/unveil/seal.pem"
    assert SealConfig().signer is None
    assert SealConfig(public="~/a.pub").signer == tmp_path / "a.pub"
    with pytest.raises(ValueError, match=r"^key .*Got"):
        SealConfig(key="")
