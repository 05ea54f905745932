"""Some rounds of the chaos harness: tests/chaos/chaos.py, of which `make chaos` plays many."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.long]


def played(root: Path, seeds: str) -> dict:
    """The summary of the rounds with these seeds."""
    command = [sys.executable, "-W", "error::ResourceWarning", str(root / "tests" / "chaos" / "chaos.py")]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "SEEDS": seeds})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads(ended.stdout.splitlines()[-1])
    assert summary["different"] == summary["failed"] == 0 and summary["faults"] > 0, ended.stdout
    return summary


def test_an_audit_completes_with_the_same_bytes_while_a_machine_of_three_is_killed(root: Path) -> None:
    """Behind a token."""
    assert played(root, "6")["kinds"] >= 1
