import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import run_lock
from cluster.faults import FolderInUse, StorageError
from cluster.run_lock import LOCK, locked

HOLD = """
import sys
from pathlib import Path
from cluster.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(root: Path, folder: Path) -> "subprocess.Popen[str]":
    """A process that holds `folder` until its standard input ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_another_process_is_refused_and_told_who_holds_the_folder(root: Path, tmp_path: Path) -> None:
    with holder(root, tmp_path) as process:
        about = json.loads((tmp_path / LOCK).read_text())
        assert about["pid"] == process.pid
        told = rf"in use by process {process.pid} on {about['host']}, since {about['since'][:4]}.*same command again"
        with pytest.raises(FolderInUse, match=told), locked(tmp_path):
            pass
        (tmp_path / LOCK).write_bytes(b"")
        with pytest.raises(FolderInUse, match="in use by another process"), locked(tmp_path):
            pass
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_killed_holder_holds_nothing(root: Path, tmp_path: Path) -> None:
    with holder(root, tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(tmp_path):
            pass


def test_programs_that_the_holder_starts_do_not_hold_it_longer(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('up', flush=True); input()"]
    with locked(tmp_path):
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
    with child, locked(tmp_path):  # a new descriptor, so the child's would refuse it
        assert child.poll() is None
        child.kill()


def test_one_process_may_hold_a_folder_several_times_under_several_names(root: Path, tmp_path: Path) -> None:
    other = tmp_path.parent / f"{tmp_path.name}-link"
    other.symlink_to(tmp_path)
    first, second = locked(tmp_path), locked(other)
    with first:
        second.__enter__()
    attempt = [sys.executable, "-c", HOLD, str(tmp_path)]
    refused = subprocess.run(attempt, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert "FolderInUse" in refused.stderr, "the second hold lasts longer than the first"
    second.__exit__(None, None, None)
    with holder(root, tmp_path) as process:
        process.kill()


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "letter")
    with pytest.raises(StorageError, match=r"\.lock: cannot be written"), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "letter").read_text() == "kept"


def test_the_lock_file_is_private_and_stays(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    assert (tmp_path / LOCK).stat().st_mode & 0o777 == 0o600


def test_a_place_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(file: int, how: int) -> None:
        raise OSError(run_lock.NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", unknown)
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        pass
    assert "knows no locks" in caplog.text


def test_a_lock_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(StorageError, match=r"\.lock: cannot be written"), locked(tmp_path):
        pass
