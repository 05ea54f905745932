"""Keys of encrypted tables.

    master key    32 bytes that the user keeps: in a file, a variable, or what a command prints (a KMS); never written
    └ data key    random, of one run folder or shared store; its `keys.json` has it wrapped (RFC 3394) with a key made
      │           from the master key: destroying that file makes all that it encrypts unreadable, and nothing else
      └ part key  HKDF-SHA256 (RFC 5869) of the data key and of what the part is; no two contents share one

Processes are handed a *reference* to the master key (`file:`, `env:`, `command:`) and resolve it themselves. Keys stay
in their memory: they are no attribute of anything that is pickled, logged or shown, and a process that has resolved one
leaves no core dump.
"""

import base64
import binascii
import json
import os
import resource
import secrets
import shlex
import stat
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from cluster.faults import EncryptionError

KEYS = "keys.json"
"""The file with the wrapped data key of a run folder or store."""
CONTRACT = "keys/1"
KEY_BYTES = 32
COMMAND_SECONDS = 60.0
LARGEST_KEY_FILE = 4096

_KINDS = ("file", "env", "command")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncryptionConfig:
    """Encryption at rest of tables and embeddings."""

    key: str = ""
    """The master key of 32 bytes: `file:PATH` (for its owner only; raw, hex or base64), `env:NAME` (hex or base64), or
    `command:PROGRAM ARGUMENTS`, which prints it (hex or base64; no shell). Empty: tables are not encrypted."""

    def __post_init__(self) -> None:
        kind, colon, rest = self.key.partition(":")
        if self.key and (kind not in _KINDS or not colon or not rest.strip()):  # not shown: it may be a key
            raise ValueError(
                "key must be `file:PATH`, `env:NAME` or `command:PROGRAM ARGUMENTS`, and never the key itself. Got "
                "something else."
            )


@dataclass(frozen=True, slots=True)
class DataKey:
    """A random key of 32 bytes, and its name, which is no secret."""

    id: str
    secret: bytes = field(repr=False)

    def __reduce__(self) -> Any:
        raise TypeError("keys are not pickled: every process resolves its own.")

    def part_key(self, what: bytes) -> bytes:
        """The key (32 bytes) of the part that `what` names."""
        return _derived(self.secret, b"unveil part key/1 " + what)


def settled(reference: str) -> str:
    """The reference as it means the same in every process: a relative file becomes absolute."""
    kind, _, rest = reference.partition(":")
    return f"file:{Path(rest).expanduser().absolute()}" if kind == "file" else reference


def new_keys(reference: str) -> bytes:
    """The content of a `keys.json` with a new data key, wrapped with the master key; raises as `master_key` does."""
    name, secret = secrets.token_hex(16), secrets.token_bytes(KEY_BYTES)
    keywrap = _keywrap()
    wrapped = base64.b64encode(keywrap.aes_key_wrap(_wrapping(reference, name), secret)).decode()
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"contract": CONTRACT, "id": name, "made": made, "wrapped": wrapped}, indent=2).encode() + b"\n"


@lru_cache(maxsize=64)
def data_key(reference: str, keys: bytes, shown: str) -> DataKey:
    """The data key in the content `keys` of the file called `shown`.

    Raises
    ------
    EncryptionError
        If the master key cannot be resolved, is another one, or the file is damaged.
    """
    keywrap = _keywrap()
    try:
        held = json.loads(keys)
        name, wrapped = str(held["id"]), base64.b64decode(held["wrapped"], validate=True)
        if held["contract"] != CONTRACT:
            raise ValueError(f"contract {held['contract']}")
    except (ValueError, KeyError, TypeError) as error:
        raise EncryptionError(f"{shown}: holds no data key of {CONTRACT}. Restore the file from a backup.") from error
    try:
        return DataKey(name, keywrap.aes_key_unwrap(_wrapping(reference, name), wrapped))
    except (keywrap.InvalidUnwrap, ValueError) as error:
        raise EncryptionError(
            f"{shown}: cannot be opened with encryption.key = {named(reference)}: this is another key, or the file was "
            f"changed. Give the key that the tables were made with."
        ) from error


@cache
def master_key(reference: str) -> bytes:
    """The 32 bytes that `reference` leads to, in this process; kept for its lifetime, which leaves no core dump.

    Raises
    ------
    EncryptionError
        If there is no key, others may read its file, its command fails, or it is not 32 random bytes.
    """
    no_core_dumps()
    kind, _, rest = settled(reference).partition(":")
    key = {"file": _from_file, "env": _from_variable, "command": _from_command}[kind](rest)
    if key.isascii() and key.decode("ascii").isprintable():
        raise EncryptionError(
            f"encryption.key: {named(reference)} holds a text of 32 characters, which is a password and no key. Make "
            f"one: openssl rand -hex 32."
        )
    return key


def forget_keys() -> None:
    """Drop all keys that this process holds."""
    data_key.cache_clear()
    master_key.cache_clear()


def no_core_dumps() -> None:
    """Let neither this process nor those it starts write core dumps: they would hold keys and embeddings."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def named(reference: str) -> str:
    """The reference for messages; of a command only the program, whose arguments may be private."""
    kind, _, rest = reference.partition(":")
    return f"command:{rest.split()[0]} ..." if kind == "command" else reference


def _from_file(place: str) -> bytes:
    try:
        with os.fdopen(os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o077 or about.st_uid not in (0, os.geteuid()):
                raise EncryptionError(
                    f"encryption.key: {place} must be a regular file of yours that nobody else may read or write. If "
                    f"nobody has read it, run chmod 600 on it; else make another key."
                )
            data = file.read(LARGEST_KEY_FILE)
    except OSError as error:
        raise EncryptionError(
            f"encryption.key: {place} cannot be read ({error.strerror}). It must be there on every machine that works."
        ) from error
    return data if len(data) == KEY_BYTES else _decoded(data, f"file:{place}")


def _from_variable(name: str) -> bytes:
    text = os.environ.get(name)
    if text is None:
        raise EncryptionError(
            f"encryption.key: the variable {name} is not set in this process. Set it before the run starts; on a "
            f"cluster, on every node before Ray starts there."
        )
    return _decoded(text.encode(), f"env:{name}")


def _from_command(line: str) -> bytes:
    try:
        words = shlex.split(line)
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_SECONDS)  # noqa: S603
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise EncryptionError(
            f"encryption.key: {named('command:' + line)} cannot be run ({type(error).__name__}). Run it by hand."
        ) from None
    if done.returncode:
        raise EncryptionError(
            f"encryption.key: {named('command:' + line)} ended with code {done.returncode}. Run it by hand to see why."
        )
    return _decoded(done.stdout, f"command:{line}")


def _decoded(data: bytes, reference: str) -> bytes:
    """32 bytes from hex or base64; the text is never shown."""
    text = data.strip()
    try:
        key = (
            bytes.fromhex(text.decode("ascii")) if len(text) == 2 * KEY_BYTES else base64.b64decode(text, validate=True)
        )
    except (ValueError, binascii.Error):
        key = b""
    if len(key) != KEY_BYTES:
        raise EncryptionError(
            f"encryption.key: {named(reference)} holds no key of {KEY_BYTES} bytes (64 hex digits, or 44 characters of "
            f"base64). Make one: openssl rand -hex {KEY_BYTES}."
        )
    return key


def _wrapping(reference: str, name: str) -> bytes:
    """The key that wraps the data key called `name`."""
    return _derived(master_key(reference), b"unveil data key/1 " + name.encode())


def _derived(secret: bytes, info: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def _keywrap() -> Any:
    try:
        from cryptography.hazmat.primitives import keywrap
    except ModuleNotFoundError as error:
        raise EncryptionError(
            "encryption.key needs the package `cryptography`: pip install 'unveil[encryption]'."
        ) from error
    return keywrap
