"""Hooks get the JSON, once and whole; what is wrong with them is said without their address."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.faults import ClusterError
from cluster.notices import NotifyConfig, deliver

PAYLOAD = {"id": "abc", "audit": "faces", "findings": 3}


class Receiver:
    """A web address on this machine that answers with the statuses given, the last one for ever."""

    def __init__(self, *statuses: int) -> None:
        self.got: list[tuple[str, dict[str, str], Any]] = []
        left = list(statuses)
        got = self.got

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                got.append((self.path, dict(self.headers), json.loads(body)))
                self.send_response(left.pop(0) if len(left) > 1 else left[0])
                self.send_header("Location", "http://192.0.2.1/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/hook?token=secret"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def receivers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Receiver] = []
    monkeypatch.setattr("cluster.notices.time.sleep", lambda _: None)

    def build(*statuses: int) -> Receiver:
        made.append(Receiver(*statuses))
        return made[-1]

    yield build
    for one in made:
        one.close()


def test_an_address_gets_the_payload_and_a_key_to_know_repetitions_by(receivers: Any) -> None:
    receiver = receivers(204)
    deliver(NotifyConfig(webhook=receiver.address), PAYLOAD)
    [(path, headers, body)] = receiver.got
    assert (path, body) == ("/hook?token=secret", PAYLOAD)
    assert (headers["Content-Type"], headers["Idempotency-Key"]) == ("application/json", "abc")


def test_an_address_can_come_from_the_environment(receivers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = receivers(200)
    with pytest.raises(ClusterError, match="the environment has no UNVEIL_HOOK"):
        deliver(NotifyConfig(webhook_env="UNVEIL_HOOK"), PAYLOAD)
    monkeypatch.setenv("UNVEIL_HOOK", receiver.address)
    deliver(NotifyConfig(webhook_env="UNVEIL_HOOK"), PAYLOAD)
    monkeypatch.setenv("UNVEIL_HOOK", "http://example.org/secret")
    with pytest.raises(ClusterError, match=r"webhook must begin with https://") as told:
        deliver(NotifyConfig(webhook_env="UNVEIL_HOOK"), PAYLOAD)
    assert len(receiver.got) == 1 and "secret" not in str(told.value)


@pytest.mark.parametrize(
    ("statuses", "asked", "well"),
    [((503, 429, 200), 3, True), ((500,), 3, False), ((404,), 1, False), ((302,), 1, False)],
)
def test_it_is_tried_again_where_that_may_help(
    receivers: Any, statuses: tuple[int, ...], asked: int, well: bool
) -> None:
    receiver = receivers(*statuses)
    options = NotifyConfig(webhook=receiver.address, retries=2)
    if well:
        deliver(options, PAYLOAD)
    else:
        with pytest.raises(ClusterError, match=rf"127.0.0.1 could not be told \(answer {statuses[-1]}\)") as told:
            deliver(options, PAYLOAD)
        assert "secret" not in str(told.value)
    assert len(receiver.got) == asked


def test_a_command_gets_the_payload_without_a_shell_and_both_are_told(receivers: Any, tmp_path: Path) -> None:
    receiver, out = receivers(500), tmp_path / "out; touch x"
    command = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())", str(out)]
    with pytest.raises(ClusterError, match="answer 500"):
        deliver(NotifyConfig(command=command, webhook=receiver.address, retries=0), PAYLOAD)
    assert json.loads(out.read_text()) == PAYLOAD


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["false"], "false ended with exit code 1"),
        (["/no/such/program"], "cannot be started"),
        (["sleep", "60"], "sleep took longer than 0.05 s"),
    ],
)
def test_a_command_that_fails_is_a_fault(command: list[str], told: str) -> None:
    with pytest.raises(ClusterError, match=told):
        deliver(NotifyConfig(command=command, timeout_s=0.05 if command[0] == "sleep" else 10), PAYLOAD)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"webhook": "http://example.org/"}, "must begin with https://"),
        ({"webhook": "ftp://example.org/"}, "must begin with https://"),
        ({"webhook": "https://"}, "must begin with https://"),
        ({"webhook": "https://me:pw@example.org/"}, "must not hold a user or password"),
        ({"webhook": "https://example.org:port/"}, "is no address"),
        ({"webhook": "https://example.org/pw\u00e9"}, "webhook must be ASCII"),
        ({"webhook": "https://example.org/", "webhook_env": "A"}, "both given"),
        ({"timeout_s": 0}, "timeout_s must be between"),
        ({"retries": 11}, "retries must be between"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        NotifyConfig(**options)
    assert "pw" not in str(error.value)


def test_https_and_this_machine_are_allowed_and_nothing_is_nobody() -> None:
    for webhook in ("https://example.org/x", "http://localhost:8000/", "http://[::1]/x"):
        assert NotifyConfig(webhook=webhook)
    assert not NotifyConfig()
