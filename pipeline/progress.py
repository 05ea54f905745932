"""Progress of long work: a line that rewrites itself on a terminal, and a log line every 30 s elsewhere."""

import logging
import sys
import time

log = logging.getLogger(__name__)

EVERY_S = 30.0


class Progress:
    """Counts what is done; shows rate, failures and time left."""

    def __init__(self, stage: str, total: int, noun: str) -> None:
        self.stage, self.total, self.noun = stage, total, noun
        self.done = self.failed = 0
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def add(self, done: int, failed: int = 0) -> None:
        """Count `done` more, of which `failed` failed, and show it if it is time."""
        self.done += done
        self.failed += failed
        now = time.monotonic()
        if self.terminal:
            sys.stderr.write(f"\r{self.line(now)}\x1b[K")
            sys.stderr.flush()
        elif now - self.shown >= EVERY_S:
            self.shown = now
            log.info("%s", self.line(now))

    def line(self, now: float) -> str:
        """The progress in one line."""
        rate = self.done / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        failed = f", {self.failed:,} not audited" if self.failed else ""
        return f"{self.stage}: {self.done:,}/{self.total:,} {self.noun}{failed}, {rate:,.0f}/s, {left:.0f} s left"

    def end(self) -> None:
        """Clear the terminal's line; the stage's summary follows."""
        if self.terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
