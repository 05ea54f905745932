"""The review page: what it answers and to whom, that a kill loses nothing, and one whole review in a real browser."""

import asyncio
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from operators.reviewing import Label, framed
from pipeline.review_app import ReviewPage, application, bound, serve
from pipeline.review_guard import Door
from pipeline.review_store import Item, ReviewStore

pytestmark = pytest.mark.usefixtures("closed_connections")

PORT = 8080
HOST = f"127.0.0.1:{PORT}"
SECRET_KEYS = ["someone/secret-photo.jpg", "release/0001.png"]


def items(swapped: bool = False, count: int = 4) -> list[Item]:
    """Pairs under fixed ids; `swapped` has other arms, keys and scores."""
    arms = ("control", "training") if swapped else ("training", "control")
    keys = [f"swapped-{one}" for one in SECRET_KEYS] if swapped else SECRET_KEYS
    return [
        Item(f"{at + 10:032x}", arms[at % 2], 70 + at, keys[1], keys[0], 0.625 + at + swapped) for at in range(count)
    ]


IDS = [one.item for one in items()]


def picture(item: str, side: str, part: str) -> bytes | None:
    shade = int(item, 16) * 10 % 256
    pixels = np.full((8, 8, 3), (shade, 90, 200) if side == "real" else (40, shade, 120), np.uint8)
    return framed(pixels, 224 if part == "face" else 640)


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Browser:
    """Sends requests to the application itself, and keeps the cookie and the page's token."""

    def __init__(self, folder: Path, given: list[Item], reviewers: int = 1, **options: Any) -> None:
        self.store = ReviewStore(folder / "review.sqlite")
        self.store.begin({"reviewers": reviewers}, given)
        self.links: list[str] = []
        self.asked = 0
        door = Door(self.links.append, 60)
        self.page = ReviewPage(self.store, picture, self.result, door, PORT, **({"whole": True} | options))
        self.app, self.cookie, self.csrf = application(self.page), "", ""
        self.answers: list[Answer] = []

    def result(self) -> dict[str, Any]:
        self.asked += 1
        return {}

    def __call__(self, method: str, path: str, body: Any = None, **headers: str | None) -> Answer:
        sent = {"host": HOST, "cookie": self.cookie, "x-csrf-token": self.csrf}
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        if method == "POST":
            sent |= {"content-type": "application/json", "content-length": str(len(data)), "origin": f"http://{HOST}"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        answer = asyncio.run(self._ask(method, path, data, {k: v for k, v in sent.items() if v is not None}))
        self.answers.append(answer)
        return answer

    async def _ask(self, method: str, path: str, data: bytes, headers: dict[str, str]) -> Answer:
        got: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message: Any) -> None:
            got.append(message)

        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
                 "headers": raw, "http_version": "1.1", "scheme": "http", "root_path": ""}  # fmt: skip
        await self.app(scope, receive, send)
        told = [(name.decode(), value.decode()) for name, value in got[0]["headers"]]
        return Answer(got[0]["status"], told, b"".join(part.get("body", b"") for part in got[1:]))

    def enter(self) -> None:
        made = self("POST", "/enter", {"token": self.links[-1]})
        assert made.status == 204
        cookie = SimpleCookie(dict(made.headers)["set-cookie"])
        ((name, morsel),) = cookie.items()
        assert morsel["httponly"] and morsel["samesite"].lower() == "strict" and not morsel["domain"]
        self.cookie = f"{name}={morsel.value}"
        self.csrf = re.search(rb'const csrf = "([^"]+)"', self("GET", "/").body)[1].decode()  # type: ignore[index]

    def sign_in(self, name: str, role: str = "reviewer") -> None:
        assert self("POST", "/sign-in", {"name": name, "role": role}).status == 204

    def label(self, item: str, label: str | None, note: str = "") -> Answer:
        return self("POST", "/decide", {"item": item, "label": label, "note": note})


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    made = Browser(tmp_path, items())
    made.enter()
    made.sign_in("Ada")
    return made


def whole_review(browser: Browser) -> None:
    """Every request that there is, up to the moment before unblinding, good and bad ones."""
    browser("GET", "/")
    browser("POST", "/enter", {"token": "wrong"})
    browser.enter()
    for name, labels in (("Ada", Label), ("Bob", reversed(Label))):
        browser.sign_in(name)
        browser("GET", "/")
        browser("GET", "/state")
        for item, label in zip(IDS, labels, strict=False):
            browser.label(item, label, "seen")
            for side in ("release", "real"):
                for part in ("face", "whole"):
                    browser("GET", f"/picture/{item}/{side}/{part}")
        browser("POST", "/undo", {})
        browser.label(IDS[3], "near_copy")
        browser.label("f" * 32, "different")
        browser.label(IDS[0], "training")
        browser("POST", "/sign-in", {"name": "Cid", "role": "reviewer"}) if name == "Bob" else None
        browser("POST", "/sign-out", {})
    browser.sign_in("Cid", "adjudicator")
    browser("GET", "/")
    browser("GET", "/state")
    browser("POST", "/unblind", {})
    for path in ("/results", "/review.json", "/review.sqlite", "/static", "/picture/", "/..%2freview.sqlite", "/../x"):
        browser("GET", path)


def test_no_answer_before_unblinding_depends_on_arm_key_or_score(tmp_path: Path) -> None:
    """The same requests to a review whose pairs have the other arms, keys and scores get the same bytes."""
    seen = []
    for swapped in (False, True):
        browser = Browser(tmp_path / str(swapped), items(swapped), reviewers=2)
        whole_review(browser)
        random = [browser.csrf, browser.cookie.partition("=")[2], *browser.links]
        texts = []
        for answer in browser.answers:
            text = f"{answer.status} {answer.headers} ".encode() + answer.body
            for token in random:
                text = text.replace(token.encode(), b"TOKEN")
            texts.append(re.sub(rb"nonce(-|=\")[\w-]{22}", b"NONCE", text))
        seen.append(texts)
    assert seen[0] == seen[1] and len(seen[0]) > 60
    everything = b"".join(seen[0])
    for one in items():
        for secret in (one.arm, one.real_key, one.release_key, str(one.score), "sqlite", str(tmp_path)):
            assert not re.search(rb"(?<!cache-)\b" + re.escape(secret.encode()) + rb"\b", everything), secret
    assert browser.asked == 0


def test_all_pictures_have_one_format_and_size(browser: Browser) -> None:
    for part, side in (("face", 224), ("whole", 640)):
        for item in IDS:
            for of in ("release", "real"):
                answer = browser("GET", f"/picture/{item}/{of}/{part}")
                image = PIL.Image.open(io.BytesIO(answer.body))
                assert (image.format, image.size, image.info) == ("PNG", (side, side), {})
                assert dict(answer.headers)["content-type"] == "image/png"


def test_every_answer_carries_the_headers(tmp_path: Path) -> None:
    browser = Browser(tmp_path, items(), reviewers=2)
    whole_review(browser)
    for answer in browser.answers:
        headers = {name.lower(): value for name, value in answer.headers}
        assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer" and headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin" and "server" not in headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert "access-control-allow-origin" not in headers
    pages = [answer.body.decode() for answer in browser.answers if b"<!DOCTYPE html>" in answer.body]
    assert len(pages) >= 5
    for page in pages:
        assert not re.search(r"<(script|style)(?! nonce=)", page) and not re.search(
            r"\son\w+=|style=\"|https?://", page
        )


@pytest.mark.parametrize(
    ("method", "path", "changed", "status"),
    [
        ("GET", "/state", {"cookie": None}, 401),
        ("GET", "/state", {"cookie": "unveil_review_8080=wrong"}, 401),
        ("GET", f"/picture/{IDS[0]}/real/face", {"cookie": None}, 401),
        ("GET", "/results", {"cookie": None}, 401),
        ("HEAD", "/", {"cookie": None}, 401),
        ("GET", "/", {"host": "evil.example"}, 403),
        ("GET", "/", {"host": f"evil.example:{PORT}"}, 403),
        ("GET", "/", {"host": "127.0.0.1"}, 403),
        ("GET", "/", {"host": f"127.0.0.1.evil.example:{PORT}"}, 403),
        ("GET", "/", {"host": None}, 403),
        ("GET", "/", {"host": f"localhost:{PORT}"}, 200),
        ("POST", "/decide", {"x_csrf_token": None}, 403),
        ("POST", "/decide", {"x_csrf_token": "wrong"}, 403),
        ("POST", "/decide", {"origin": "http://evil.example"}, 403),
        ("POST", "/decide", {"origin": "null"}, 403),
        ("POST", "/decide", {"origin": "http://127.0.0.1:9999"}, 403),
        ("POST", "/decide", {"sec_fetch_site": "cross-site"}, 403),
        ("POST", "/decide", {"sec_fetch_site": "same-site"}, 403),
        ("POST", "/decide", {"content_type": "text/plain"}, 415),
        ("POST", "/decide", {"content_type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/decide", {"content_length": "20000"}, 413),
        ("POST", "/decide", {"content_length": None}, 413),
        ("POST", "/enter", {"origin": "http://evil.example", "cookie": None}, 403),
        ("POST", "/unblind", {"x_csrf_token": None}, 403),
        ("PUT", "/decide", {}, 405),
        ("OPTIONS", "/decide", {}, 405),
        ("POST", "/results", {}, 405),
        ("GET", "/decide", {}, 405),
        ("GET", "/results", {}, 409),
        ("GET", "/nothing", {}, 404),
        ("GET", f"/picture/{IDS[0]}/real/thumb", {}, 404),
        ("GET", f"/picture/{IDS[0]}/training/face", {}, 404),
        ("GET", "/picture/..%2f..%2fetc/real/face", {}, 404),
    ],
)
def test_what_does_not_come_from_the_page_is_refused(
    browser: Browser, method: str, path: str, changed: dict[str, str | None], status: int
) -> None:
    before = browser.store.events()
    body = {"item": IDS[0], "label": "near_copy", "note": "", "early": True} if method == "POST" else None
    assert browser(method, path, body, **changed).status == status
    assert browser.store.events() == before


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"1", b"\xff", b"[" * 9000, {"item": IDS[0]}, {"item": 3, "label": None, "note": ""},
     {"item": IDS[0], "label": "maybe", "note": ""}, {"item": IDS[0], "label": ["near_copy"], "note": ""},
     {"item": IDS[0], "label": None, "note": "\ud800"}],
)  # fmt: skip
def test_bodies_that_make_no_sense_are_refused(browser: Browser, body: Any) -> None:
    before = browser.store.events()
    assert browser("POST", "/decide", body).status == 422
    assert browser.store.events() == before


def test_nothing_is_shown_before_sign_in(tmp_path: Path) -> None:
    browser = Browser(tmp_path, items())
    browser.enter()
    for method, path in (("GET", "/state"), ("GET", f"/picture/{IDS[0]}/real/face"), ("POST", "/undo")):
        assert browser(method, path, {} if method == "POST" else None).status == 401
    assert browser("POST", "/sign-in", {"name": " ", "role": "reviewer"}).status == 409
    assert IDS[0].encode() not in browser("GET", "/").body


def test_reviewers_do_not_see_each_other_and_the_adjudicator_sees_disagreements_only(tmp_path: Path) -> None:
    browser = Browser(tmp_path, items(), reviewers=2)
    browser.enter()
    for name, labels in (("Ada", (1, 2, 3, 4)), ("Bob", (1, 4, 3, 0))):
        browser.sign_in(name)
        assert [one["label"] for one in browser("GET", "/state").json["items"]] == [None] * 4
        for item, at in zip(IDS, labels, strict=True):
            state = browser.label(item, list(Label)[at], f"of {name}").json
        assert {one["note"] for one in state["items"]} == {f"of {name}"} and state["settled"] is False
    browser.sign_in("Cid", "adjudicator")
    state = browser("GET", "/state").json
    assert [(one["id"], one["given"]) for one in state["items"]] == [
        (IDS[1], ["look_alike", "unusable"]),
        (IDS[3], ["near_copy", "unusable"]),
    ]
    assert browser("POST", "/unblind", {}).status == 409 and browser.asked == 0
    for item in (IDS[1], IDS[3]):
        state = browser.label(item, "same_person").json
    assert state["settled"] is True and browser("POST", "/unblind", {}).status == 204 and browser.asked == 1
    assert browser.label(IDS[1], "different").status == 409


def test_the_way_to_whole_images_can_be_closed(tmp_path: Path) -> None:
    browser = Browser(tmp_path, items(), whole=False)
    browser.enter()
    browser.sign_in("Ada")
    assert b'id="zoom"' not in browser("GET", "/").body
    assert browser("GET", f"/picture/{IDS[0]}/real/whole").status == 404
    assert browser("GET", f"/picture/{IDS[0]}/real/face").status == 200


def test_a_name_cannot_break_out_of_the_page(browser: Browser) -> None:
    browser.sign_in("Ada")
    browser.page.reviewers = 2
    browser.sign_in("</script><b>x")
    page = browser("GET", "/").body.decode()
    assert "<b>x" not in page and "&lt;/script&gt;&lt;b&gt;x" in page


def test_the_server_listens_on_this_machine_only() -> None:
    with bound(0) as made:
        assert made.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError), bound(made.getsockname()[1]):
            pass
    with socket.socket() as wide:
        wide.bind(("0.0.0.0", 0))
        with pytest.raises(ValueError, match=r"listening must be bound to 127\.0\.0\.1"):
            serve(lambda *_: None, wide)  # type: ignore[arg-type, return-value]


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_and_controls_have_enough_contrast_in_light_and_dark(root: Path) -> None:
    style = (root / "pipeline" / "templates" / "review_style.css").read_text()
    palettes = [dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root \{([^}]*)\}", style)]
    assert len(palettes) == 2
    texts = [("ink", "page"), ("ink", "soft"), ("muted", "page"), ("accent", "page"), ("on-accent", "accent")]
    for palette in palettes:
        for front, back, least in [(*pair, 4.5) for pair in [*texts, ("warn", "warn-soft")]] + [("edge", "page", 3)]:
            first, second = sorted((luminance(palette[front]), luminance(palette[back])), reverse=True)
            assert (first + 0.05) / (second + 0.05) >= least, (front, back)


SERVER = """
import sys
from pathlib import Path
from tests_review_app import picture
from pipeline.review_app import ReviewPage, application, bound, serve
from pipeline.review_guard import Door
from pipeline.review_store import ReviewStore
from pipeline.review_results import results
from types import SimpleNamespace
folder = Path(sys.argv[1])
store = ReviewStore(folder / "review" / "review.sqlite")
with bound(0) as listening:
    port = listening.getsockname()[1]
    door = Door(lambda token: print(f"http://127.0.0.1:{port}/#{token}", flush=True), 900)
    run = SimpleNamespace(folder=folder)
    serve(application(ReviewPage(store, picture, lambda: results(run, store), door, port, whole=True)), listening)
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], str]]]:
    """Start the server of the review in `tmp_path` as a process; gives it and its link."""
    begun: list[subprocess.Popen[str]] = []
    script = SERVER.replace("tests_review_app", Path(__file__).stem)
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, folders))

    def start() -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", script, str(tmp_path)]
        made = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
        begun.append(made)
        assert made.stdout is not None
        return made, made.stdout.readline().strip()

    yield start
    for one in begun:
        one.kill()
        one.wait()
        assert one.stdout is not None
        one.stdout.close()


FACTS = {"reviewers": 2, "people": "0", "drawn_at": "", "tested": {"training": 40, "control": 40}, "passed_over": {}}


def test_a_killed_server_has_lost_no_confirmed_decision(tmp_path: Path, started: Any) -> None:
    given = items(count=40)
    store = ReviewStore(tmp_path / "review" / "review.sqlite")
    store.begin(FACTS, given)
    confirmed: list[tuple[str, str, str]] = []
    for kill_after in (7, 23):
        server, link = started()
        address, token = re.fullmatch(r"http://([\d.:]+)/#(\S+)", link).groups()  # type: ignore[union-attr]
        line = http.client.HTTPConnection(address, timeout=10)

        def post(path: str, body: Any, line: http.client.HTTPConnection = line, **headers: str) -> Any:
            line.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
            answer = line.getresponse()
            return answer, answer.read()

        cookie = post("/enter", {"token": token})[0].headers["set-cookie"].partition(";")[0]
        line.request("GET", "/", headers={"Cookie": cookie})
        csrf = re.search(rb'const csrf = "([^"]+)"', line.getresponse().read())[1].decode()  # type: ignore[index]
        known = {"Cookie": cookie, "X-CSRF-Token": csrf}
        post("/sign-in", {"name": "Ada", "role": "reviewer"}, **known)
        begun = len(confirmed)
        killer = threading.Event()
        threading.Thread(target=lambda: (killer.wait(20), server.send_signal(signal.SIGKILL))).start()  # noqa: B023
        try:
            for at in range(100_000):
                decision = (given[at % 40].item, list(Label)[at % 5].value, f"{kill_after}-{at}")
                answer, _ = post("/decide", dict(zip(("item", "label", "note"), decision, strict=True)), **known)
                assert answer.status == 200
                confirmed.append(decision)
                if len(confirmed) - begun == kill_after:
                    killer.set()
        except (OSError, http.client.HTTPException):
            pass
        line.close()
        assert server.wait(10) == -signal.SIGKILL
    kept = [(one.item, one.label, one.note) for one in ReviewStore(store.path).events() if one.kind == "decide"]
    assert [one for one in kept if one in set(confirmed)] == confirmed and len(confirmed) >= 30
    assert len(kept) - len(confirmed) <= 2  # one of each server may have been on disk and not yet answered


def axe(folder: Path) -> str | None:
    """The source of axe-core (MPL 2.0), where npm can give it; it stays in the test's folder."""
    if shutil.which("npm") is None:
        return None
    command = ["npm", "pack", "--silent", "--prefer-offline", "axe-core@4.14.1"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=8)
    except (subprocess.SubprocessError, OSError):
        return None
    import tarfile

    with tarfile.open(next(folder.glob("axe-core-*.tgz"))) as packed:
        file = packed.extractfile("package/axe.min.js")
        return None if file is None else file.read().decode()


def accessible(page: Any, source: str | None) -> None:
    """Every control has a name, nothing is wider than the window, and axe-core, where it is there, finds nothing."""
    nameless = """[...document.querySelectorAll('button, input, textarea, summary, dialog')].filter((one) =>
        !(one.labels && one.labels.length) && !one.textContent.trim() && !one.getAttribute('aria-label')).length"""
    for width, scheme in ((1280, "light"), (360, "dark")):
        page.set_viewport_size({"width": width, "height": 780})
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        assert page.evaluate(nameless) == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if source is not None:
            page.evaluate(source)
            found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
            assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []


@pytest.mark.slow
def test_one_review_from_the_first_link_to_the_result_in_chromium(tmp_path: Path, started: Any) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    store = ReviewStore(tmp_path / "review" / "review.sqlite")
    store.begin(FACTS, items())
    source = axe(tmp_path)
    server, link = started()
    with playwright.sync_playwright() as driver:
        program = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = program.new_page()
        page.set_default_timeout(5000)
        trouble: list[str] = []
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))

        def sign_in(name: str, role: str = "reviewer") -> None:
            page.get_by_label("Your name").fill(name)
            page.get_by_role("radio", name=f"{role.capitalize()}:").check()
            page.get_by_role("button", name="Begin or go on").press("Enter")
            page.wait_for_selector("#work:not([hidden])")

        def keys(text: str, first: int, of: int = 4) -> None:
            for at, key in enumerate(text, start=first):
                page.keyboard.press(key)
                page.get_by_text(f"{at} of {of} pairs decided").wait_for()

        page.goto(link)
        page.get_by_label("Your name").wait_for()
        assert page.url.endswith("/") and page.evaluate("document.cookie") == ""
        accessible(page, source)
        sign_in("Ada")
        accessible(page, source)
        sizes = [page.locator(f"#{side} img").bounding_box() for side in ("release", "real")]
        assert [sizes[0][side] for side in ("width", "height")] == [sizes[1][side] for side in ("width", "height")]
        keys("12", 1)
        page.keyboard.press("u")  # takes back the second one, and shows it
        page.get_by_text("1 of 4 pairs decided").wait_for()
        assert page.locator("#place").inner_text() == "Pair 2 of 4"
        page.keyboard.press("z")
        assert page.locator("#release img").get_attribute("src") == f"/picture/{IDS[1]}/release/whole"
        page.keyboard.press("n")
        page.keyboard.type("1 z u: not keys here")
        page.keyboard.press("Escape")
        server.kill()  # and on with another server
        server.wait()
        assert store.decisions()["Ada"][IDS[0]].label == Label.NEAR_COPY
        page.keyboard.press("3")
        page.get_by_text("does not answer").wait_for()
        trouble.clear()
        server, link = started()
        page.goto(link)
        sign_in("Ada")
        assert page.locator("#progress").inner_text() == "1 of 4 pairs decided"
        assert page.locator("#place").inner_text() == "Pair 2 of 4"
        keys("345", 2)
        page.get_by_role("button", name="Sign out").click()
        sign_in("Bob")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowLeft")
        keys("1342", 1)
        page.get_by_role("button", name="Sign out").click()
        sign_in("Cid", "adjudicator")
        page.get_by_text("The reviewers said: same person and unusable").wait_for()
        accessible(page, source)
        keys("2", 1, of=1)
        page.get_by_role("button", name="Show the result…").click()
        assert page.evaluate("document.activeElement.id") == "no"
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")
        page.wait_for_url("**/results")
        accessible(page, source)
        text = page.inner_text("main")
        program.close()
    assert "1 of 2 training pairs were confirmed" in text and "1 of 2 control pairs" in text
    assert trouble == [] and all(url.startswith("http://127.0.0.1:") for url in requests if not url.startswith("data:"))
    kept = json.loads((tmp_path / "review" / "review.json").read_bytes())
    assert kept["labels"]["training"] == {"near_copy": 1, "same_person": 0, "look_alike": 0, "different": 1,
                                          "unusable": 0, "undecided": 0}  # fmt: skip
    assert kept["adjudicated"] == 1 and kept["agreement"]["observed"] == 0.75 and kept["complete"] is True
