"""What `unveil watch` remembers: `ledger.jsonl`, one line for everything that happened, and `state.json`, as it is now.

A line is added in one write and never changed. The state is replaced in one step, after the line that it follows from;
a kill between the two is healed by doing the last step again, which finds its line there. Both are private (0600).
"""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.faults import StorageError
from cluster.storage import to_json, write_private

LINES, STATE = "ledger.jsonl", "state.json"


class WatchLedger:
    """The ledger of one watch folder, which exists and is held by this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.lines = read_lines(folder)
        self._state = _state(folder / STATE)

    def add(self, event: str, utc: str, audit: str, facts: Mapping[str, Any]) -> None:
        """Append one line; StorageError if it cannot be written."""
        line = {"event": event, "utc": utc, "audit": audit, **facts}
        path = self._folder / LINES
        text = (json.dumps(line, sort_keys=True, allow_nan=False) + "\n").encode()
        try:
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"  # by a kill or a full disk
                line_bytes = b"\n" + text if torn else text
                if file.write(line_bytes) < len(line_bytes):  # a disk that fills up takes a part without a fault
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}). Free space or change it.") from error
        self.lines.append(line)

    def state(self, audit: str) -> dict[str, Any]:
        """The state of one audit; empty before its first look."""
        return dict(self._state.get(audit, {}))

    def keep(self, audit: str, state: Mapping[str, Any]) -> None:
        """Replace the state of one audit."""
        self._state[audit] = dict(state)
        write_private(self._folder / STATE, to_json(self._state))

    def of(self, audit: str, *events: str) -> list[dict[str, Any]]:
        """The lines of one audit, oldest first, of some kinds."""
        return [line for line in self.lines if line.get("audit") == audit and line.get("event") in events]


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a ledger; one that a kill tore is left out."""
    try:
        text = (folder / LINES).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue
        if isinstance(read, dict):
            found.append(read)
    return found


def _state(path: Path) -> dict[str, dict[str, Any]]:
    try:
        read = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path}: cannot be read ({error}). Delete it: all audits are then looked at as if new, and what they "
            f"have embedded and searched is kept."
        ) from error
    return dict(read)
