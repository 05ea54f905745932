"""`unveil run` as a process, and how it ended."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

LONGEST_S = 120.0


class Ending(NamedTuple):
    """How a driver ended."""

    code: int
    text: str
    """Standard error."""

    @property
    def verdict(self) -> str:
        """`done`; `killed`, by this harness; `refused`, in one line of its own; `lost`: Ray itself ended the process
        and said why; or `failed`.
        """
        if self.code in (0, 2):
            return "done"
        if self.code == -signal.SIGKILL:
            return "killed"
        if "Traceback" in self.text or self.code != 1:
            return "failed"
        if self.cause:
            return "refused"
        return "lost" if "GCS may have been killed" in self.text else "failed"

    @property
    def cause(self) -> str:
        """The sentence of a refusal."""
        lines = [line for line in self.text.splitlines() if line.startswith("unveil: ")]
        return lines[-1].removeprefix("unveil: ") if lines else ""


class Driver:
    """One process of the command."""

    def __init__(self, root: Path, audit: Path, overrides: tuple[str, ...], environment: Mapping[str, str]) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", str(audit), *overrides],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
            errors="replace",
            env={**kept, "PYTHONPATH": str(root), **environment},
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def over(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> bool:
        """SIGKILL; whether it was alive."""
        alive = not self.over()
        self.process.kill()
        return alive

    def ended(self) -> Ending:
        """Wait for its end; one that hangs is killed and counts as failed."""
        try:
            _, text = self.process.communicate(timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, text = self.process.communicate()
            return Ending(124, f"{text}\nhung for {LONGEST_S:g} s")
        return Ending(self.process.returncode, text)
