"""Encrypted parts of a store: Parquet modular encryption, uniform, AES-256-GCM, one key for each part.

A part is encrypted with a key of its own and bound to the whole of its marker and to the name of its folder (the AAD
prefix, which is not in the file). A reader therefore refuses a part that was cut short, changed in a bit, exchanged for
another, or replaced by one without encryption, and one whose marker was changed. Any Parquet reader that is given key
and AAD prefix reads the file.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.faults import EncryptionError, IncompleteTable
from cluster.files import write_new
from cluster.keys import CONTRACT, KEYS, LARGEST_KEY_FILE, DataKey, data_key, new_keys, settled
from cluster.objects import ObjectFolder

MAGIC = b"PARE"
"""How a Parquet file with an encrypted footer begins (Parquet format, Encryption.md)."""


@dataclass(frozen=True, slots=True)
class Cipher:
    """How the parts of a run folder or store are encrypted; it names the keys and holds none."""

    reference: str
    """Of the master key (`cluster.keys`); empty: parts are not encrypted."""
    scope: str
    """Folder or address with the wrapped data key."""

    @classmethod
    def at(cls, place: str | Path, reference: str) -> "Cipher":
        """That of `place`, whose data key is in the nearest `keys.json` there or above, or will be made there.

        So audits within the folder of another one, such as that of a cleaned release, share its key.
        """
        if isinstance(place, str) and "://" in place:
            return cls(settled(reference), place.rstrip("/"))
        folder = Path(place).resolve()
        found = folder if (folder / KEYS).is_file() else next(filter(has_key, folder.parents), folder)
        return cls(settled(reference), str(found))

    def covering(self, place: str | Path) -> "Cipher":
        """The same if `place` lies within its scope, else that of `place`."""
        remote = isinstance(place, str) and "://" in place
        if not remote and "://" not in self.scope and Path(place).resolve().is_relative_to(self.scope):
            return self
        return Cipher.at(place, self.reference)

    @property
    def on(self) -> bool:
        """Whether parts are encrypted."""
        return bool(self.reference)

    def like(self, other: "Cipher | None") -> bool:
        """Whether a part of the other's can be taken over as it is."""
        return self == other or not (self.on or (other is not None and other.on))

    @property
    def shown(self) -> str:
        """The file with the wrapped data key."""
        return f"{self.scope}/{KEYS}"

    def keys(self) -> bytes | None:
        """The content of that file, or None."""
        try:
            if "://" in self.scope:
                return ObjectFolder(self.scope).get(KEYS)
            return Path(self.scope, KEYS).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EncryptionError(f"{self.shown}: cannot be read ({error.strerror}). Give access to it.") from error

    def make_key(self) -> None:
        """Make sure that there is a data key that the master key opens, if parts are to be encrypted.

        Raises
        ------
        EncryptionError
            If the master key is missing, another one, or lies within the scope; if there are tables without encryption;
            or if parts are not to be encrypted in a place that has a data key.
        """
        there = self.keys()
        if not self.on:
            if there is not None:
                raise EncryptionError(
                    f"{self.shown}: the tables here are encrypted, and encryption.key is empty. Give the key."
                )
            return
        if there is None:
            self._make_keys()
        self.data_key()

    def _make_keys(self) -> None:
        if _inside(self.reference, self.scope):
            raise EncryptionError(f"encryption.key lies in {self.scope}, which it protects. Put it elsewhere.")
        made = new_keys(self.reference)
        if "://" in self.scope:
            ObjectFolder(self.scope).put(KEYS, made)
            return
        if next(Path(self.scope).rglob("*.commit.json"), None) is not None:
            raise EncryptionError(
                f"{self.scope} holds tables that were made without encryption, or whose {KEYS} is gone. `unveil purge` "
                f"without encryption.key removes them; or give a new `out` and `store`."
            )
        write_new(Path(self.scope, KEYS), made)

    def data_key(self) -> DataKey:
        """The data key; EncryptionError if its file is gone, or cannot be opened with the master key."""
        keys = self.keys()
        if keys is None:
            raise EncryptionError(
                f"{self.shown} is gone, and with it the key of all encrypted tables there (`unveil purge` destroys "
                f"it). Restore the file, or remove the tables and run again."
            )
        return data_key(self.reference, keys, self.shown)


def has_key(folder: Path) -> bool:
    """Whether `folder` holds a wrapped data key: other programs have files called `keys.json`, too."""
    try:
        with (folder / KEYS).open("rb") as file:
            held = json.loads(file.read(LARGEST_KEY_FILE))
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and held.get("contract") == CONTRACT


def check_downgrade(cipher: Cipher | None, *, encrypted: bool, shown: str) -> None:
    """EncryptionError if the part `shown` is encrypted and must not be, or the other way."""
    if encrypted and not (cipher and cipher.on):
        raise EncryptionError(f"{shown} is encrypted, and encryption.key is empty. Give the key that it was made with.")
    if cipher and cipher.on and not encrypted:
        raise EncryptionError(
            f"{shown} is not encrypted, and encryption.key is set. `unveil purge` without the key removes what was "
            f"made without one; or give a new `out` and `store`."
        )


def encrypted(table: pa.Table, key: DataKey, about: Mapping[str, Any], place: str) -> bytes:
    """The bytes of `table` as part with the marker `about` in the folder called `place`."""
    sink = pa.BufferOutputStream()
    properties = encryption_functions().create_encryption_properties(
        _part_key(key, about, place),
        aad_prefix=_bound_to(about, place),
        store_aad_prefix=False,
        encryption_algorithm="AES_GCM_V1",
    )
    pq.write_table(table, sink, compression="zstd", encryption_properties=properties)
    return bytes(sink.getvalue().to_pybytes())


def decrypted(
    data: bytes,
    cipher: Cipher | None,
    about: Mapping[str, Any],
    place: tuple[str, str],
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """The table of an encrypted part, or some of its columns.

    Parameters
    ----------
    data, cipher, about
        Content of the file, whose key opens it, and what its marker says.
    place
        Name of the folder, which the part is bound to, and the file's for messages.
    columns
        None for all.

    Raises
    ------
    EncryptionError
        If the data key is not the part's.
    IncompleteTable
        If the bytes, the marker or the folder are not those that were committed.
    """
    key = cipher.data_key() if cipher else None
    if key is None or key.id != about["encrypted"]:
        raise EncryptionError(
            f"{place[1]}: encrypted with the data key {about['encrypted']}, which is not the one here: that was "
            f"destroyed or is another run's. Remove the table and run its stage again."
        )
    properties = encryption_functions().create_decryption_properties(
        _part_key(key, about, place[0]), aad_prefix=_bound_to(about, place[0]), allow_plaintext_files=False
    )
    wanted = None if columns is None else list(columns)
    try:
        if data[:4] != MAGIC:  # which the library does not look at
            raise pa.ArrowInvalid("not an encrypted Parquet file")
        return pq.read_table(pa.BufferReader(data), columns=wanted, decryption_properties=properties)
    except (OSError, pa.ArrowException) as error:
        raise IncompleteTable(
            f"{place[1]}: cannot be decrypted: its bytes, its marker or its folder are not those of the commit. Delete "
            f"it and run its stage again."
        ) from error


def _inside(path: str, folder: str) -> bool:
    """Whether a reference `file:PATH` leads into a folder: who gets that would have the key."""
    kind, _, place = settled(path).partition(":")
    return kind == "file" and "://" not in folder and Path(os.path.realpath(place)).is_relative_to(folder)


def _part_key(key: DataKey, about: Mapping[str, Any], place: str) -> bytes:
    """One key for one content: a part that is written twice may get the same one, with other nonces."""
    return key.part_key(json.dumps([place, about["name"], about["sha256"]], ensure_ascii=True).encode())


def _bound_to(about: Mapping[str, Any], place: str) -> bytes:
    """Digest of all that the marker says, as it is after being written and read."""
    said = json.loads(json.dumps({**about, "place": place}))
    return hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=True).encode()).digest()


def encryption_functions() -> Any:
    """The functions of pyarrow; EncryptionError if this version or build has none."""
    try:
        import pyarrow.parquet.encryption as functions
    except ImportError as error:
        raise EncryptionError("this build of pyarrow has no Parquet encryption. Install one of PyPI.") from error
    if not hasattr(functions, "create_encryption_properties"):
        raise EncryptionError(f"encryption.key needs pyarrow 26 or newer, found {pa.__version__}. Upgrade it.")
    return functions
