"""purge: what a run holds of people, made unreadable and removed, with a receipt.

    receipt: begun -> keys destroyed -> files removed -> receipt: done

The order makes the end certain: once the receipt says `begun`, the same command goes on after a kill at any moment, and
from the first step on nothing that was encrypted can be read. What purge cannot reach (copies, backups, blocks that a
disk keeps, versions of objects, swap) is named in docs/security.md.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.encrypted_parts import Cipher, has_key
from cluster.faults import IncompleteTable, StorageError
from cluster.keys import KEYS, forget_keys, settled
from cluster.run_lock import LOCK, locked
from cluster.storage import MARKER, Store, to_json, write_private
from operators.errors import ConfigError
from operators.sources import within
from pipeline.audience import KEY as NAMES_KEY

if TYPE_CHECKING:
    from pipeline.config import AuditConfig

log = logging.getLogger(__name__)

RECEIPT = "purge-receipt.json"
HOLD = "purge-hold.json"
CONTRACT = "purge/1"
DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PurgeConfig:
    """Destroying what a run holds."""

    confirm: str = ""
    """Name of the run folder, without which nothing is destroyed."""
    hold: bool | None = None
    """`true` puts a legal hold on the run folder, `false` takes it away; purge then does nothing else."""
    expired: bool = False
    """Purge only if nothing was done in the run for `after_days`; for scheduled jobs."""
    after_days: int = 30
    """How long results are kept, in days."""
    store: bool = False
    """Also remove this run's embeddings from a `store` outside the run folder, even if other runs use them: no run
    writes down that it does. One that does embeds them again."""

    def __post_init__(self) -> None:
        if self.after_days < 0:
            raise ValueError(f"after_days must not be negative. Got {self.after_days}.")


def purge(config: "AuditConfig") -> str:
    """Destroy the data key and the files of a run; what was done, in words.

    Raises
    ------
    ConfigError
        If it is not confirmed, under a legal hold, or the folder is no run folder or holds what is not the run's.
    StorageError
        If a file cannot be removed; the same command then goes on.
    """
    folder, options = Path(config.out), config.purge
    if options.hold is not None:
        return _hold(folder, held=options.hold)
    earlier = _json(folder / RECEIPT)
    begun = earlier is not None and earlier["state"] == "begun" and not _run_since(folder, earlier)
    if not begun and not (folder / "run.json").exists() and not has_key(folder):
        if earlier is not None:
            return f"{folder} was purged at {earlier['done']}; the receipt is {folder / RECEIPT}"
        raise ConfigError(f"out: {folder} is no run folder: it has no run.json. Nothing was removed.")
    with ExitStack() as holding:
        holding.enter_context(locked(folder))
        for lock in folder.rglob(LOCK):  # of runs in its folder
            holding.enter_context(locked(lock.parent))
        if (held := next(folder.rglob(HOLD), None)) is not None:  # of this run, or of one in its folder
            raise ConfigError(
                f"{held.parent} is under a legal hold ({HOLD}), which purge.hold=false ends. Nothing was removed."
            )
        if options.expired and not begun and (days := _idle_days(folder)) < options.after_days:
            return f"{folder} was used {days:.1f} days ago, and is kept for {options.after_days}: nothing was removed"
        _refuse_others(config, folder)
        if options.confirm != folder.resolve().name:
            raise ConfigError(_asked(folder))
        receipt = earlier if begun and earlier is not None else _begin(config, folder, earlier)
        return _destroy(config, folder, receipt)


def _hold(folder: Path, *, held: bool) -> str:
    """Set or end a legal hold."""
    if not folder.is_dir():
        raise ConfigError(f"out: there is no folder {folder}.")
    if held:
        write_private(folder / HOLD, to_json({"contract": CONTRACT, "since": _now()}))
        return f"{folder} is under a legal hold: `unveil purge` refuses until purge.hold=false"
    (folder / HOLD).unlink(missing_ok=True)
    return f"{folder} is under no legal hold"


def _run_since(folder: Path, receipt: dict[str, Any]) -> bool:
    """Whether a run worked here after a purge had begun and was cut short: that purge then says nothing of it."""
    try:
        last = datetime.fromisoformat(json.loads((folder / "run.json").read_bytes())["created"])
        return last.replace(microsecond=0) > datetime.fromisoformat(receipt["begun"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _idle_days(folder: Path) -> float:
    """Days since a verb last worked in the folder."""
    record = _json(folder / "run.json") or {}
    try:
        last = datetime.fromisoformat(record["created"]).timestamp()
    except (KeyError, ValueError):
        last = folder.stat().st_mtime
    return (time.time() - last) / DAY_S


def _refuse_others(config: "AuditConfig", folder: Path) -> None:
    """ConfigError if something else that the configuration names lies in the folder, or a key of the run is a link."""
    for key in (folder / KEYS, folder / NAMES_KEY):
        if key.is_symlink():
            raise ConfigError(f"{key} is a link: the key that it leads to may serve others. Take the link away.")
    places = {f"sets.{role}.uri": one.uri for role, one in config.sets.listed().items()}
    places |= {f"model {model.name}": model.path for model in config.models()}
    places["faces.detector"] = config.faces.detector
    if config.encryption.key.startswith("file:"):
        places["encryption.key"] = settled(config.encryption.key).removeprefix("file:")
    for name, place in places.items():
        if "://" not in place and within(place, str(folder)):
            raise ConfigError(f"{name}: {place} lies in the run folder, which is to be removed. Move it away.")


def _asked(folder: Path) -> str:
    counts = _counts(folder)
    name = folder.resolve().name
    return (
        f"This destroys all of {folder}: {sum(counts['tables'].values()):,} tables, {counts['files']:,} files, "
        f"{counts['bytes'] / 1e6:,.1f} MB. Give purge.confirm={name} to do it; nothing was removed."
    )


def _counts(folder: Path) -> dict[str, Any]:
    """What the folder holds, in numbers; names of tables, and none of images or persons."""
    tables: Counter[str] = Counter()
    files = size = 0
    for path in _files(folder):
        if path.name.endswith(MARKER):
            tables[path.relative_to(folder).parent.as_posix()] += 1
        files, size = files + 1, size + path.lstat().st_size
    return {"tables": dict(sorted(tables.items())), "files": files, "bytes": size}


def _begin(config: "AuditConfig", folder: Path, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Write the receipt that says what is about to be destroyed."""
    keys = _json(folder / KEYS)
    receipt = {
        "contract": CONTRACT,
        "state": "begun",
        "title": config.title,
        "begun": _now(),
        "data_key": keys.get("id") if keys else None,
        "held": _counts(folder),
        "statements": {name: _digest(folder / name) for name in ("run.json", "seal.json", "summary.json")},
        "shared_store": _store_parts(config, folder),
        "earlier": [] if earlier is None else [*earlier.get("earlier", ()), {**earlier, "earlier": []}],
    }
    write_private(folder / RECEIPT, to_json(receipt))
    return receipt


def _destroy(config: "AuditConfig", folder: Path, receipt: dict[str, Any]) -> str:
    there = [name for name in (KEYS, NAMES_KEY) if (folder / name).exists()]
    for name in (KEYS, NAMES_KEY):
        _destroy_key(folder / name)
    log.info("purge: keys destroyed in %s: %s", folder, ", ".join(there) or "none, because none lay there")
    try:
        for path in _files(folder):
            path.unlink(missing_ok=True)
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
    except OSError as error:
        raise StorageError(
            f"{error.filename}: cannot be removed ({error.strerror}). Give access to it, and run the command again."
        ) from error
    write_private(folder / RECEIPT, to_json({**receipt, "state": "done", "done": _now()}))
    lines = [
        f"{folder} is purged: {receipt['held']['files']:,} files; the receipt is {folder / RECEIPT}",
        "copies, backups, snapshots and blocks that a disk keeps are not reached (docs/security.md)",
    ]
    return "\n".join([*lines, *_left_outside(config, folder, receipt)])


def _destroy_key(path: Path) -> None:
    """Overwrite and remove a file with a key, and forget the key; nothing if it is gone."""
    with suppress(FileNotFoundError):
        with os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+b") as file:
            file.write(bytes(os.fstat(file.fileno()).st_size))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
        place = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
    forget_keys()


def _store_parts(config: "AuditConfig", folder: Path) -> dict[str, Any] | None:
    """Remove this run's embeddings from a store outside its folder, if asked for; how many there were."""
    if not config.purge.store or not _outside(config, folder):
        return None
    from pipeline.embed import unit_store
    from pipeline.stage import Run

    run = Run(config)
    units: set[str] = set()
    for scanned in sorted(folder.rglob("scan")):
        listed = Store(scanned, Cipher.at(scanned, config.encryption.key))
        for marker in scanned.glob(f"*{MARKER}"):
            units.update(listed.read(marker.name.removesuffix(MARKER), ["unit"])["unit"].to_pylist())
    removed = 0
    for store in (unit_store(run, model) for model in config.models()):
        for unit in sorted(units):
            removed += store.remove(unit)
    return {"store": config.store, "parts": removed}


def _outside(config: "AuditConfig", folder: Path) -> bool:
    return bool(config.store) and ("://" in config.store or not within(config.store, str(folder)))


def _left_outside(config: "AuditConfig", folder: Path, receipt: dict[str, Any]) -> Iterator[str]:
    """What lies elsewhere, and what became of it."""
    if _outside(config, folder):
        done = receipt["shared_store"]
        yield (
            f"{config.store}: the embeddings of this run are removed ({done['parts']:,} tables)"
            if done
            else f"{config.store} may serve other runs and was left as it is; purge.store=true removes this run's part"
        )
    if config.clean.out and not within(config.clean.out, str(folder)) and Path(config.clean.out).exists():
        yield f"{config.clean.out}: the cleaned release lies elsewhere and was left as it is"


def _files(folder: Path) -> Iterator[Path]:
    """All files and links but the receipt and the lock; links are not followed."""
    for root, folders, names in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*names, *linked]):
            if Path(root) != folder or name not in (RECEIPT, LOCK):
                yield Path(root, name)


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no file; IncompleteTable if it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise IncompleteTable(f"{path}: cannot be read ({error}). Remove it and try again.") from error
    return found if isinstance(found, dict) else None


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
