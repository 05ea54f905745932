"""Downloads against a server on this machine that breaks off, errs, redirects and cheats."""

import hashlib
import logging
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster import download
from cluster.download import Limits, fetch
from cluster.faults import ClusterError, StorageError

CONTENT = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(CONTENT).hexdigest()
LOCAL = Limits(schemes=("http",), timeout_s=5.0, pause_s=0.01)


class Server(ThreadingHTTPServer):
    """Answers with CONTENT; `faults` are used up one a request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.ranges: list[str | None] = []
        self.redirect = ""
        self.length = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.onnx"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.ranges.append(asked)
        assert not {"Authorization", "Cookie"} & set(self.headers)
        fault = server.faults.pop(0) if server.faults else ""
        if fault.isdecimal():
            self.send_error(int(fault))
        elif fault == "redirect":
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
        elif fault == "silence":
            server.stop.wait(10)
        elif fault != "hang up":
            self.answer(0 if fault == "no range" else int((asked or "bytes=0-")[6:-1]), fault)
        self.close_connection = True

    def answer(self, start: int, fault: str) -> None:
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
            return
        begin = 7 if fault == "wrong start" and start else start
        body = CONTENT[begin:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        if self.server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "wrong content":
            body = bytes(len(body))
        self.wfile.write(body[: len(body) // 3] if fault == "break" else body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    made.stop = threading.Event()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.stop.set()
    made.shutdown()
    made.server_close()
    thread.join()


def left(folder: Path) -> list[str]:
    """Names in the cache without the digest and without lock files."""
    return sorted(path.name[65:] for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_file_comes_whole_private_and_once(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = fetch(server.url, DIGEST.upper(), cache, LOCAL)
    assert path == cache / f"{DIGEST}-weights.onnx" and path.read_bytes() == CONTENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert fetch(server.url, DIGEST, cache, LOCAL) == path
    assert server.ranges == [None] and left(cache) == ["weights.onnx"]


def test_a_connection_that_breaks_is_resumed_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.faults = ["break", "hang up", "break"]
    assert fetch(server.url, DIGEST, tmp_path, LOCAL).read_bytes() == CONTENT
    first = len(CONTENT) // 3
    second = first + (len(CONTENT) - first) // 3
    assert server.ranges == [None, f"bytes={first}-", f"bytes={first}-", f"bytes={second}-"]


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server: Server, tmp_path: Path) -> None:
    server.faults = ["break", "503", "hang up"]
    limits = Limits(schemes=("http",), timeout_s=5.0, pause_s=0.01, attempts=3)
    with pytest.raises(
        ClusterError, match=r"weights.onnx: cannot be fetched .*Run again.*Without a connection.*put it"
    ):
        fetch(server.url, DIGEST, tmp_path, limits)
    assert left(tmp_path) == ["weights.onnx.part"]
    assert fetch(server.url, DIGEST, tmp_path, limits).read_bytes() == CONTENT
    assert server.ranges[-1] == f"bytes={len(CONTENT) // 3}-" and left(tmp_path) == ["weights.onnx"]


@pytest.mark.parametrize("fault", ["no range", "wrong start"])
def test_a_server_that_cannot_resume_is_asked_for_all(server: Server, tmp_path: Path, fault: str) -> None:
    server.faults = ["break", fault]
    assert fetch(server.url, DIGEST, tmp_path, LOCAL).read_bytes() == CONTENT


@pytest.mark.parametrize("held", [CONTENT, CONTENT + b"more"])
def test_a_part_that_was_complete_or_too_long_is_put_right(server: Server, tmp_path: Path, held: bytes) -> None:
    (tmp_path / f"{DIGEST}-weights.onnx.part").write_bytes(held)
    assert fetch(server.url, DIGEST, tmp_path, LOCAL).read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache_is_fetched_again(server: Server, tmp_path: Path) -> None:
    fetch(server.url, DIGEST, tmp_path, LOCAL).write_bytes(b"damaged")
    assert fetch(server.url, DIGEST, tmp_path, LOCAL).read_bytes() == CONTENT


def test_wrong_content_is_deleted_and_refused_with_both_digests(server: Server, tmp_path: Path) -> None:
    server.faults = ["wrong content"]
    found = hashlib.sha256(bytes(len(CONTENT))).hexdigest()
    with pytest.raises(ClusterError, match=f"weights.onnx: SHA-256 is {found}, pinned is {DIGEST}. What came was del"):
        fetch(server.url, DIGEST, tmp_path, LOCAL)
    assert left(tmp_path) == []
    assert fetch(server.url, DIGEST, tmp_path, LOCAL).read_bytes() == CONTENT


def test_server_errors_are_tried_again_and_client_errors_are_not(server: Server, tmp_path: Path) -> None:
    server.faults = ["500", "503", "429"]
    fetch(server.url, DIGEST, tmp_path / "a", LOCAL)
    assert len(server.ranges) == 4
    server.faults = ["404"]
    with pytest.raises(ClusterError, match=r"weights.onnx: the server answers 404 Not Found. Correct the address"):
        fetch(server.url, DIGEST, tmp_path / "b", LOCAL)
    assert len(server.ranges) == 5


def test_silence_ends_and_so_does_a_long_download(server: Server, tmp_path: Path) -> None:
    server.faults = ["silence"]
    with pytest.raises(ClusterError, match=r"cannot be fetched \((timed out|The read operation timed out)\)"):
        fetch(server.url, DIGEST, tmp_path, Limits(schemes=("http",), timeout_s=0.2, attempts=1))
    with pytest.raises(ClusterError, match=r"it took longer than Limits\.total_s"):
        fetch(server.url, DIGEST, tmp_path, Limits(schemes=("http",), total_s=0.0))


@pytest.mark.parametrize("told", [True, False])
def test_a_file_over_the_limit_is_refused_and_not_kept(server: Server, tmp_path: Path, told: bool) -> None:
    server.length = told
    limits = Limits(schemes=("http",), max_bytes=100_000)
    with pytest.raises(ClusterError, match=r"has more than 100,000 bytes, the limit"):
        fetch(server.url, DIGEST, tmp_path, limits)
    assert left(tmp_path) == []


def test_a_server_that_does_not_tell_the_length_is_read_to_the_end(server: Server, tmp_path: Path) -> None:
    server.length = False
    assert fetch(server.url, DIGEST, tmp_path, LOCAL).read_bytes() == CONTENT


def test_redirects_are_followed_to_allowed_schemes_only(server: Server, tmp_path: Path) -> None:
    server.faults, server.redirect = ["redirect"], server.url + "?token=hidden"
    assert fetch(server.url, DIGEST, tmp_path / "a", LOCAL).read_bytes() == CONTENT
    for place in ("https://127.0.0.1/x", "ftp://127.0.0.1/x", "http://name:s3cret@127.0.0.1/x"):
        server.faults, server.redirect = ["redirect"], place + "?token=hidden"
        with pytest.raises(ClusterError, match="redirects to where it must not") as refused:
            fetch(server.url, DIGEST, tmp_path / "b", LOCAL)
        assert "hidden" not in str(refused.value) and "s3cret" not in str(refused.value)
    server.faults, server.redirect = ["redirect"], "file:///etc/hostname"
    with pytest.raises(ClusterError, match="302"):
        fetch(server.url, DIGEST, tmp_path / "b", LOCAL)
    server.faults, server.redirect = ["redirect"] * 99, server.url
    with pytest.raises(ClusterError, match="302"):
        fetch(server.url, DIGEST, tmp_path / "b", LOCAL)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://example.org/a.onnx", "http://example.org/a.onnx: only https addresses are fetched"),
        ("file:///etc/hostname", "only https addresses are fetched"),
        ("https:///a", "only https addresses are fetched"),
        ("https://example.org/a b", "only https addresses are fetched"),
        ("https://name:s3cret@example.org/a?token=hidden", "https://example.org/a: an address must not hold a name"),
        ("https://[::1/a", "not an address"),
        ("package:", "must be package:NAME/path"),
        ("package:email/../json/tool.py", "must be package:NAME/path"),
        ("package:no_such_package/a.onnx", "no such file in an installed package. Install no_such_package"),
        ("package:email/none.onnx", "no such file in an installed package"),
        ("/no/such/file.onnx", r"/no/such/file.onnx: cannot be read \(No such file"),
    ],
)
def test_other_sources_are_refused_without_telling_secrets(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message) as refused:
        fetch(source, DIGEST, tmp_path)
    assert "hidden" not in str(refused.value) and "s3cret" not in str(refused.value)


def test_nothing_secret_is_logged(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.faults = ["500"]
    fetch(server.url + "?token=hidden#part", DIGEST, tmp_path, LOCAL)
    assert "attempt 2 of 5" in caplog.text and "hidden" not in caplog.text


def test_paths_and_files_of_packages_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "über weights.onnx"
    source.write_bytes(CONTENT)
    copied = fetch(str(source), DIGEST, tmp_path / "cache")
    assert copied.read_bytes() == CONTENT and copied.name == f"{DIGEST}-_ber_weights.onnx"
    with pytest.raises(ClusterError, match=r"SHA-256 is .*, pinned is 0000"):
        fetch(str(source), "0" * 64, tmp_path / "cache")
    assert source.read_bytes() == CONTENT
    with pytest.raises(ClusterError, match="more than 10 bytes"):
        fetch(str(source), "0" * 64, tmp_path / "cache", Limits(max_bytes=10))
    inside = Path(download.__file__).with_name("faults.py").read_bytes()
    digest = hashlib.sha256(inside).hexdigest()
    assert fetch("package:cluster/faults.py", digest, tmp_path / "cache").read_bytes() == inside


def test_a_digest_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"must be 64 hexadecimal digits\. Got ''"):
        fetch("https://example.org/a", "", tmp_path)


def test_a_file_put_there_by_hand_needs_no_connection(tmp_path: Path) -> None:
    (tmp_path / f"{DIGEST}-a.onnx").write_bytes(CONTENT)
    assert fetch("https://example.invalid/a.onnx", DIGEST, tmp_path).read_bytes() == CONTENT


def test_without_a_connection_it_says_what_to_bring_and_where_to(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=rf"a.onnx: cannot be fetched \(.*SHA-256 is {DIGEST}.*{DIGEST}-a.onnx\.$"):
        fetch("http://127.0.0.1:9/a.onnx", DIGEST, tmp_path, Limits(schemes=("http",), attempts=2, pause_s=0.01))


def test_a_link_in_place_of_the_part_is_not_followed(server: Server, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"")
    (tmp_path / f"{DIGEST}-weights.onnx.part").symlink_to(other)
    with pytest.raises(StorageError, match="cannot be written"):
        fetch(server.url, DIGEST, tmp_path, LOCAL)
    assert other.read_bytes() == b""


def test_of_several_callers_one_fetches(server: Server, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(server.url, DIGEST, tmp_path, LOCAL))) for _ in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(server.ranges) == 1


def test_a_full_disk_is_a_fault_of_storage(tmp_path: Path) -> None:
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(StorageError, match=r"/dev/full: .*Free space"):
        download._write(full, b"data")
