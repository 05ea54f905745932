"""Committed Parquet: what one stage hands to the next.

A part is written aside, moved into place, and only then gets its marker `<name>.commit.json`; a reader that finds no
marker, or bytes that differ from the marker's SHA-256, refuses. A kill at any point therefore leaves either a complete
part or nothing that a reader would accept, and writing the same part twice is harmless. The order (data, then marker)
is all that an object store without rename needs.

Folders are private (0700) and files too (0600): embeddings are biometric data.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.faults import IncompleteTable, StorageError

MARKER = ".commit.json"
ASIDE = ".aside-"


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


class Store:
    """A private folder of committed parts."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def child(self, name: str) -> "Store":
        """The store in the sub-folder `name`."""
        return Store(self.root / name)

    def commit(
        self, name: str, table: pa.Table, *, contract: str, key: str, facts: Mapping[str, Any] | None = None
    ) -> Commit:
        """Write `table` as part `name`, replacing an earlier one, and return its marker."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        made = Commit(
            name=name,
            contract=contract,
            key=key,
            rows=table.num_rows,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            facts=dict(facts or {}),
        )
        private_folder(self.root)
        self._path(name + MARKER).unlink(missing_ok=True)
        write_private(self._path(name + ".parquet"), data)
        write_private(self._path(name + MARKER), to_json(asdict(made)))
        return made

    def find(self, name: str) -> Commit | None:
        """The marker of part `name`, or None if the part is not committed."""
        path = self._path(name + MARKER)
        try:
            return Commit(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise IncompleteTable(
                f"{path}: the commit marker cannot be read ({error}). Delete it and run again."
            ) from error

    def read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The committed table `name`, or only some of its columns.

        Raises
        ------
        IncompleteTable
            If it was never committed, or its bytes differ from the committed ones.
        """
        made = self.find(name)
        path = self._path(name + ".parquet")
        if made is None:
            raise IncompleteTable(f"{path}: not committed. Run the stage that writes it.")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise IncompleteTable(f"{path}: committed but not readable ({error}). Run its stage again.") from error
        if hashlib.sha256(data).hexdigest() != made.sha256:
            raise IncompleteTable(f"{path}: bytes differ from the committed ones. Delete it and run its stage again.")
        return pq.read_table(pa.BufferReader(data), columns=None if columns is None else list(columns))

    def sweep(self) -> int:
        """Remove what killed writers left aside; return how many files. Call it only while nothing is writing."""
        left = list(self.root.glob(f"{ASIDE}*"))
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def _path(self, name: str) -> Path:
        return self.root / name


def private_folder(path: Path) -> Path:
    """Make `path` and its missing parents; a folder made here is open to its owner only (0700).

    Raises
    ------
    StorageError
        If the folder cannot be made or written.
    """
    try:
        for folder in [*reversed(path.parents), path]:
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot make this folder ({error.strerror}). Choose another `out`.") from error
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise StorageError(f"{path}: not a folder that can be written. Choose another `out` or change its permissions.")
    return path


def write_private(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step, with mode 0600, surviving a power cut."""
    private_folder(path.parent)
    aside = path.parent / f"{ASIDE}{uuid.uuid4().hex}"
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}). Free space or choose another `out`."
        ) from error


def to_json(value: Any) -> bytes:
    """`value` as indented JSON with sorted keys and a final newline; NaN and infinity are refused."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
