"""The review page as a web application: what it shows, and what it takes down.

Before unblinding no answer holds arm, key, path, score or statistic of a pair: pairs go by ids that say nothing, and
pictures are made of pixels anew, all of one size and format.
"""

import secrets
import socket
import sqlite3
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from operators.reviewing import Label
from pipeline.review_guard import LOOPBACK, Door, Guard, Visit, cookie_name
from pipeline.review_store import Decision, Refused, ReviewStore
from pipeline.wording import number, p_value, percent

if TYPE_CHECKING:
    from starlette.types import ASGIApp

Pictures = Callable[[str, str, str], bytes | None]
"""PNG of a pair by id, side (`release` or `real`) and part (`face` or `whole`); None: it can no longer be opened."""

LABELS = {
    Label.NEAR_COPY: ("Near copy", "The same photograph, perhaps cropped, mirrored, recoloured or retouched."),
    Label.SAME_PERSON: ("Same person", "Another photograph, but you would say that this is the same person."),
    Label.LOOK_ALIKE: ("Look-alike", "Alike, but you would not say that this is the same person."),
    Label.DIFFERENT: ("Different", "Clearly different people."),
    Label.UNUSABLE: ("Unusable", "One of the pictures shows no face, or too little of one to tell."),
}


def environment() -> Environment:
    """The templates of the page; every value is escaped."""
    made = Environment(
        loader=PackageLoader("pipeline", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "percent": percent, "p_value": p_value}
    return made


class ReviewPage:
    """The answers to all requests. `results` is asked once the arms may be shown."""

    def __init__(
        self,
        store: ReviewStore,
        pictures: Pictures,
        results: Callable[[], Mapping[str, Any]],
        door: Door,
        port: int,
        *,
        whole: bool,
    ) -> None:
        self.store, self.pictures, self.results, self.whole = store, pictures, results, whole
        self.door, self.port = door, port
        self.reviewers: int = store.facts()["reviewers"]
        self.known = {one.item for one in store.items()}
        self.templates = environment()

    def routes(self) -> list[Route]:
        """All there is; no folder is served."""
        return [
            Route("/", self.page),
            Route("/enter", self.enter, methods=["POST"]),
            Route("/sign-in", self.sign_in, methods=["POST"]),
            Route("/sign-out", self.sign_out, methods=["POST"]),
            Route("/state", self.state),
            Route("/decide", self.decide, methods=["POST"]),
            Route("/undo", self.undo, methods=["POST"]),
            Route("/unblind", self.unblind, methods=["POST"]),
            Route("/results", self.result_page),
            Route("/picture/{item:str}/{side:str}/{part:str}", self.picture),
        ]

    def _html(self, template: str, **values: Any) -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        text = self.templates.get_template(template).render(nonce=nonce, idle_s=self.door.idle_s, **values)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def page(self, request: Request) -> Response:
        """The way in, the sign-in, or the pairs."""
        visit: Visit | None = request.scope["visit"]
        if visit is None:
            return self._html("review_enter.html.j2")
        if visit.name is None:
            return self._html("review_sign_in.html.j2", csrf=visit.csrf, reviewers=self.reviewers)
        words = {str(label): word for label, (word, _) in LABELS.items()}
        seen = {"name": visit.name, "role": visit.role, "labels": LABELS, "words": words, "whole": self.whole}
        return self._html("review_pairs.html.j2", csrf=visit.csrf, **seen)

    async def enter(self, request: Request) -> Response:
        """A cookie for the token of the link."""
        visit = self.door.enter(_text(await _body(request), "token"))
        if visit is None:
            return JSONResponse({"error": "This link has been used. Open the newest one in the terminal."}, 403)
        answer = Response(status_code=204)
        answer.set_cookie(cookie_name(self.port), visit.cookie, httponly=True, samesite="strict", path="/")
        return answer

    async def sign_in(self, request: Request) -> Response:
        """Begin, or go on, under a name."""
        visit, body = request.scope["visit"], await _body(request)
        role = _text(body, "role")
        visit.name = await run_in_threadpool(self.store.sign_in, _text(body, "name"), role, self.reviewers)
        visit.role = role
        return Response(status_code=204)

    async def sign_out(self, request: Request) -> Response:
        """Leave the page to the next reviewer."""
        visit = request.scope["visit"]
        visit.name = visit.role = None
        return Response(status_code=204)

    async def state(self, request: Request) -> Response:
        """What the signed-in person sees: the pairs and the own labels, and how far the review is."""
        return JSONResponse(await run_in_threadpool(self._state, _person(request)))

    def _state(self, person: tuple[str, str]) -> dict[str, Any]:
        name, role = person
        decisions, disputed = self.store.decisions(), self.store.disagreements()
        own, final = decisions.get(name, {}), self.store.final()
        shown = [one.item for one in self.store.items()] if role == "reviewer" else disputed
        nothing = Decision(None, "")
        labels, notes = ({item: made[at] for item, made in own.items()} for at in (0, 1))
        items: list[dict[str, Any]] = [
            {"id": item, "label": labels.get(item), "note": notes.get(item, "")} for item in shown
        ]
        if role == "adjudicator":  # in an order that does not say whose label it is
            said = self.store.given()
            items = [one | {"given": sorted(label for label in said[one["id"]] if label)} for one in items]
        return {
            "items": items,
            "finished": sum(
                all(decisions[of].get(item, nothing).label is not None for item in final)
                for of in self.store.seats()["reviewer"]
            ),
            "reviewers": self.reviewers,
            "open_disagreements": sum(final[item] is None for item in disputed),
            "settled": all(label is not None for label in final.values()),
            "unblinded": self.store.unblinding() is not None,
        }

    async def decide(self, request: Request) -> Response:
        """Take down a label or a note; answered only when it is on disk."""
        (name, role), body = _person(request), await _body(request)
        item, note, label = _text(body, "item"), _text(body, "note"), body.get("label")
        if item not in self.known or not (label is None or label in list(Label)):
            raise HTTPException(422, "Not a pair or not a label of this review.")
        chosen = None if label is None else Label(label)
        await run_in_threadpool(self.store.decide, name, role, item, chosen, note)
        return JSONResponse(await run_in_threadpool(self._state, (name, role)))

    async def undo(self, request: Request) -> Response:
        """Take back the last decision."""
        person = _person(request)
        item = await run_in_threadpool(self.store.undo, *person)
        return JSONResponse(await run_in_threadpool(self._state, person) | {"undone": item})

    async def unblind(self, request: Request) -> Response:
        """End the blind part."""
        name, role = _person(request)
        early = (await _body(request)).get("early") is True
        await run_in_threadpool(self.store.unblind, name, role, early)
        await run_in_threadpool(self.results)
        return Response(status_code=204)

    async def result_page(self, request: Request) -> Response:
        """The outcome, once the arms may be shown."""
        if self.store.unblinding() is None:
            raise HTTPException(409, "The arms are still hidden.")
        result = await run_in_threadpool(self.results)
        return self._html("review_results.html.j2", result=result, labels=LABELS, csrf=request.scope["visit"].csrf)

    async def picture(self, request: Request) -> Response:
        """One picture of a pair."""
        _person(request)
        item, side, part = (request.path_params[name] for name in ("item", "side", "part"))
        parts = ("face", "whole") if self.whole else ("face",)
        if item not in self.known or side not in ("release", "real") or part not in parts:
            raise HTTPException(404, "There is no such picture.")
        data = await run_in_threadpool(self.pictures, item, side, part)
        if data is None:
            raise HTTPException(404, "This picture can no longer be opened.")
        return Response(data, media_type="image/png")


def _person(request: Request) -> tuple[str, str]:
    """Name and role of who asks; 401 for a browser that nobody has signed in with."""
    visit = request.scope["visit"]
    if visit.name is None:
        raise HTTPException(401, "Sign in first.")
    return visit.name, visit.role


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request; 422 for anything else."""
    try:
        given = await request.json()
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, "Not JSON.") from error
    if not isinstance(given, dict):
        raise HTTPException(422, "Not a JSON object.")
    return given


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise HTTPException(422, f"{name} must be text.")
    return value


def application(page: ReviewPage) -> "ASGIApp":
    """The page behind its guard."""

    async def told(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 409
        return JSONResponse({"error": error.detail if isinstance(error, HTTPException) else str(error)}, status)

    async def not_saved(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "Not saved: the review's file cannot be written. Try again."}, 503)

    handlers = {HTTPException: told, Refused: told, sqlite3.Error: not_saved}
    app = Starlette(routes=page.routes(), exception_handlers=handlers)
    return Guard(app, page.door, page.port)


def bound(port: int) -> socket.socket:
    """A socket on the loopback address, and on no other; port 0 takes a free one. OSError where it is taken."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((LOOPBACK, port))
        made.listen()  # from here on nobody else can take the port
    except OSError:
        made.close()
        raise
    return made


def serve(app: "ASGIApp", listening: socket.socket) -> None:
    """Answer requests until the process is interrupted. ValueError for a socket that others could reach."""
    import uvicorn

    if listening.getsockname()[0] != LOOPBACK:
        raise ValueError(f"listening must be bound to {LOOPBACK}. Got {listening.getsockname()[0]}.")
    config = uvicorn.Config(
        app, lifespan="off", ws="none", http="h11", loop="asyncio", access_log=False, log_level="warning",
        server_header=False, date_header=False, proxy_headers=False, timeout_keep_alive=30,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listening])
