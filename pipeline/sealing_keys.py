"""Ed25519 keys in PEM files: the auditor's private key, which nobody else may read, and public keys."""

import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.files import write_new
from operators.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

LARGEST_KEY = 10_000


def private_key(path: Path) -> "Ed25519PrivateKey":
    """The key in the file, which is made if it is missing.

    Raises
    ------
    ConfigError
        If `cryptography` is not installed, others may read the file, or it holds no ed25519 key without a password.
    StorageError
        If it cannot be made.
    """
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not os.path.lexists(path):
        _make(path)
    try:
        key = load_pem_private_key(_own_file(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"seal.key: {path} holds no ed25519 key in PEM without a password.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"seal.key: {path} holds a key of another kind. Give an ed25519 key, or a new place for one.")
    return key


def public_key(path: Path) -> "Ed25519PublicKey":
    """The public key in the file; ConfigError as `private_key` raises it."""
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        with path.open("rb") as file:
            key = load_pem_public_key(file.read(LARGEST_KEY))
    except OSError as error:
        raise ConfigError(f"seal.public: {path} cannot be read ({error.strerror}).") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"seal.public: {path} holds no public key in PEM.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"seal.public: {path} holds a key of another kind. Give an ed25519 public key.")
    return key


def pem(key: "Ed25519PublicKey") -> bytes:
    """The public key as PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def fingerprint_of(key: "Ed25519PublicKey") -> str:
    """The first half of the SHA-256 of the raw public key, in groups of four hex digits."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    whole = hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()
    return ":".join(whole[at : at + 4] for at in range(0, 32, 4))


def _make(path: Path) -> None:
    """A new key, in a file that was not there; another process that makes it first is the one that counts."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _own_file(path: Path) -> bytes:
    """The bytes of a regular file that is its owner's alone."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise ConfigError(f"seal.key: {path} cannot be read ({error.strerror}).") from error
    with file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
            raise ConfigError(
                f"seal.key: {path} must be a regular file of yours that nobody else may read. If nobody has read it, "
                f"run chmod 600 on it; else give a new place, where another key is made."
            )
        return file.read(LARGEST_KEY)


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError("signatures need the package `cryptography`: pip install 'unveil[sign]'.") from error
