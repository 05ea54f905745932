"""review: people look at the closest pairs of training and control set without knowing which is which.

The control pairs are decoys: what reviewers confirm among them is their false-alarm rate, and what they confirm beyond
it is the finding (docs/review.md). Everything is kept in `review/` of the run: `review.sqlite` with every decision, and
`review.json` once the arms were shown.
"""

import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators import reviewing
from operators.errors import ConfigError
from operators.tables import PEOPLE
from pipeline.imagery import Imagery
from pipeline.review_results import ARMS, results, standing
from pipeline.review_store import Item, ReviewStore, new_item
from pipeline.stage import Run

if TYPE_CHECKING:
    from pipeline.config import AuditConfig

log = logging.getLogger(__name__)

SIDES = {"face": 224, "whole": 640}
"""Side of the pictures in pixels: the aligned face, and the whole image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewConfig:
    """A blinded review of the closest pairs."""

    pairs: int = 100
    """Pairs of the training set, and as many of the control set: the closest of each by the statistic."""
    reviewers: int = 2
    """How many label every pair, each alone: 1 or 2. With 2, an adjudicator settles what they see differently."""
    port: int = 0
    """Port on 127.0.0.1; 0 takes a free one. There is no option to listen elsewhere."""
    whole_images: bool = True
    """Whether `z` shows the whole images. Turn it off where background or framing tell the sets apart."""
    idle_minutes: float = 15.0
    """The page locks after this time without use; the terminal then shows a new link."""
    unblind: bool = False
    """Show the arms and write the results as they stand, without a page. What is not settled stays so for good."""

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs must be at least 1. Got {self.pairs}.")
        if self.reviewers not in (1, 2):
            raise ValueError(f"reviewers must be 1 or 2. Got {self.reviewers}.")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be between 0 and 65535. Got {self.port}.")
        if not self.idle_minutes > 0:
            raise ValueError(f"idle_minutes must be positive. Got {self.idle_minutes}.")


def review(config: "AuditConfig", say: Callable[[str], None]) -> None:
    """Serve the review page until it is interrupted, then say how far the review is.

    Raises
    ------
    ConfigError
        If there is no control set, the pairs were drawn under other options or from another assessment, the page's
        libraries are missing, the port is taken, or there is no review to unblind.
    IncompleteTable
        If the run was not assessed.
    """
    if config.review.unblind and not (Path(config.out) / "review" / "review.sqlite").exists():
        raise ConfigError("review.unblind=true: this run has no review yet. Begin one without that option.")
    with Run(config, alone=False) as run, opened(run) as store:  # it only reads what stages commit
        if config.review.unblind:
            store.unblind("command line", "auditor", early=True)
        if store.unblinding() is not None:
            results(run, store)
        if not config.review.unblind:
            _serve(run, store, say)
        say(standing(run, store))


def _serve(run: Run, store: ReviewStore, say: Callable[[str], None]) -> None:
    try:
        from pipeline.review_app import ReviewPage, application, bound, serve
        from pipeline.review_guard import LOOPBACK, Door
    except ModuleNotFoundError as error:
        raise ConfigError(f"the review page needs {error.name}: pip install 'unveil[review]'") from error
    options = run.config.review
    try:
        listening = bound(options.port)
    except OSError as error:
        raise ConfigError(f"review.port={options.port} cannot be used ({error.strerror}). Choose another.") from error
    port = listening.getsockname()[1]

    def announce(token: str) -> None:
        say(f"Open this link in a browser on this machine; it works once: http://{LOOPBACK}:{port}/#{token}")

    with listening, Pictures(run, store.items()) as pictures, suppress(KeyboardInterrupt):
        door = Door(announce, options.idle_minutes * 60)
        say("Every decision is on disk as soon as the page shows it. Stop with Ctrl-C, go on with the same command.")
        page = ReviewPage(store, pictures, lambda: results(run, store), door, port, whole=options.whole_images)
        serve(application(page), listening)


@contextmanager
def opened(run: Run) -> Iterator[ReviewStore]:
    """The review of this run; its pairs are drawn if it is new."""
    if "control" not in run.config.sets.given():
        raise ConfigError(
            "a review needs sets.control: without pairs that cannot be leaks, nobody knows how often reviewers err."
        )
    people, made = run.table("assess", "people", PEOPLE), run.commit("assess", "people")
    store = ReviewStore(run.folder / "review" / "review.sqlite")
    try:
        wanted = {"people": made.sha256, "pairs": run.config.review.pairs, "reviewers": run.config.review.reviewers}
        if store.version == 0:
            items, about = draw(run, people)
            store.begin({**wanted, **about, "drawn_at": datetime.now(UTC).isoformat(timespec="seconds")}, items)
        facts = store.facts()
        other = [name for name, value in wanted.items() if facts[name] != value]
        if other:
            raise ConfigError(f"{store.path.parent} {_other(other[0], facts)}, or move that folder away to begin anew.")
        yield store
    finally:
        store.close()


def _other(name: str, facts: Mapping[str, Any]) -> str:
    if name == "people":
        return "was drawn from another assessment than the one of this run now. Assess as before"
    return f"was begun with review.{name}={facts[name]}. Give the same"


def draw(run: Run, people: pa.Table) -> tuple[list[Item], dict[str, Any]]:
    """The closest people of both arms that can be shown, as many of each, in random order; and what to write down."""
    seed = secrets.randbits(63)
    chosen: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, Any] = {"seed": seed, "tested": {}, "passed_over": {}}
    with ExitStack() as held:
        release = held.enter_context(Rows(run, "release"))
        for arm in ARMS:
            own = people.filter(
                pc.and_(pc.equal(people["arm"], arm), pc.and_(people["eligible"], pc.is_valid(people["statistic"])))
            )
            shown = held.enter_context(Rows(run, arm))
            able, passed = _showable(own, release, shown, run.config.review.pairs)
            chosen[arm], about["passed_over"][arm], about["tested"][arm] = able, passed, own.num_rows
    size = min(len(own) for own in chosen.values())
    if not size:
        raise ConfigError("no pair of one of the two arms can be shown: the review needs images of all sets.")
    items = [
        Item(new_item(), arm, row["unit"], row["release_key"], row["key"], row["statistic"])
        for arm in ARMS
        for row in chosen[arm][:size]
    ]
    order = np.random.default_rng(seed).permutation(len(items))
    log.info("review: %d pairs drawn, half of them of the control set", len(items))
    return [items[at] for at in order], about


def _showable(own: pa.Table, release: "Rows", shown: "Rows", pairs: int) -> tuple[list[dict[str, Any]], int]:
    """The first `pairs` people whose two images can be opened, and how many were passed over for others."""
    able: list[dict[str, Any]] = []
    passed = 0
    for at in reviewing.ranked(own["statistic"].to_numpy()).tolist():
        if len(able) == pairs:
            break
        row = own.slice(at, 1).to_pylist()[0]
        if release.opens(row["release_key"]) and shown.opens(row["key"]):
            able.append(row)
        else:
            passed += 1
    return able, passed


class Rows:
    """The images of one set by key; a context manager."""

    def __init__(self, run: Run, role: str) -> None:
        self.images = Imagery(run, role)
        self.row_of = {key: row for row, key in enumerate(self.images.columns["key"].to_pylist())}

    def opens(self, key: str | None) -> bool:
        """Whether there is such an image, and it can still be opened."""
        return key in self.row_of and self.images(self.row_of[key]) is not None

    def __call__(self, key: str, part: str) -> bytes | None:
        """PNG of the aligned face or of the whole image; None where it can no longer be opened."""
        seen = self.images(self.row_of[key])
        if seen is None:
            return None
        return reviewing.framed(seen.crop if part == "face" else seen.image, SIDES[part])

    def __enter__(self) -> "Rows":
        self.images.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.images.__exit__(*error)


class Pictures:
    """The pictures of all pairs, one at a time; a context manager."""

    def __init__(self, run: Run, items: list[Item]) -> None:
        self._run, self._held, self._lock = run, ExitStack(), threading.Lock()
        self._items = {one.item: one for one in items}
        self._sets: dict[str, Rows] = {}

    def __enter__(self) -> "Pictures":
        self._sets = {role: self._held.enter_context(Rows(self._run, role)) for role in ("release", *ARMS)}
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def __call__(self, item: str, side: str, part: str) -> bytes | None:
        """PNG of one side of a pair."""
        one = self._items[item]
        role, key = ("release", one.release_key) if side == "release" else (one.arm, one.real_key)
        with self._lock:
            return self._sets[role](key, part)
