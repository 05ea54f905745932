"""The signed manifest of a run: SHA-256 of every result file, signed by ed25519 (RFC 8032) with a key of the auditor.

`seal.json` is the statement, `seal.sig` the raw signature of its bytes in base64, and `seal.pub` the public key (PEM).
A check with the public key inside the folder shows that nothing changed by accident; only one with a key that came by
another way shows who signed. The same check without this program (openssl 3, and any SHA-256):

    base64 -d seal.sig > sig; openssl pkeyutl -verify -rawin -in seal.json -sigfile sig -pubin -inkey seal.pub
"""

import base64
import binascii
import fnmatch
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.faults import IncompleteTable, StorageError
from cluster.storage import to_json, write_private
from operators.errors import ConfigError
from operators.sources import within
from pipeline import __version__
from pipeline.sealing_keys import fingerprint_of, pem, private_key, public_key
from pipeline.spreadsheet import visible

if TYPE_CHECKING:
    from pipeline.stage import Run

log = logging.getLogger(__name__)

CONTRACT = "seal/1"
STATEMENT, SIGNATURE, PUBLIC = "seal.json", "seal.sig", "seal.pub"
LEFT_OUT = (
    STATEMENT,
    SIGNATURE,
    PUBLIC,
    "run.json",  # every verb writes it, `verify` too; what it says at the time is part of the statement
    "*/run.json",
    "unveil.log",
    "*/unveil.log",
    "store/*",  # embeddings, named by their content and shared with other audits
    "search/tile-*",  # from which the parts of the search were made, which are sealed
    "models/*/search/tile-*",
    "plant/*search/tile-*",
    "clean/audit/*search/tile-*",
    "audience.key",  # a secret, made anew when it is deleted
    "purge-hold.json",  # says nothing of the results
    "purge-receipt.json",
    ".lock",
    "*/.lock",
    ".aside-*",
    "*/.aside-*",
)
"""Files of a run folder that are not results; patterns in which `*` crosses folders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SealConfig:
    """Signing a run."""

    key: str = "~/.config/unveil/seal.pem"
    """The private key, PEM, for its owner only (0600) and outside the run folder; made if it is missing."""
    public: str = ""
    """For `verify`: a public key that you have from the signer. Empty: the one in the run folder, which proves no
    origin."""

    @property
    def key_file(self) -> Path:
        """Where the private key is."""
        return Path(self.key).expanduser()

    @property
    def signer(self) -> Path | None:
        """Where the signer's public key is."""
        return Path(self.public).expanduser() if self.public else None

    def __post_init__(self) -> None:
        if not self.key:
            raise ValueError(f"key must name a file. Got {self.key!r}.")


class SealCheck(NamedTuple):
    """What became of a sealed folder."""

    signed: bool
    """Whether the signature is that of the statement by the given key."""
    signer: str
    """Fingerprint of the key that was asked."""
    trusted: bool
    """Whether that key was given from outside the folder."""
    changed: Sequence[str]
    missing: Sequence[str]
    added: Sequence[str]

    @property
    def whole(self) -> bool:
        """Whether the statement is signed and every file is as it says."""
        return self.signed and not (self.changed or self.missing or self.added)


def seal_run(run: "Run") -> None:
    """Seal the run folder with the key of the configuration; raises as `seal` does."""
    key = run.config.seal.key_file
    log.info("seal: signed by the key with the fingerprint %s", seal(run.folder, key))


def verify_seal(run: "Run") -> None:
    """Check the seal of the run folder, if there is one or a signer is named.

    Raises
    ------
    IncompleteTable
        If a file is not as it was sealed, the signature is not the signer's, or there is none; names every file.
    """
    signer = run.config.seal.signer
    if signer is None and not (run.folder / STATEMENT).exists():
        return
    found = check_seal(run.folder, signer)
    lines = seal_lines(found)
    if not found.whole:
        raise IncompleteTable("\n".join([f"{run.folder} is not as it was sealed:", *lines]))
    for line in lines:
        log.info("verify: %s", line)


def seal(folder: Path, key_file: Path) -> str:
    """Write and sign the manifest of a run folder; return the fingerprint of the public key.

    Raises
    ------
    ConfigError
        If `cryptography` is not installed, or the key lies in the folder, may be read by others, or is no ed25519 key.
    StorageError
        If a file cannot be read or written.
    """
    if within(str(key_file), str(folder)):
        raise ConfigError(f"seal.key: {key_file} lies in the run folder; who gets that could sign. Put it elsewhere.")
    key = private_key(key_file)
    files = {path: _digest(folder / path) for path in _results(folder, LEFT_OUT)}
    statement = {
        "contract": CONTRACT,
        "unveil": __version__,
        "sealed": datetime.now(UTC).isoformat(timespec="seconds"),
        "left_out": list(LEFT_OUT),
        "files": files,
        "record": _record(folder),
    }
    data = to_json(statement)
    (folder / SIGNATURE).unlink(missing_ok=True)  # a kill leaves no signature, not one of another statement
    write_private(folder / STATEMENT, data)
    write_private(folder / PUBLIC, pem(key.public_key()))
    write_private(folder / SIGNATURE, base64.b64encode(key.sign(data)) + b"\n")
    log.info("seal: %d files sealed in %s", len(files), folder)
    return fingerprint_of(key.public_key())


def check_seal(folder: Path, signer: Path | None = None) -> SealCheck:
    """Compare a folder with its seal; names every file that changed, is missing, or was added.

    Parameters
    ----------
    folder
        A sealed run folder.
    signer
        PEM of the signer's public key; None takes the one in the folder, which anybody could have put there.

    Raises
    ------
    IncompleteTable
        If the folder is not sealed, or the seal cannot be read.
    ConfigError
        If `cryptography` is not installed, or `signer` is no ed25519 public key.
    """
    data, signature = _read(folder / STATEMENT), _read(folder / SIGNATURE)
    key = public_key(signer or folder / PUBLIC)
    from cryptography.exceptions import InvalidSignature  # there, as the key could be read

    try:
        key.verify(base64.b64decode(signature.strip(), validate=True), data)
        signed = True
    except (InvalidSignature, binascii.Error):
        signed = False
    sealed, left_out = _statement(folder, data)
    there = set(_results(folder, left_out))
    return SealCheck(
        signed=signed,
        signer=fingerprint_of(key),
        trusted=signer is not None,
        changed=[path for path in sorted(sealed.keys() & there) if _digest(folder / path) != sealed[path]],
        missing=sorted(sealed.keys() - there),
        added=sorted(there - sealed.keys()),
    )


def seal_lines(check: SealCheck) -> list[str]:
    """The outcome in words, one line for each file that is not as sealed."""
    if not check.signed:
        lines = ["the signature is not that of seal.json by this key: the statement is not to be trusted"]
    elif not check.trusted:
        lines = [f"signed by the key in the folder, {check.signer}; give seal.public to know whose it is"]
    else:
        lines = [f"signed by the given key, {check.signer}"]
    for what, paths in (("changed", check.changed), ("missing", check.missing), ("added", check.added)):
        lines += [f"{what}: {visible(path)}" for path in paths]
    return [*lines, "every result file is as it was sealed"] if check.whole else lines


def _results(folder: Path, left_out: Sequence[str]) -> Iterator[str]:
    """All files of a folder but those left out, `/` separated; links are named, and never followed."""
    for root, folders, names in os.walk(folder, followlinks=False):
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*names, *linked]):
            path = (Path(root) / name).relative_to(folder).as_posix()
            if not any(fnmatch.fnmatchcase(path, pattern) for pattern in left_out):
                yield path


def _digest(path: Path) -> str:
    """SHA-256 of a regular file; of anything else what it is, which no digest equals."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return "not a regular file"
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        if path.is_symlink():
            return "a link"
        raise StorageError(f"{path}: cannot be read ({error.strerror}). Give access to it and try again.") from error


def _record(folder: Path) -> Any:
    """What `run.json` says at this time; None if there is none."""
    try:
        return json.loads((folder / "run.json").read_bytes())
    except (OSError, ValueError):
        return None


def _statement(folder: Path, data: bytes) -> tuple[Mapping[str, str], Sequence[str]]:
    try:
        found = json.loads(data)
        files, left_out, contract = found["files"], found["left_out"], found["contract"]
    except (ValueError, KeyError, TypeError) as error:
        raise IncompleteTable(f"{folder / STATEMENT}: not a statement of `unveil seal`. Seal the run again.") from error
    if contract != CONTRACT or not isinstance(files, dict) or not isinstance(left_out, list):
        raise IncompleteTable(f"{folder / STATEMENT}: needed is {CONTRACT}. Seal the run again.")
    return files, left_out


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IncompleteTable(f"{path}: {error.strerror}. Run `unveil seal` first.") from error
