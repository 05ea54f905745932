import fcntl
import os
import stat
from pathlib import Path

import pytest

from cluster import scratch as module
from cluster.scratch import LONGEST_BASE, SCRATCH, scratch


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(module, "LONGEST_BASE", 4096)  # pytest's folders have long names
    monkeypatch.delenv("UNVEIL_DEBUG", raising=False)
    return tmp_path


def test_the_folder_is_private_and_goes_with_the_session(base: Path) -> None:
    with scratch() as folder:
        assert folder.parent.parent == base
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        folder.mkdir()
        folder.chmod(0o777)  # as Ray does
        (folder / "log").write_text("something")
    assert list(base.iterdir()) == []
    with pytest.raises(LookupError), scratch() as folder:
        raise LookupError
    assert list(base.iterdir()) == []


def test_it_is_kept_to_look_into_and_then_left_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNVEIL_DEBUG", "1")
    with scratch() as folder:
        folder.mkdir()
    monkeypatch.delenv("UNVEIL_DEBUG")
    with scratch():
        assert folder.exists()
    assert folder.exists() and stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_what_killed_sessions_left_is_removed_and_nothing_else(base: Path) -> None:
    dead, alive, other = base / f"{SCRATCH}dead", base / f"{SCRATCH}alive", base / "unveil-other"
    for one in (dead, alive, other):
        one.mkdir()
        (one / "held").touch()
    with (alive / "held").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with scratch() as first, scratch() as second:
            assert first.parent != second.parent
            assert {first.parent, second.parent, alive, other} == set(base.iterdir())
    assert {alive, other} == set(base.iterdir())


def test_sockets_in_it_have_names_that_are_short_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes 107 characters; Ray's session folder and its sockets are as long as these."""
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * LONGEST_BASE)
    with scratch() as folder:
        assert str(folder).startswith(f"/tmp/{SCRATCH}")
        at_most = "/" + "x" * (LONGEST_BASE - 1) + str(folder)[len("/tmp") :]
    assert len(os.path.join(at_most, "session_2026-11-22_15-51-41_574022_4194304", "sockets", "plasma_store")) <= 107
