import importlib.util
import io
import json
import logging
import pickle
import re
import socket
import sys
import zipfile
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest

from operators import remote_faults, remote_http, remote_objects
from operators.errors import FormatError
from operators.formats import SetConfig, listed, reader
from operators.remote import RemoteSource
from operators.sources import open_source

_spec = importlib.util.spec_from_file_location("object_store", Path(__file__).parents[1] / "object_store.py")
assert _spec is not None and _spec.loader is not None
tools: Any = sys.modules.setdefault("object_store", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(tools)
Fault = tools.Fault

BIG = np.random.default_rng(3).integers(0, 256, 9_000_001, np.uint8).tobytes()


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with tools.object_store() as store:
        yield store


@pytest.fixture
def store(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty bucket, with the pauses taken out."""
    server.clear()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_faults, "PAUSE_S", 0.01)
    monkeypatch.setattr(remote_objects, "TRIES", 1)
    return server


def source(path: str = "", **options: Any) -> RemoteSource:
    return RemoteSource(f"s3://{tools.BUCKET}{path}", **options)


def found(place: RemoteSource) -> dict[str, int]:
    return {file.path: file.size for file in place.files() if file.error is None}


def refused(action: Any) -> str:
    with pytest.raises(FormatError) as caught:
        action()
    assert tools.SECRET not in str(caught.value) and "AKIA" not in str(caught.value)
    return str(caught.value)


# --- listing


def test_a_prefix_is_listed_without_placeholders_of_folders(store: Any) -> None:
    for key, data in {
        "set/a/1.jpg": b"x",
        "set/a/": b"",
        "set/b_$folder$": b"",
        "set/b/c/2.jpg": b"yy",
        "set/empty.jpg": b"",
        "set/ü b+c%20.jpg": b"zzz",
        "settled/3.jpg": b"no",
    }.items():
        store.put(key, data)
    expected = {"a/1.jpg": 1, "b/c/2.jpg": 2, "empty.jpg": 0, "ü b+c%20.jpg": 3}
    assert found(source("/set")) == found(source("/set/")) == expected
    assert len(found(source())) == 5
    assert source("/set").single is None
    for path in expected:
        assert len(source("/set").open(path).read()) == expected[path]


def test_names_that_cannot_be_opened_become_errors_and_are_not_lost(store: Any) -> None:
    for key in ("s/ok.jpg", "s//x.jpg", "s/../y.jpg", "s/a//z.jpg", "s/\x07.jpg"):
        store.put(key, b"x")
    files = {file.path: file.error for file in source("/s").files()}
    assert files.pop("ok.jpg") is None
    assert len(files) == 4 and all("rename" in str(error) for error in files.values())
    with pytest.raises(OSError, match="rename"):
        source("/s").open("../y.jpg")


def test_many_folders_are_listed_as_the_server_lists_them(store: Any) -> None:
    keys = {f"many/{at % 40:03d}/{at}.jpg" for at in range(120)} | {"many/top.jpg"}
    for key in keys:
        store.put(key, b"x")
    assert {f"many/{path}" for path in found(source("/many"))} == keys == set(store.names())


def test_a_single_object_is_a_source_of_one_file(store: Any) -> None:
    store.put("deep/set.zip", b"zip")
    one = source("/deep/set.zip")
    assert (one.single, found(one), one.open("set.zip").read()) == ("set.zip", {"set.zip": 3}, b"zip")


def test_patterns_name_files_and_missing_ones_are_not_passed_over(store: Any) -> None:
    for name in ("t-00.tar", "t-01.tar", "t-03.tar", "u-00.tar", "in/t-04.tar"):
        store.put(f"w/{name}", b"x")
    assert list(found(source("/w/t-{00..01}.tar"))) == ["t-00.tar", "t-01.tar"]
    assert list(found(source("/w/t-*.tar"))) == ["t-00.tar", "t-01.tar", "t-03.tar"]
    assert list(found(source("/w/{t,u}-0[!13].tar"))) == ["t-00.tar", "u-00.tar"]
    assert list(found(source("/w{,/in}/t-?4.tar"))) == ["in/t-04.tar"]
    assert source("/w{,/in}/t-?4.tar").open("in/t-04.tar").read() == b"x"
    assert re.search(r"1 of the 4 files.*missing.*t-02\.tar", refused(lambda: found(source("/w/t-{00..03}.tar"))))
    assert "no such file" in refused(lambda: found(source("/w/v-*.tar")))
    assert "more than 100,000" in refused(lambda: found(source("/w/{0..200000}.tar")))


# --- reading


def test_any_way_of_reading_gives_the_objects_bytes(store: Any) -> None:
    store.put("big.bin", BIG)
    rng = np.random.default_rng(1)
    with source("/big.bin").open("big.bin") as file:
        assert file.seekable() and file.seek(0, io.SEEK_END) == len(BIG) and file.read(1) == b""
        for place, size in zip(rng.integers(0, len(BIG), 25), rng.integers(0, 900_000, 25), strict=True):
            assert file.seek(int(place)) == place
            assert file.read(int(size)) == BIG[place : place + size]
        file.seek(0)
        assert file.read() == BIG


def test_an_image_costs_one_request_for_its_state_and_one_for_its_bytes(store: Any) -> None:
    store.put("i/1.jpg", BIG[:20_000])
    images = source("/i")
    assert images.single is None
    store.proxy.counts()
    version = images.version("1.jpg")
    with images.open("1.jpg", version) as file:
        assert file.read(1 << 26) == BIG[:20_000]
    assert store.proxy.counts() == {"HEAD": 1, "GET": 1}
    with images.open("1.jpg", version) as file:
        assert file.read(1 << 26) == BIG[:20_000]
    assert store.proxy.counts() == {"HEAD": 1, "GET": 1}


def test_neighbouring_records_share_requests(store: Any) -> None:
    store.put("r.rec", BIG)
    with source("/r.rec").open("r.rec") as file:
        for at in range(0, len(BIG) - 20_000, 20_000):
            file.seek(at)
            assert file.read(20_000) == BIG[at : at + 20_000]
    asked = store.proxy.counts()
    assert asked["GET"] <= 8  # 450 records


def test_versions_are_the_servers_etags_and_asked_for_once(store: Any) -> None:
    store.put("a.zip", b"1")
    one = source("/a.zip")
    etag = store.client.head_object(Bucket=tools.BUCKET, Key="a.zip")["ETag"].strip('"')
    assert [one.version("a.zip") for _ in range(50)] == [etag] * 50
    assert store.proxy.counts()["HEAD"] <= 2


# --- faults that pass


@pytest.mark.parametrize(
    "fault",
    [(503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError"), ("drop", ""), ("cut", "")],
    ids=str,
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_passes_is_tried_again(store: Any, method: str, fault: tuple[int | str, str]) -> None:
    store.put("a/1.jpg", BIG[:50_000])
    store.proxy.faults.append(Fault(kind=fault[0], code=fault[1], method=method, path="1.jpg", times=2))
    assert source("/a").open("1.jpg").read() == BIG[:50_000]
    assert store.proxy.faults[0].times == 0 or fault[0] == "cut"


def test_listing_is_tried_again(store: Any) -> None:
    store.put("a/1.jpg", b"x")
    store.proxy.faults.append(Fault(kind=503, path="list-type", times=2))
    assert found(source("/a")) == {"1.jpg": 1}


def test_a_silent_server_is_asked_again(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_objects, "TIMEOUT_S", 1.0)
    store.put("a/1.jpg", b"data")
    store.proxy.faults.append(Fault(kind="slow", path="1.jpg"))
    assert source("/a").open("1.jpg").read() == b"data"
    store.proxy.released.set()


def test_a_body_that_ends_early_is_never_the_end_of_the_file(store: Any) -> None:
    store.put("a/1.jpg", BIG[:50_000])
    store.proxy.faults.append(Fault(kind="cut", path="1.jpg", times=100))
    file = source("/a").open("1.jpg")
    assert "the connection ended inside the answer" in refused(file.read)


@pytest.mark.parametrize("last", [b"\x5a", b"\xa5", b"\0"])
@pytest.mark.parametrize("size", [1, 2, 5000])
def test_an_answer_shorter_than_asked_for_is_never_filled_up(store: Any, size: int, last: bytes) -> None:
    """`pyarrow.fs` fills it with what was in memory; the last byte tells, whatever it is."""
    data = BIG[: size - 1] + last
    store.put("a/1.jpg", data)
    assert source("/a").open("1.jpg").read() == data
    store.proxy.faults.append(Fault(kind="short", path="1.jpg", times=2))
    assert source("/a").open("1.jpg").read() == data


def test_an_outage_stops_instead_of_rejecting_images(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    store.put("a/1.jpg", b"data")
    store.proxy.faults.append(Fault(kind=503, path="1.jpg", times=1000, method=""))
    with caplog.at_level(logging.INFO):
        text = refused(lambda: source("/a").open("1.jpg"))
    assert "s3://sets" in text and "503" in text and "run again" in text
    assert "attempt 2 of 5" in caplog.text and tools.SECRET not in caplog.text


# --- changes


def test_an_object_replaced_after_it_was_listed_is_refused(store: Any) -> None:
    store.put("a/1.jpg", b"first")
    version = source("/a").version("1.jpg")
    store.put("a/1.jpg", b"other")
    with pytest.raises(OSError, match=rf"changed since it was listed \(ETag {version}, now [0-9a-f]+\)"):
        source("/a").open("1.jpg", version)
    again = source("/a")
    again.version("1.jpg")
    store.put("a/1.jpg", b"third")
    again.open("1.jpg").close()
    with pytest.raises(OSError, match="changed since"):
        again.open("1.jpg")


def test_an_object_replaced_while_it_is_read_is_noticed(store: Any) -> None:
    store.put("r.rec", BIG)
    file = source("/r.rec").open("r.rec")
    assert file.read(1000) == BIG[:1000]
    store.proxy.faults.append(Fault(kind=lambda: store.put("r.rec", BIG[::-1]), path="r.rec"))
    with pytest.raises(OSError, match="changed since"):
        file.read()


@pytest.mark.parametrize("new", [b"", BIG[:1000]], ids=["empty", "shorter"])
def test_an_object_that_shrank_is_not_the_end_of_the_file(store: Any, new: bytes) -> None:
    store.put("a/1.jpg", BIG[:5000])
    file = source("/a").open("1.jpg")
    store.put("a/1.jpg", new)
    with pytest.raises(OSError, match="changed since"):
        file.read()


def test_a_deleted_object_is_an_error_of_its_own(store: Any) -> None:
    store.put("a/1.jpg", b"x")
    here = source("/a")
    file = here.open("1.jpg")
    store.client.delete_object(Bucket=tools.BUCKET, Key="a/1.jpg")
    for action in (file.read, lambda: here.open("1.jpg")):
        with pytest.raises(OSError, match="not there any more"):
            action()


# --- refusals


def test_a_missing_bucket_or_prefix_is_named(store: Any) -> None:
    assert "no such bucket" in refused(lambda: found(RemoteSource("s3://nobody-has-this/x")))
    assert "there is nothing" in refused(lambda: found(source("/none")))


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "AWS_ACCESS_KEY_ID.*`anonymous: true`"),
        (403, "InvalidAccessKeyId", "~/.aws/credentials"),
        (400, "ExpiredToken", "not expired"),
        (301, "PermanentRedirect", "another region.*AWS_REGION"),
    ],
)
def test_refusals_say_what_to_do(store: Any, status: int, code: str, words: str) -> None:
    store.put("a/1.jpg", b"data")
    opened = source("/a").open("1.jpg")
    store.proxy.faults.append(Fault(kind=status, code=code, times=1000, method=""))
    assert re.search(words, refused(lambda: found(source("/a"))), re.DOTALL)
    assert re.search(words, refused(lambda: source("/a").open("1.jpg")), re.DOTALL)
    assert re.search(words, refused(opened.read), re.DOTALL)


def test_without_credentials_the_message_says_where_they_are_looked_for(
    store: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.put("a/1.jpg", b"data")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "anonymous: true" in refused(lambda: source("/a").open("1.jpg"))
    with pytest.raises(FormatError):
        source("/a", anonymous=True).open("1.jpg")
    store.client.put_object_acl(Bucket=tools.BUCKET, Key="a/1.jpg", ACL="public-read")
    assert source("/a", anonymous=True).open("1.jpg").read() == b"data"


def test_no_network_is_said(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert re.search("no connection.*NETWORK_CONNECTION", refused(lambda: found(source("/a"))))


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_addresses_with_credentials_are_refused_and_not_repeated(scheme: str) -> None:
    for wrong in (f"AKIA:{tools.SECRET}@place/set", f"place/set.zip?x=1&X-Amz-Signature={tools.SECRET}"):
        text = refused(lambda wrong=wrong: open_source(f"{scheme}://{wrong}"))
        assert "must not hold a name, a password or a signature" in text


def test_addresses_that_cannot_be_read_as_meant_or_name_nothing_are_refused() -> None:
    for wrong, said in (
        (f"place/x.zip#{tools.SECRET}", "%23"),
        (f"me:a/{tools.SECRET}@place/x", "%2F"),
        (f"me:?{tools.SECRET}@place/x", "%3F"),
        (f"me:{tools.SECRET}@/x", "names no bucket or host"),
    ):
        assert said in refused(lambda wrong=wrong: open_source(f"https://{wrong}"))
    for stored in ("https://place/x.zip?…", "https://…@place/x.zip"):
        assert "Give the whole address" in refused(lambda stored=stored: open_source(stored))
    for uri in ("s3://", "s3:///key", "s3://b/\x00"):
        assert "names no bucket" in refused(lambda uri=uri: open_source(uri))


# --- through the formats


def test_a_set_in_a_bucket_is_the_set_in_a_folder(store: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for at in range(6):
            data = BIG[at * 3000 : at * 3000 + 2000]
            archive.writestr(f"id{at // 2}/{at}.jpg", data)
            path = tmp_path / "set" / f"id{at // 2}" / f"{at}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            store.put(f"set/id{at // 2}/{at}.jpg", data)
    store.put("set.zip", (tmp_path / "set.zip").read_bytes())
    base = records(str(tmp_path / "set"))
    assert len(base) == 6
    for uri in (f"s3://{tools.BUCKET}/set", f"s3://{tools.BUCKET}/set.zip", str(tmp_path / "set.zip")):
        assert records(uri) == base


def records(uri: str) -> dict[tuple[str, str | None], bytes]:
    form, listing = listed(SetConfig(uri=uri, format="zip" if uri.endswith("zip") else "folder"))
    made = {}
    with reader(form, uri) as opened:
        for entry in listing.entries:
            place = entry.place or entry.key
            with opened.open(place, opened.version(place)) as file:
                made[entry.key, entry.identity] = file.read()
    return made


# --- http


class Pages(BaseHTTPRequestHandler):
    """Files of a dict, by ranges; spoils answers as `Pages.faults` says."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    files: dict[str, bytes]
    faults: list[Any]
    asked: list[str]
    logins: list[str | None]
    etags = True

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.headers["Range"])
        fault = self.faults.pop(0) if self.faults else None
        if fault == "echo":
            self.close_connection = True
            self.wfile.write(self.raw_requestline)
            return None
        data = self.files.get(self.path)
        self.logins.append(self.headers["Authorization"])
        if self.path.startswith("/moved/"):
            return self.answer(302, b"", Location=self.path.removeprefix("/moved"))
        if self.path.startswith("/away/"):
            return self.answer(302, b"", Location=f"ftp://me:{tools.SECRET}@place/x")
        if isinstance(fault, int) or data is None:
            return self.answer(fault or 404, b"")
        if fault == "whole":
            return self.answer(200, data)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        if first >= len(data):
            return self.answer(416, b"", **{"Content-Range": f"bytes */{len(data)}"})
        part = data[first : last + 1]
        names = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}
        if self.etags:
            names["ETag"] = f'"{hash(data)}"'
        return self.answer(206, part, cut=fault == "cut", **names)

    def answer(self, status: int, data: bytes, cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(remote_faults, "PAUSE_S", 0.01)
    Pages.files = {"/s/big.rec": BIG, "/s/t-0.tar": b"zero", "/s/t-1.tar": b"one", "/s/none": b""}
    Pages.faults, Pages.asked, Pages.logins, Pages.etags = [], [], [], True
    with tools.served(ThreadingHTTPServer(("127.0.0.1", 0), Pages)) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}"


def test_a_file_of_a_web_server_is_read_by_ranges(web: str) -> None:
    one = open_source(f"{web}/s/big.rec")
    assert (one.single, [file.size for file in one.files()]) == ("big.rec", [len(BIG)])
    with one.open("big.rec", one.version("big.rec")) as file:
        file.seek(-1000, io.SEEK_END)
        assert file.read() == BIG[-1000:]
        file.seek(0)
        assert file.read() == BIG
    assert len(Pages.asked) <= 9
    assert open_source(f"{web}/s/none").open("none").read() == b""
    assert open_source(f"{web}/moved/s/t-1.tar").open("t-1.tar").read() == b"one"


def test_a_signed_address_is_read_whole_and_shown_cut(web: str) -> None:
    sign = f"X-Amz-Credential=a%2Fb/c&X-Amz-Signature={tools.SECRET}"
    Pages.files = {f"/s/t-{at}.tar?{sign}": data for at, data in enumerate((b"zero", b"one"))}
    two = RemoteSource(f"{web}/s/t-{{0..1}}.tar?{sign}")
    assert two.uri == f"{web}/s/t-{{0..1}}.tar?…"
    assert found(two) == {"t-0.tar": 4, "t-1.tar": 3} and two.open("t-1.tar").read() == b"one"
    again = pickle.loads(pickle.dumps(two))
    assert again.uri == two.uri and again.open("t-0.tar").read() == b"zero"
    one = RemoteSource(f"{web}/s/t-0.tar?{sign}")
    assert (one.single, found(one)) == ("t-0.tar", {"t-0.tar": 4})
    Pages.faults = [403] * 2
    assert "sign the address again" in refused(lambda: RemoteSource(f"{web}/s/t-0.tar?{sign}").open("t-0.tar"))
    Pages.faults = [503] * 50
    assert "503" in refused(lambda: RemoteSource(f"{web}/s/t-0.tar?{sign}").open("t-0.tar"))


def test_a_server_that_repeats_the_request_is_not_quoted(web: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    Pages.faults = ["echo"] * 50
    text = refused(lambda: RemoteSource(f"{web}/s/t-0.tar?X-Amz-Signature={tools.SECRET}").open("t-0.tar"))
    assert "not that of a web server" in text and tools.SECRET not in caplog.text


def test_a_name_and_a_password_go_to_their_own_server_only(web: str) -> None:
    with_login = web.replace("://", f"://m%40e:{tools.SECRET}%3F@")
    one = RemoteSource(f"{with_login}/s/t-1.tar")
    assert one.uri == web.replace("://", "://…@") + "/s/t-1.tar"
    assert one.open("t-1.tar").read() == b"one"
    assert {b64decode(login.removeprefix("Basic ")) for login in Pages.logins} == {f"m@e:{tools.SECRET}?".encode()}
    Pages.logins.clear()
    assert RemoteSource(f"{with_login}/moved/s/t-1.tar").open("t-1.tar").read() == b"one"
    assert None in Pages.logins  # where it was sent to is asked without


def test_patterns_name_files_of_a_web_server(web: str) -> None:
    two = RemoteSource(f"{web}/s/t-{{0..1}}.tar")
    assert found(two) == {"t-0.tar": 4, "t-1.tar": 3} and two.open("t-1.tar").read() == b"one"
    assert "t-2.tar" in refused(lambda: found(RemoteSource(f"{web}/s/t-{{0..2}}.tar")))
    for wrong in ("/s/", "/s/absent.zip", "/s/*.tar"):
        assert "cannot be listed over http" in refused(lambda wrong=wrong: found(RemoteSource(web + wrong)))


@pytest.mark.parametrize("fault", [503, 429, 500, "cut"])
def test_what_passes_on_a_web_server_is_tried_again(web: str, fault: int | str) -> None:
    Pages.faults = [fault, fault] if fault != "cut" else [None, "cut", "cut"]
    assert RemoteSource(f"{web}/s/big.rec").open("big.rec").read(5000) == BIG[:5000]


def test_a_web_server_that_fails_stops_the_stage(web: str) -> None:
    file = RemoteSource(f"{web}/s/t-0.tar").open("t-0.tar")
    Pages.faults = ["cut"] * 50
    assert "2 of 4 bytes" in refused(file.read)
    Pages.faults = [403] * 2
    assert "HTTP 403" in refused(lambda: RemoteSource(f"{web}/s/t-0.tar").open("t-0.tar"))
    Pages.faults = ["whole"]
    assert "parts of a file" in refused(lambda: RemoteSource(f"{web}/s/t-0.tar").open("t-0.tar"))
    assert "not followed" in refused(lambda: RemoteSource(f"{web}/away/x").open("x"))


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_replaced_on_a_web_server_is_noticed(web: str, etags: bool) -> None:
    Pages.etags = etags
    one = RemoteSource(f"{web}/s/big.rec")
    file, version = one.open("big.rec"), one.version("big.rec")
    assert file.read(10) == BIG[:10]
    Pages.files["/s/big.rec"] = BIG[:0:-1]
    with pytest.raises(OSError, match="changed since"):
        file.read()
    if etags:
        with pytest.raises(OSError, match="changed since"):
            RemoteSource(f"{web}/s/big.rec").open("big.rec", version)


def test_an_answer_that_drips_is_given_up(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RemoteSource(f"{web}/s/big.rec").open("big.rec")
    monkeypatch.setattr(remote_http, "ANSWER_S", -1.0)
    assert "takes too long" in refused(file.read)


# --- gs


class Google(Pages):
    """The two calls of the JSON interface that reading needs, with two objects on a page."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if not parts.path.startswith("/storage/v1/b/sets/o"):
            return self.answer(404, b"{}")
        if parts.path != "/storage/v1/b/sets/o":
            self.path = unquote(parts.path.removeprefix("/storage/v1/b/sets/o"))
            return super().do_GET() if parts.query == "alt=media" else self.answer(400, b"")
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        keys = sorted(key[1:] for key in self.files if key[1:].startswith(asked.get("prefix", "")))
        at = int(asked.get("pageToken", 0))
        page: dict[str, Any] = {"nextPageToken": str(at + 2)} if at + 2 < len(keys) else {}
        page["items"] = [{"name": key, "size": str(len(self.files["/" + key]))} for key in keys[at : at + 2]]
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return self.answer(fault, b"")
        return self.answer(200, json.dumps(page).encode(), cut=fault == "cut")


@pytest.fixture
def google(web: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Pages.files = {f"/{key}": data for key, data in zip(KEYS, (b"1", b"", b"22", b"333", BIG), strict=True)}
    with tools.served(ThreadingHTTPServer(("127.0.0.1", 0), Google)) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
        yield


KEYS = ("set/1.jpg", "set/a/", "set/a/ü 2+.jpg", "set/b/c/3.jpg", "settled.rec")


def test_a_bucket_of_google_is_listed_and_read(google: None) -> None:
    Pages.faults = [503, None, "cut"]
    place = RemoteSource("gs://sets/set", anonymous=True)
    assert found(place) == {"1.jpg": 1, "a/ü 2+.jpg": 2, "b/c/3.jpg": 3}
    assert place.open("a/ü 2+.jpg", place.version("a/ü 2+.jpg")).read() == b"22"
    assert found(RemoteSource("gs://sets/{set/1.jpg,settled.*}")) == {"set/1.jpg": 1, "settled.rec": len(BIG)}
    one = RemoteSource("gs://sets/settled.rec")
    assert one.single == "settled.rec"
    with one.open("settled.rec") as file:
        assert file.read(1000) == BIG[:1000]
        Pages.files["/settled.rec"] = BIG[::-1]
        with pytest.raises(OSError, match="changed since"):
            file.read()


def test_refusals_of_google_say_what_to_do(google: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such bucket" in refused(lambda: found(RemoteSource("gs://other/set")))
    assert "there is nothing" in refused(lambda: found(RemoteSource("gs://sets/none")))
    Pages.faults = [403] * 5
    assert "HTTP 403" in refused(lambda: RemoteSource("gs://sets/set").open("1.jpg"))
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setitem(sys.modules, "google.auth", None)
    assert "Install unveil[gs]" in refused(lambda: RemoteSource("gs://sets/set"))
