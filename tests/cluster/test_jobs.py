"""Jobs, against a client that plays Ray's: broken connections, repeated submissions, refusals."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import jobs as module
from cluster.faults import ClusterError
from cluster.jobs import Jobs, SubmitConfig

SECRET = "0123456789abcdef-a-token"
LOG = "".join(f"line {number} \u00e9\n" for number in range(25))


class Cluster:
    """Ray's client and its cluster. `breaks` says after how many characters each connection is lost."""

    def __init__(self, breaks: list[int | None] | None = None) -> None:
        self.breaks, self.known, self.given = list(breaks or []), {}, []
        self.exit_code: int | None = 0
        self.connections = 0

    def get_job_info(self, name: str) -> Any:
        if name not in self.known:
            raise RuntimeError(f"Request failed with status code 404: Job {name} does not exist.")
        status = "SUCCEEDED" if self.exit_code == 0 else "FAILED"
        return SimpleNamespace(status=status, driver_exit_code=self.exit_code, message="m", metadata=self.known[name])

    def submit_job(self, **given: Any) -> str:
        self.given.append(given)
        self.known[given["submission_id"]] = {**given["metadata"], "of Ray": "x"}
        return str(given["submission_id"])

    def stop_job(self, name: str) -> bool:
        return True

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        self.connections += 1
        lost = self.breaks.pop(0) if self.breaks else None
        sent = 0
        for at in range(0, len(LOG), 10):
            piece = LOG[at : at + 10]
            if lost is not None and sent + len(piece) > lost:
                if lost == 0:
                    await asyncio.sleep(3600)  # dead without a word
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            sent += len(piece)
            yield piece


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.001)
    monkeypatch.setattr(module, "QUIET_S", 0.05)
    monkeypatch.setattr(module, "require_closed", lambda *_, **__: None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)


def jobs(client: Cluster, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Jobs:
    monkeypatch.setattr(module, "_client", lambda *_: client)
    return Jobs(SubmitConfig(**{"cluster": "127.0.0.1:8265", **options}))


def test_a_log_is_shown_once_whatever_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost at once, in the middle, between two pieces, at the end, and once silent."""
    cluster = Cluster([20, 0, 95, 10, len(LOG) - 1])
    cluster.known["a"] = {}
    shown: list[str] = []
    state = jobs(cluster, monkeypatch).follow("a", shown.append)
    assert "".join(shown) == LOG
    assert state.status == "SUCCEEDED" and state.ended and cluster.connections == 6


def test_a_cluster_that_stays_away_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(Cluster):
        def get_job_info(self, name: str) -> Any:
            raise ConnectionRefusedError(111, "Connection refused")

    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"^no contact to http://127\.0\.0\.1:8265 any more: WebSocket connection"):
        jobs(Away([10] * 9999), monkeypatch, patience_s=0.05).follow("a", lambda _: None)
    assert time.monotonic() - start >= 0.05


def test_a_job_that_ended_on_a_machine_that_is_gone_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster([20] * 99)
    cluster.known["a"], cluster.exit_code = {}, 2
    shown: list[str] = []
    state = jobs(cluster, monkeypatch).follow("a", shown.append)
    assert (state.exit_code, "".join(shown), cluster.connections) == (2, LOG[:20], module.LOG_GONE)


def test_what_moves_a_terminals_cursor_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    followed = module._Shown(shown.append)
    followed.restart()
    followed.take("a\x1b[2J\rb\x9b1m\tc\n")
    assert "".join(shown) == "a[2Jb1m\tc\n"


def test_one_name_is_one_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster = Cluster()
    ours = jobs(cluster, monkeypatch)
    for _ in range(3):
        state = ours.submit("once", "true", tmp_path, {"unveil_config": "1"})
    assert state.status == "SUCCEEDED" and len(cluster.given) == 1
    with pytest.raises(ClusterError, match=r"once is the name of another job.*submit\.id"):
        ours.submit("once", "true", tmp_path, {"unveil_config": "2"})
    assert ours.find("never") is None
    with pytest.raises(ClusterError, match="knows no job 'never'"):
        ours.stop("never")
    assert SECRET not in str(cluster.given)
    assert cluster.given[0]["entrypoint_num_cpus"] is None  # so Ray runs it on the head node


def test_faults_of_the_client_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import AuthenticationError

    ours = jobs(Cluster(), monkeypatch)
    for fault, told in [
        (AuthenticationError("Authentication failed: ...\n\nmore"), "takes another token"),
        (ConnectionRefusedError(111, "Connection refused"), "nothing answers.*Connection refused"),
        (RuntimeError("Request failed with status code 500: x\ny"), "refuses: Request failed with status code 500: x$"),
    ]:
        with pytest.raises(ClusterError, match=told) as caught, ours._told():
            raise fault
        assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(ClusterError, match="asks for a token; none is set"), ours._told():
        raise AuthenticationError("401")


def test_a_token_in_clear_text_over_the_network_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for address, told in [("http://10.0.0.5:8265", 1), ("https://10.0.0.5", 0), ("127.0.0.1:8265", 0)]:
        caplog.clear()
        jobs(Cluster(), monkeypatch, cluster=address)
        assert len(caplog.messages) == told and ("clear text" in caplog.text) == bool(told)
        assert SECRET not in caplog.text
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(ClusterError, match=r"10\.0\.0\.5.*submit\.insecure=true"):
        jobs(Cluster(), monkeypatch, cluster="10.0.0.5:8265")


def test_rays_own_variables_lead_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    import ray.job_submission

    asked = []

    def client(address: str, **given: Any) -> None:
        asked.append((address, os.environ.get("RAY_ADDRESS"), given["headers"], given["verify"]))

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", client)
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    Jobs(SubmitConfig(cluster="127.0.0.1:8265/"))
    assert asked == [("http://127.0.0.1:8265", None, {"Authorization": f"Bearer {SECRET}"}, True)]
    assert os.environ["RAY_ADDRESS"] == "http://elsewhere:8265"


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("code", "image", "image"),
        ("id", "a b", "a b"),
        ("id", "../x", "../x"),
        ("cpus", -1.0, "-1.0"),
        ("upload_mb", 0.0, "0.0"),
        ("root", "relative", "relative"),
        ("cluster", "ftp://x", "ftp://x"),
        ("cluster", "ray://x:10001", "ray://"),
    ],
)
def test_options_that_mean_nothing_are_refused(option: str, value: object, shown: str) -> None:
    with pytest.raises(ValueError, match=f"^{option if option != 'upload_mb' else 'cpus'} .*Got .*{shown}"):
        SubmitConfig(**{option: value})


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="no name or password") as caught:
        SubmitConfig(cluster=f"http://me:{SECRET}@host")
    assert SECRET not in str(caught.value)
