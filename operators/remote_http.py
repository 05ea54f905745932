"""Files of a web server, by requests for ranges.

Only reading; of credentials, those in the set's address are sent, to its host alone, and none else. Each answer must be
of the state of the file that was opened, by its ETag or, where the server has none, its date and size; a shorter answer
than promised is never taken for the file's end.
"""

import http.client
import re
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from email.message import Message
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from operators.errors import FormatError
from operators.remote_faults import TRY_AGAIN, Gone, Passing, changed, persistently, shown
from operators.remote_objects import Found, size_of, sizes

TIMEOUT_S = 20.0
"""Longest silence of the other side."""
ANSWER_S = 300.0
"""Longest time for one answer."""
PARTIAL, BEYOND = 206, 416
MOST_BYTES = 64 << 20
"""Of an answer that is no part of a file."""
_AS_GIVEN = "".join(map(chr, range(0x21, 0x7F)))
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+)")


class Server:
    """The files below one address; the same methods as `operators.remote_objects.Bucket`."""

    def __init__(self, scheme: str, host: str, query: str = "") -> None:
        """Prepare for requests and make none.

        Parameters
        ----------
        scheme
            http or https.
        host
            Its name and port, and before an `@` the name and password to give it.
        query
            What follows `?` in the address of every file: a signature.
        """
        login, _, host = host.rpartition("@")
        self.shown = f"{scheme}://{host}"
        self._query = f"?{quote(query, safe=_AS_GIVEN)}" if query else ""
        self._login = {"Authorization": f"Basic {_encoded(login)}"} if login else {}
        self._opener: OpenerDirector = build_opener(_Redirects(scheme))

    def sizes(self, keys: Sequence[str]) -> Iterator[tuple[str, int | None]]:
        """Each path with the size of its file, None where there is no such file; one request each."""
        return sizes(self.size, keys)

    def size(self, key: str) -> int | None:
        """Size of a file, or None if the server has none at this path."""
        return size_of(self.open, key)

    def open(self, key: str) -> "Page":
        """The file as it is now; Gone if there is none, FormatError if the server refuses or knows no ranges."""
        return Page(self, key)

    def listed(self, folder: str) -> Iterator[Found]:
        """FormatError: the protocol has no listing."""
        raise FormatError(
            f"{self.shown}/{folder}: no such file, and folders cannot be listed over http. Name a file, or files by a "
            f"pattern such as `train-{{0000..0031}}.tar`."
        )

    def url(self, key: str) -> str:
        """The address of a file."""
        return f"{self.shown}/{quote(key, safe='/%:@!$&()*+,;=~-._' + chr(39))}{self._query}"

    def headers(self) -> dict[str, str]:
        """What is sent besides the range."""
        return self._login

    def answer(self, key: str, offset: int, size: int) -> "Answer":
        """The answer to one request for a range; Passing, Gone, FormatError."""
        wanted = {"Accept-Encoding": "identity", "Range": f"bytes={offset}-{offset + size - 1}"}
        status, headers, data = self._sent(self.url(key), wanted, size)
        if status not in (PARTIAL, BEYOND):
            raise FormatError(
                f"{self.shown}/{key}: the server cannot send parts of a file. Fetch it and give its path."
            )
        return Answer(headers, data, offset)

    def whole(self, url: str) -> bytes:
        """A whole answer, such as a page of a listing; Passing, Gone, FormatError."""
        _, headers, data = self._sent(url, {"Accept-Encoding": "identity"}, MOST_BYTES)
        if len(data) < int(headers.get("Content-Length") or 0):
            raise Passing("the connection ended inside the answer")
        return data

    def _sent(self, url: str, wanted: dict[str, str], most: int) -> tuple[int, Message, bytes]:
        """Status, headers and at most `most` bytes of one answer."""
        request = Request(url, headers={"User-Agent": "unveil", **wanted})  # noqa: S310
        for name, value in self.headers().items():
            request.add_unredirected_header(name, value)  # credentials are for this host alone
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                body = _body(answer, most) if answer.status == PARTIAL or "Range" not in wanted else b""
                return answer.status, answer.headers, body
        except HTTPError as error:
            with error:
                if error.code == BEYOND:
                    return BEYOND, error.headers, b""
                raise _refused(shown(url), error.code, bool(self.headers()), bool(self._query)) from None
        except URLError as error:
            raise Passing(_reason(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, Passing | Gone):
                raise
            raise Passing(_reason(error)) from error


class Answer:
    """A part of a file, and what the server says of the whole."""

    def __init__(self, headers: Message, data: bytes, offset: int) -> None:
        match = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if match is None or (data and int(match[1] or -1) != offset):
            raise Passing("the server does not say which part of the file it sends")
        self.size, self.data = int(match[2]), data
        etag = headers.get("ETag", "").removeprefix("W/").strip('"')
        self.etag: str | None = etag or headers.get("Last-Modified")


class Page:
    """One state of a file on a web server; a `Remote`."""

    def __init__(self, server: Server, key: str) -> None:
        self._server, self._key = server, key
        first = persistently(lambda: server.answer(key, 0, 1), server.shown)
        self.size, self.etag = first.size, first.etag

    def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes of this state; Gone, FormatError."""
        return persistently(lambda: self._exactly(offset, size), self._server.shown)

    def _exactly(self, offset: int, size: int) -> bytes:
        answer = self._server.answer(self._key, offset, size)
        if (answer.etag, answer.size) != (self.etag, self.size):
            raise changed(self.etag, answer.etag)
        if len(answer.data) != size:
            raise Passing(f"{len(answer.data):,} of {size:,} bytes came")
        return answer.data


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to http and https, and from https to https only."""

    def __init__(self, scheme: str) -> None:
        self._allowed = ("https",) if scheme == "https" else ("http", "https")

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Request | None:
        """The request to go on with; FormatError for a scheme that is not allowed."""
        parts = urlsplit(newurl)
        if parts.scheme.lower() not in self._allowed or "@" in parts.netloc:
            fp.close()
            raise FormatError(f"{shown(req.full_url)}: redirects to {shown(newurl)}, which is not followed.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _body(answer: http.client.HTTPResponse, size: int) -> bytes:
    """The answer's body, not more than `size` bytes and not for longer than `ANSWER_S`."""
    end, parts, left = time.monotonic() + ANSWER_S, [], size
    while left and (data := answer.read1(min(left, 1 << 20))):
        parts.append(data)
        left -= len(data)
        if time.monotonic() > end:
            raise Passing("the answer takes too long")
    return b"".join(parts)


def _encoded(login: str) -> str:
    """Name and password as RFC 7617 sends them."""
    return b64encode(unquote(login).encode()).decode()


def _refused(url: str, status: int, credentials: bool, signed: bool) -> Exception:
    if status in (404, 410):
        return Gone(f"it is not there (HTTP {status})")
    if status in TRY_AGAIN or status > 500:
        return Passing(f"the server answers {status}")
    if status in (401, 403):
        said = "Give credentials that may list and read it" if credentials else "No credentials were sent"
        said = "What follows `?` may have expired: sign the address again" if signed else said
        return FormatError(f"{url}: reading is refused (HTTP {status}). {said}, or fetch it and give its path.")
    return FormatError(f"{url}: the server answers {status}. Correct the set's `uri`.")


def _reason(error: object) -> str:
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, OSError):
        return "the answer is not that of a web server"  # it can hold the request, with its signature
    return (str(error).splitlines() or [type(error).__name__])[0]
