"""Committed Parquet: what one stage hands to the next.

A part is written aside, moved into place, and only then gets its marker `<name>.commit.json`; a reader that finds no
marker, or bytes that differ from the marker's SHA-256, refuses. A kill at any point therefore leaves either a complete
part or nothing that a reader would accept, and writing the same part twice is harmless.

A store may also be a prefix of object storage (`s3://bucket/prefix`, `gs://...`), which has no rename. There the data
object is named by its content, `<name>-<digest>.parquet`, and comes before the marker, which is replaced in one step:
of two writers of a part, even of different bytes, one wins, and either's part is whole. An earlier version of a part
stays committed until the marker of the new one is there. What a killed writer left is swept.

Folders are private (0700) and files too (0600): embeddings are biometric data. With a `Cipher` parts are encrypted; a
marker stays in clear, and its SHA-256 is that of the part before encryption, so that what is named by content has the
same names either way, and two writers of one content write one marker.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.encrypted_parts import Cipher, check_downgrade, decrypted, encrypted
from cluster.faults import IncompleteTable, StorageError
from cluster.files import ASIDE as ASIDE
from cluster.files import private_folder as private_folder
from cluster.files import to_json as to_json
from cluster.files import write_private as write_private
from cluster.objects import ObjectFolder

MARKER = ".commit.json"
STALE_S = 86_400.0
"""Data in object storage that nobody committed for so long is a killed writer's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What a marker promises about one part."""

    name: str
    contract: str
    """Name and version of the table's schema."""
    key: str
    """Digest of everything that the part was computed from."""
    rows: int
    bytes: int
    sha256: str
    facts: Mapping[str, Any]
    """Small JSON values about the part, such as counts."""
    encrypted: str = ""
    """Name of the data key; empty: the part is not encrypted. `bytes` and `sha256` are of the part without that."""

    def marker(self) -> dict[str, Any]:
        """What is written into the marker."""
        values = asdict(self)
        return values if self.encrypted else {name: value for name, value in values.items() if name != "encrypted"}


class Store:
    """A private folder of committed parts, or a prefix of object storage with such."""

    def __init__(self, root: "Place", cipher: Cipher | None = None) -> None:
        """Name the place, a path, an address or a store; it is made when something is written.

        Parts are encrypted as `cipher` says, by default that of a given store.

        Raises
        ------
        StorageError
            If the address is not one of `cluster.objects.SCHEMES`, or holds credentials.
        """
        place, known = (root._place, root.cipher) if isinstance(root, Store) else (root, None)
        remote = isinstance(place, str) and "://" in place
        self._place: str | Path = place
        self._objects = ObjectFolder(str(place)) if remote else None
        self._root: Path | None = None if remote else Path(place)
        self.cipher: Cipher | None = cipher or known

    def __reduce__(self) -> Any:
        return Store, (self.address, self.cipher)

    @property
    def root(self) -> Path:
        """The folder; StorageError if the store is in object storage."""
        if self._root is None:
            raise StorageError(f"{self.address}: this needs a folder on this machine, not object storage.")
        return self._root

    @property
    def address(self) -> str:
        """What `Store` takes to mean this place in every process: an absolute path, or an address."""
        return self._objects.address if self._objects else str(self.root.resolve())

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rpartition("/")[2]

    def child(self, name: str) -> "Store":
        """The store in the sub-folder `name`."""
        return Store(f"{self._objects.address}/{name}" if self._objects else self.root / name, self.cipher)

    @property
    def parent(self) -> "Store":
        """The store that this one is a child of."""
        return Store(self._objects.address.rpartition("/")[0] if self._objects else self.root.parent, self.cipher)

    def make_key(self) -> None:
        """Make sure that there is the data key that parts here are encrypted with; raises as `Cipher.make_key`."""
        if self.cipher is not None:
            self.cipher.make_key()

    def commit(
        self, name: str, table: pa.Table, *, contract: str, key: str, facts: Mapping[str, Any] | None = None
    ) -> Commit:
        """Write `table` as part `name`, replacing an earlier one, and return its marker."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        data_key = self.cipher.data_key() if self.cipher and self.cipher.on else None
        made = Commit(
            name=name,
            contract=contract,
            key=key,
            rows=table.num_rows,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            facts=dict(facts or {}),
            encrypted=data_key.id if data_key else "",
        )
        if data_key is not None:
            data = encrypted(table, data_key, made.marker(), self.name)
        if self._objects is None:  # data of the same name is replaced: the old marker must not vouch for it
            private_folder(self.root)
            (self.root / f"{name}{MARKER}").unlink(missing_ok=True)
        self.note(self._data(made), data)
        self.note(f"{name}{MARKER}", to_json(made.marker()))
        return made

    def find(self, name: str) -> Commit | None:
        """The marker of part `name`, or None if the part is not committed, or its data was deleted from this machine.

        EncryptionError if the part is encrypted and this store is not, or the other way.
        """
        marker = f"{name}{MARKER}"
        try:
            made = Commit(**json.loads(self._get(marker)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise IncompleteTable(
                f"{self._shown(marker)}: the commit marker cannot be read ({error}). Delete it and run again."
            ) from error
        if made.name != name:  # or another part, with its own marker, would be read in the place of this one
            raise IncompleteTable(
                f"{self._shown(marker)}: the commit marker is that of {made.name!r}. Delete it and run again."
            )
        if self._objects is None and not (self.root / self._data(made)).exists():
            return None
        check_downgrade(self.cipher, encrypted=bool(made.encrypted), shown=self._shown(f"{name}.parquet"))
        return made

    def read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The committed table `name`, or only some of its columns.

        Raises
        ------
        IncompleteTable
            If it was never committed, or its bytes differ from the committed ones.
        EncryptionError
            If it is encrypted with another key than this store's, or is encrypted and must not be, or the other way.
        """
        made = self.find(name)
        if made is None:
            raise IncompleteTable(f"{self._shown(name)}.parquet: not committed. Run the stage that writes it.")
        path = self._shown(self._data(made))
        try:
            data = self._get(self._data(made))
        except OSError as error:
            raise IncompleteTable(f"{path}: committed but not readable ({error}). Run its stage again.") from error
        if made.encrypted:
            return decrypted(data, self.cipher, made.marker(), (self.name, path), columns)
        if hashlib.sha256(data).hexdigest() != made.sha256:
            raise IncompleteTable(f"{path}: bytes differ from the committed ones. Delete it and run its stage again.")
        return pq.read_table(pa.BufferReader(data), columns=None if columns is None else list(columns))

    def note(self, name: str, data: bytes) -> None:
        """Write or replace a small file beside the parts, in one step; names that begin with `ASIDE` are swept."""
        if self._objects:
            self._objects.put(name, data)
        else:
            write_private(self.root / name, data)

    def noted(self, name: str) -> bytes | None:
        """What `note` wrote, or None."""
        try:
            return self._get(name)
        except FileNotFoundError:
            return None

    def forget(self, name: str) -> None:
        """Remove what `note` wrote, if it is there."""
        if self._objects:
            self._objects.delete(name)
        else:
            (self.root / name).unlink(missing_ok=True)

    def remove(self, name: str) -> bool:
        """Remove the part `name`, the marker first; whether it was committed."""
        made = self.find(name)
        self.forget(f"{name}{MARKER}")
        self.forget(f"{name}.parquet" if made is None else self._data(made))
        return made is not None

    def sweep(self) -> int:
        """Remove what killed writers left; return how many files and folders. Call it only while nothing is writing.

        In object storage, data that no marker names goes when it is `STALE_S` old: another machine may be writing.
        """
        left = list(self._left())
        for name in left:
            folder = None if self._root is None else self._root / name
            if folder is not None and folder.is_dir() and not folder.is_symlink():  # a report that was being published
                shutil.rmtree(folder)
            else:
                self.forget(name)
        return len(left)

    def _left(self) -> Iterator[str]:
        if self._objects is None:
            yield from (path.name for path in self.root.glob(f"{ASIDE}*"))
            return
        found = dict(self._objects.names())
        for name, written in found.items():
            part, dash, _ = name.rpartition("-")
            if name.startswith(ASIDE):
                yield name
            elif name.endswith(".parquet") and dash and written < time.time() - STALE_S:
                made = self.find(part) if f"{part}{MARKER}" in found else None
                if made is None or self._data(made) != name:
                    yield name

    def _data(self, made: Commit) -> str:
        """Name of the file with the part's bytes."""
        return f"{made.name}-{made.sha256[:16]}.parquet" if self._objects else f"{made.name}.parquet"

    def _get(self, name: str) -> bytes:
        return self._objects.get(name) if self._objects else (self.root / name).read_bytes()

    def _shown(self, name: str) -> str:
        return f"{self._objects.address}/{name}" if self._objects else str(self.root / name)


Place = str | Path | Store
"""What names a store."""
