"""An S3 server for tests, and a proxy before it that counts requests and can spoil answers."""

import http.client
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = "sets"
SECRET = "wJalrXUtnFEMI-not-a-key"
HOP = ("connection", "transfer-encoding", "content-length")


@dataclass
class Fault:
    """What happens to the next `times` requests that `method` and `path` fit."""

    kind: int | str | Callable[[], None]
    """A status; `drop`, `slow`, `cut` (the connection ends after half of the body), `short` (half of the body as if it
    were all); or something to do before the request is passed on."""
    method: str = "GET"
    path: str = ""
    times: int = 1
    code: str = "SlowDown"


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the server at `back`."""

    daemon_threads = True

    def __init__(self, back: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.back, self.asked, self.faults, self.headers = back, [], [], []
        self.released = threading.Event()
        self.address = f"127.0.0.1:{self.server_address[1]}"

    asked: list[tuple[str, str, str]]
    faults: list[Fault]
    headers: list[dict[str, str]]

    def counts(self, reset: bool = True) -> dict[str, int]:
        """Requests since the last call, by method; listings count as LIST."""
        found: dict[str, int] = {}
        for method, path, _ in self.asked:
            name = "LIST" if "list-type" in path else method
            found[name] = found.get(name, 0) + 1
        if reset:
            self.asked.clear()
        return found

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault for this request, used up."""
        for one in self.faults:
            if one.method in ("", method) and one.path in path and one.times:
                one.times -= 1
                return one
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def log_message(self, *args: Any) -> None:
        pass

    def serve(self) -> None:
        body = self._body()
        self.server.asked.append((self.command, self.path, self.headers.get("Range", "")))
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        fault = self.server.fault(self.command, self.path)
        if fault and isinstance(fault.kind, int):
            text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>key {SECRET}</Message></Error>"
            return self._answer(fault.kind, [("Content-Type", "application/xml")], text.encode())
        if fault and fault.kind == "slow":
            self.server.released.wait(5)
            fault.kind = "drop"
        if fault and fault.kind == "drop":
            self.close_connection = True
            return None
        if fault and callable(fault.kind):
            fault.kind()
        status, headers, data = self._passed(body)
        if fault and fault.kind == "short":
            data = data[: len(data) // 2]
            headers = [one for one in headers if one[0] != "Content-Length"]
        self._answer(status, headers, data, cut=fault is not None and fault.kind == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _passed(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        back = http.client.HTTPConnection(*self.server.back)
        back.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP:
                back.putheader(name, value)
        back.putheader("Content-Length", str(len(body)))
        back.endheaders(body or None)
        answer = back.getresponse()
        data = answer.read()
        headers = [one for one in answer.getheaders() if one[0].lower() not in HOP]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        back.close()
        return answer.status, [*headers, ("Content-Length", length or str(len(data)))], data

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if "Content-Length" not in dict(headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut


@contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[ThreadingHTTPServer]:
    """The server, answering in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class ObjectStore:
    """The server, its proxy, and a client of another make that speaks to the server itself."""

    proxy: Proxy
    client: Any
    environment: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, data: bytes) -> None:
        """Write an object."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def names(self) -> list[str]:
        """All keys."""
        return [one["Key"] for one in self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]

    def clear(self) -> None:
        """Delete all objects, and forget faults and counts."""
        for key in self.names():
            self.client.delete_object(Bucket=BUCKET, Key=key)
        self.proxy.faults.clear()
        self.proxy.asked.clear()
        self.proxy.headers.clear()


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """An empty bucket on a server of this machine."""
    import boto3
    from botocore.config import Config
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"aws_access_key_id": "AKIATESTTESTTEST", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    options = Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1})
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", config=options, **names)
    client.create_bucket(Bucket=BUCKET)
    with served(Proxy((host, port))) as proxy:
        assert isinstance(proxy, Proxy)
        environment = {
            "AWS_ACCESS_KEY_ID": names["aws_access_key_id"],
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://{proxy.address}",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        yield ObjectStore(proxy, client, environment)
    client.close()
    server.stop()
