import base64
import hashlib
import hmac
import json
import os
import pickle
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import keys
from cluster.faults import EncryptionError
from cluster.keys import EncryptionConfig, data_key, forget_keys, master_key, new_keys

MASTER = bytes(range(100, 164, 2))


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    forget_keys()
    yield
    forget_keys()


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, no salt, 32 bytes, written out."""
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def key_file(folder: Path, data: bytes, mode: int = 0o600) -> str:
    path = folder / "master.key"
    path.write_bytes(data)
    path.chmod(mode)
    return f"file:{path}"


@pytest.mark.parametrize(
    "data", [MASTER, MASTER.hex().encode(), MASTER.hex().upper().encode() + b"\n", base64.b64encode(MASTER) + b"\r\n"]
)
def test_a_key_file_is_raw_hex_or_base64(tmp_path: Path, data: bytes) -> None:
    assert master_key(key_file(tmp_path, data)) == MASTER


def test_a_key_comes_from_a_variable_or_a_command_without_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNVEIL_TEST_KEY", MASTER.hex())
    assert master_key("env:UNVEIL_TEST_KEY") == MASTER
    script = tmp_path / "kms.py"
    script.write_text("import sys\nprint(sys.argv[1])\n")
    shown = base64.b64encode(MASTER).decode()
    assert master_key(f"command:{sys.executable} {script} '{shown}'") == MASTER
    forget_keys()
    touched = tmp_path / "touched"
    with pytest.raises(EncryptionError, match="holds no key of 32 bytes"):
        master_key(f"command:{sys.executable} {script} x; touch {touched}")
    assert not touched.exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622, 0o660])
def test_a_key_file_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(EncryptionError, match="nobody else may read"):
        master_key(key_file(tmp_path, MASTER, mode))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (MASTER[:31], "no key of 32 bytes"),
        (MASTER + b"\0", "no key of 32 bytes"),
        (MASTER[:16].hex().encode(), "is a password and no key"),
        (b"", "no key of 32 bytes"),
        (b"z" * 64, "no key of 32 bytes"),
        (b"correct horse battery staple 123", "is a password and no key"),
    ],
)
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(EncryptionError, match=said) as caught:
        master_key(key_file(tmp_path, data))
    assert not data or data.decode("latin-1") not in str(caught.value)


def test_faults_name_the_reference_and_the_remedy(tmp_path: Path) -> None:
    for reference, said in (
        (f"file:{tmp_path}/none", "cannot be read .No such file"),
        (f"file:{tmp_path}", "cannot be read .Is a directory"),
        ("env:UNVEIL_NOT_SET", "UNVEIL_NOT_SET is not set .* on every node"),
        (f"command:{tmp_path}/none --token secret", "cannot be run .FileNotFoundError"),
        ("command:false --token secret", "ended with code 1"),
        ("command:'unfinished", "cannot be run .ValueError"),
    ):
        with pytest.raises(EncryptionError, match=said) as caught:
            master_key(reference)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", [MASTER.hex(), "file", "file:", "env: ", "http:x"])
def test_a_reference_that_is_none_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ValueError, match=r"^key must be `file:PATH`") as caught:
        EncryptionConfig(key=text)
    assert MASTER.hex() not in str(caught.value)


def test_a_data_key_is_wrapped_as_rfc_3394_says_and_opens_with_its_master_only(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.keywrap import aes_key_unwrap

    reference = key_file(tmp_path, MASTER)
    held = new_keys(reference)
    found = json.loads(held)
    wrapping = hkdf(MASTER, b"unveil data key/1 " + found["id"].encode())
    secret = aes_key_unwrap(wrapping, base64.b64decode(found["wrapped"]))
    opened = data_key(reference, held, "keys.json")
    assert (opened.id, opened.secret) == (found["id"], secret)
    assert opened.part_key(b"part") == hkdf(secret, b"unveil part key/1 part")
    assert new_keys(reference) != held and MASTER not in held and secret not in held
    forget_keys()
    key_file(tmp_path, bytes(reversed(MASTER)))
    with pytest.raises(EncryptionError, match="this is another key"):
        data_key(reference, held, "keys.json")


@pytest.mark.parametrize("change", ["id", "wrapped", "contract", "cut", "zeros"])
def test_a_changed_keys_file_is_refused(tmp_path: Path, change: str) -> None:
    reference = key_file(tmp_path, MASTER)
    held = json.loads(new_keys(reference))
    other = json.loads(new_keys(reference))
    data = json.dumps({**held, change: other[change] if change != "contract" else "keys/2"} if change in held else held)
    damaged = {"cut": data[:-5], "zeros": "\0" * len(data)}.get(change, data).encode()
    with pytest.raises(EncryptionError, match=r"keys\.json: (cannot be opened|holds no data key)"):
        data_key(reference, damaged, "keys.json")


def test_keys_are_neither_shown_nor_pickled(tmp_path: Path) -> None:
    reference = key_file(tmp_path, MASTER)
    opened = data_key(reference, new_keys(reference), "keys.json")
    assert opened.secret.hex() not in repr(opened) and repr(opened.secret)[2:-1] not in repr(opened)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(opened)


def test_who_resolves_a_key_leaves_no_core_dump(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (limits[1], limits[1]))
        master_key(key_file(tmp_path, MASTER))
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limits)


def test_a_relative_file_means_the_same_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert keys.settled("file:a/key") == f"file:{tmp_path}/a/key"
    assert keys.settled("file:~/key") == f"file:{os.path.expanduser('~')}/key"
    assert keys.settled("env:A") == "env:A"
