"""Tokens and addresses, against a dashboard that is a plain HTTP server."""

import logging
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cluster import access
from cluster.access import answers_anyone, is_loopback, make_token, require_closed, require_token, token
from cluster.faults import ClusterError

SECRET = "0123456789abcdef-a-token"


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No token in the environment, and a home of its own."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


class Dashboard(BaseHTTPRequestHandler):
    """Answers the list of jobs as `answer` says: a status, a kind of content, another address."""

    answer: tuple[int, str, str] = (200, "application/json", "")
    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        self.seen.append(dict(self.headers))
        status, kind, elsewhere = self.answer if self.path == "/api/jobs/" else (200, "text/html", "")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", "2")
        if elsewhere:
            self.send_header("Location", elsewhere)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[tuple[str, type[Dashboard]]]:
    kind = type("Own", (Dashboard,), {"seen": []})
    with HTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", kind
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("address", "own"),
    [
        ("127.0.0.1:8265", True),
        ("http://127.8.9.10:8265/x", True),
        ("localhost", True),
        ("https://[::1]:8265", True),
        ("ray://localhost:10001", True),
        ("10.0.0.5:6379", False),
        ("http://0.0.0.0:8265", False),
        ("https://ray.example.org", False),
        ("http://127.0.0.1.example.org:8265", False),
        ("http://localhost@example.org", False),
        ("http://localhost.example.org", False),
        ("auto", False),
        ("", False),
    ],
)
def test_only_addresses_of_this_machine_are_its_own(address: str, own: bool) -> None:
    assert is_loopback(address) is own


def test_a_token_is_found_where_ray_finds_it(
    monkeypatch: pytest.MonkeyPatch, nothing_configured: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert token() == ""
    default = nothing_configured / ".ray" / "auth_token"
    default.parent.mkdir()
    default.write_text(f"{SECRET}\n")
    default.chmod(0o600)
    assert token() == SECRET
    assert caplog.messages == []
    named = nothing_configured / "other"
    named.write_text("by path")
    named.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    assert token() == "by path"
    assert len(caplog.messages) == 1 and "chmod 600" in caplog.text and "by path" not in caplog.text
    monkeypatch.setenv("RAY_AUTH_TOKEN", "by value")
    assert token() == "by value"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named) + "x")
    with pytest.raises(ClusterError, match=r"RAY_AUTH_TOKEN_PATH: .* cannot be read"):
        token()


def test_a_cluster_elsewhere_needs_a_token_or_the_word_insecure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    require_token("127.0.0.1:8265", insecure=False, option="x")
    with pytest.raises(ClusterError, match=r"10\.0\.0\.5.*get-auth-token --generate.*RAY_AUTH_TOKEN.*x\.insecure=true"):
        require_token("10.0.0.5:6379", insecure=False, option="x.insecure")
    assert caplog.messages == []
    require_token("10.0.0.5:6379", insecure=True, option="x.insecure")
    assert caplog.messages[0].startswith("INSECURE (x.insecure=true)")
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    require_token("10.0.0.5:6379", insecure=False, option="x")
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("answer", "open_to_all"),
    [
        ((200, "application/json; charset=utf-8", ""), True),
        ((401, "text/plain", ""), False),
        ((403, "text/plain", ""), False),
        ((200, "text/html", ""), False),
        ((302, "text/html", "/sign-in"), False),
        ((500, "application/json", ""), False),
    ],
)
def test_a_dashboard_is_asked_without_the_token(
    dashboard: tuple[str, type[Dashboard]],
    answer: tuple[int, str, str],
    open_to_all: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page, kind = dashboard
    kind.answer = answer
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    assert answers_anyone(page) is open_to_all
    assert kind.seen and all(SECRET not in str(headers) for headers in kind.seen)


def test_an_open_cluster_is_refused_elsewhere_and_named_here(
    dashboard: tuple[str, type[Dashboard]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    page, _ = dashboard
    require_closed(page, insecure=False, option="x")
    assert "answers requests without a token" in caplog.text and "INSECURE" not in caplog.text
    monkeypatch.setattr(access, "is_loopback", lambda _: False)  # as if the server were another machine
    with pytest.raises(ClusterError, match=r"without a token.*RAY_AUTH_MODE=token.*x\.insecure=true"):
        require_closed(page, insecure=False, option="x.insecure")
    caplog.clear()
    require_closed(page, insecure=True, option="x.insecure")
    assert caplog.messages[0].startswith("INSECURE (x.insecure=true)")
    assert caplog.records[0].levelno == logging.WARNING
    assert not answers_anyone("http://127.0.0.1:1")  # nobody is there


def test_a_local_session_makes_a_private_token_once(nothing_configured: Path) -> None:
    make_token()
    path = nothing_configured / ".ray" / "auth_token"
    made = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(bytes.fromhex(made)) == 32
    make_token()
    assert path.read_text() == made == token()
