"""A private folder for what Ray writes while a local session lasts: logs, sockets, spilled objects."""

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

SCRATCH = "unveil-ray-"
"""How the private folders of local sessions begin."""
LONGEST_BASE = 20
"""Of the folder that they lie in: Ray's sockets lie 86 characters below it, and their names may have 107."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for Ray's session inside a private one, which is removed at the end; so are those of killed processes.

    Ray makes its own folder accessible for everybody, so it must not be the private one itself.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    base = base if len(str(base)) <= LONGEST_BASE else Path("/tmp")  # noqa: S108 (a private folder is made in it)
    _sweep(base)
    private = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=base))  # 0700
    with (private / "held").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            yield private / "r"
        finally:
            if os.environ.get("UNVEIL_DEBUG"):
                (private / "held").unlink()  # so the next session leaves it alone
                log.info("ray: the session's logs are kept in %s", private)
            else:
                _remove(private)


def _sweep(base: Path) -> None:
    """Remove the folders of sessions whose process is gone: nobody holds them."""
    for left in base.glob(f"{SCRATCH}*"):
        try:
            if left.stat().st_uid != os.getuid():
                continue
            with (left / "held").open() as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left)
        except OSError:  # held, kept without its mark, or gone by now
            continue


def _remove(folder: Path) -> None:
    """Remove a folder into which processes that end may still write for a moment."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)
