import io

import pytest

from pipeline import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_rewrites_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    shown = progress.Progress("embed", 100, "images")
    shown.add(40, 2)
    shown.add(10)
    shown.end()
    assert "embed: 50/100 images, 2 not audited" in screen.getvalue()
    assert "\n" not in screen.getvalue() and screen.getvalue().endswith("\r\x1b[K")


def test_elsewhere_a_line_comes_every_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr", io.StringIO())
    caplog.set_level("INFO")
    shown = progress.Progress("search", 10, "blocks")
    for _ in range(8):
        now[0] += 10
        shown.add(1)
    assert [r.getMessage() for r in caplog.records] == [
        "search: 3/10 blocks, 0/s, 70 s left",
        "search: 6/10 blocks, 0/s, 40 s left",
    ]
