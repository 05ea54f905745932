import socket
import threading
from collections.abc import Iterator

import pytest

from cluster.head_watch import LOOKS, head_watched


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Something that listens, with little patience of Ray's."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "0.4")
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield server


def address(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_head_that_is_gone_is_told_of_once(head: socket.socket) -> None:
    told: list[str] = []
    heard = threading.Event()

    def gone(text: str) -> None:
        told.append(text)
        heard.set()

    with head_watched(where := address(head), gone):
        head.close()
        assert heard.wait(20)
    assert len(told) == 1
    assert told[0].startswith(f"the head of the cluster at {where} has not answered for 0.3 s")


def test_a_head_that_answers_is_left_alone_and_one_that_comes_back_is_waited_for(
    head: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([True, *[False] * (LOOKS - 1), True, *[False] * (LOOKS - 1)])
    told: list[str] = []
    done = threading.Event()

    def listens(where: str, timeout_s: float) -> bool:
        answer = next(answers, None)
        if answer is None:
            done.set()
        return answer is not False

    monkeypatch.setattr("cluster.head_watch._listens", listens)
    with head_watched(address(head), told.append):
        assert done.wait(20)
    assert told == []
