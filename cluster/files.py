"""Files and folders that are their owner's alone, and files that are replaced in one step."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from cluster.faults import StorageError

ASIDE = ".aside-"
"""Names of files that are being written begin so."""


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


def write_new(path: Path, data: bytes) -> bool:
    """Make the file `path` as `write_private` does, unless it is there; whether it was made here."""
    aside = path.parent / f"{ASIDE}{uuid.uuid4().hex}"
    write_private(aside, data)
    try:
        os.link(aside, path)  # never over what is there
    except FileExistsError:
        return False
    except OSError as error:
        raise StorageError(f"{path}: cannot be made ({error.strerror}).") from error
    finally:
        aside.unlink(missing_ok=True)
    return True


def to_json(value: Any) -> bytes:
    """`value` as indented JSON with sorted keys and a final newline; NaN and infinity are refused."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
