"""Who may talk to the review page: a browser on this machine that was given the link, and nobody else.

The page listens on the loopback address only. The link carries a token of 128 bits behind `#`, which browsers do not
send along; the page hands it in once, and gets a cookie for it. Requests under another host name are refused, so that
no foreign name can be bound to the page (DNS rebinding), and writing needs a second token, which only the page itself
can read.
"""

import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = "127.0.0.1"
MAX_BODY = 16_384
"""Bytes of a request."""

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), display-capture=()",
}
"""On every response; a page has a content policy of its own."""


@dataclass(slots=True)
class Visit:
    """One browser that has been let in."""

    cookie: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    name: str | None = None
    role: str | None = None
    used: float = 0.0


class Door:
    """Lets in one browser per link, and locks again after a while without use.

    `announce` is given the token of each new link: the first one, and one more whenever the door has locked.
    """

    def __init__(
        self, announce: Callable[[str], None], idle_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.announce, self.idle_s, self.clock = announce, idle_s, clock
        self._lock = threading.Lock()
        self._visit: Visit | None = None
        self._token: str | None = None
        self._new_link()

    def _new_link(self) -> None:
        self._token = secrets.token_urlsafe(16)
        self.announce(self._token)

    def enter(self, token: str) -> Visit | None:
        """The visit that this token opens; None if it is not the token, or has been used."""
        with self._lock:
            if self._token is None or not hmac.compare_digest(_bytes(token), _bytes(self._token)):
                return None
            self._token, self._visit = None, Visit(used=self.clock())
            return self._visit

    def visit(self, cookie: str | None) -> Visit | None:
        """The visit of this cookie, if it is still open; counts as use."""
        with self._lock:
            open_now = self._visit
            if open_now is None or cookie is None or not hmac.compare_digest(_bytes(cookie), _bytes(open_now.cookie)):
                return None
            if self.clock() - open_now.used > self.idle_s:
                self._visit = None
                self._new_link()
                return None
            open_now.used = self.clock()
            return open_now


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def cookie_name(port: int) -> str:
    """Cookies do not know ports, so the name does."""
    return f"unveil_review_{port}"


class Guard:
    """Around the application: checks host, origin, cookie and second token, and puts the headers on every answer."""

    OPEN = (("GET", "/"), ("POST", "/enter"))
    """What is answered without a cookie. Both say nothing of the audit."""

    def __init__(self, app: ASGIApp, door: Door, port: int) -> None:
        self.app, self.door, self.port = app, door, port
        self.hosts = {f"{LOOPBACK}:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        app = self.app if refusal is None else JSONResponse({"error": refusal[1]}, refusal[0])
        await app(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, where a request is not let through; the visit is put into the scope where it is."""
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        host = headers.getlist("host")
        if len(host) != 1 or host[0].lower() not in self.hosts:
            return 403, "This page answers under its own address only."
        if method not in ("GET", "HEAD", "POST"):
            return 405, "Not a method of this page."
        visit = self.door.visit(Request(scope).cookies.get(cookie_name(self.port)))
        scope["visit"] = visit
        if visit is None and (method, path) not in self.OPEN:
            return 401, "Locked. Open the newest link that the terminal shows."
        return self._write_refusal(headers, path, visit) if method == "POST" else None

    def _write_refusal(self, headers: Headers, path: str, visit: Visit | None) -> tuple[int, str] | None:
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in {f"http://{host}" for host in self.hosts}:
            return 403, "Not sent by this page."
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return 403, "Not sent by this page."
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return 415, "Only JSON is taken."
        if not headers.get("content-length", "").isdigit() or int(headers["content-length"]) > MAX_BODY:
            return 413, f"A request has a length, of at most {MAX_BODY} bytes."
        given = headers.get("x-csrf-token", "")
        if path != "/enter" and (visit is None or not hmac.compare_digest(_bytes(given), _bytes(visit.csrf))):
            return 403, "The token of the page is missing or old. Load the page again."
        return None
