"""What was drawn for a review and everything that was done in it, in one SQLite file that only ever grows.

Every event is one row with its reviewer and time, and a digest over itself and the row before, so that a row that is
changed, removed or put in is noticed. A call that returns has its rows on disk (write-ahead log, synchronous=FULL):
killing the process, or cutting the power, loses no decision that a reviewer saw confirmed.
"""

import hashlib
import json
import os
import secrets
import sqlite3
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from cluster.faults import StorageError
from cluster.storage import private_folder
from operators.reviewing import Label, disagree, settled

SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE items (
  place INTEGER PRIMARY KEY, item TEXT NOT NULL UNIQUE, arm TEXT NOT NULL, unit INTEGER NOT NULL,
  release_key TEXT NOT NULL, real_key TEXT NOT NULL, score REAL NOT NULL) STRICT;
CREATE TABLE events (
  seq INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, reviewer TEXT NOT NULL, role TEXT NOT NULL,
  item TEXT, label TEXT, note TEXT NOT NULL, undoes INTEGER, chain TEXT NOT NULL) STRICT;
"""
VERSION = 1
ROLES = ("reviewer", "adjudicator")
NAME_LENGTH = 40
NOTE_LENGTH = 2000


class Refused(Exception):
    """What a reviewer asked for is against the rules of the review; the message says which, for the page to show."""


class Item(NamedTuple):
    """A pair in the order in which it is shown. Only `item` may leave this machine's disk before unblinding."""

    item: str
    arm: str
    unit: int
    release_key: str
    real_key: str
    score: float


class Event(NamedTuple):
    """One row: who did what, and when (UTC)."""

    seq: int
    at: str
    kind: str
    """`sign_in`, `decide`, `undo` or `unblind`."""
    reviewer: str
    role: str
    item: str | None
    label: str | None
    """After the event; None: the pair is undecided. Of `unblind`: `complete` or `early`."""
    note: str
    undoes: int | None
    """`seq` of the decision that an `undo` takes back."""
    chain: str


class Decision(NamedTuple):
    """What one person last said of one pair."""

    label: Label | None
    note: str


class ReviewStore:
    """The file of one review. Threads and processes may share it."""

    def __init__(self, path: Path) -> None:
        private_folder(path.parent)
        self.path, self._lock, self.version = path, threading.RLock(), 0
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives its log files the mode of this one
            self._open = sqlite3.connect(path, timeout=20, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"{path}: cannot be opened ({error}).") from error
        with ExitStack() as held:
            held.callback(self.close)
            self._prepare()
            held.pop_all()

    def _prepare(self) -> None:
        try:
            self._open.execute("PRAGMA journal_mode=WAL")
            self._open.execute("PRAGMA synchronous=FULL")
            self.version = int(self._open.execute("PRAGMA user_version").fetchone()[0])
        except sqlite3.Error as error:
            raise StorageError(f"{self.path}: not a review ({error}). Move it away to begin anew.") from error
        if self.version not in (0, VERSION):
            raise StorageError(f"{self.path}: version {self.version} of the file; this program reads {VERSION}.")
        if self.version:
            self._check_chain()

    def close(self) -> None:
        """Close the file."""
        self._open.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Cursor]:
        """One transaction, on disk when the block ends."""
        with self._lock, closing(self._open.cursor()) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
                cursor.execute("COMMIT")
            finally:
                if self._open.in_transaction:
                    cursor.execute("ROLLBACK")

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._lock, closing(self._open.cursor()) as cursor:
            return cursor.execute(query, values).fetchall()

    def begin(self, facts: dict[str, Any], items: Sequence[Item]) -> None:
        """Write down what was drawn; all or nothing of it is there after a kill."""
        with self._writing() as cursor:
            for statement in filter(str.strip, SCHEMA.split(";")):
                cursor.execute(statement)
            for table in ("facts", "items", "events"):
                for change in ("UPDATE", "DELETE"):
                    cursor.execute(
                        f"CREATE TRIGGER no_{change}_{table} BEFORE {change} ON {table} "
                        f"BEGIN SELECT RAISE(ABORT, 'rows are only added'); END"
                    )
            cursor.executemany("INSERT INTO facts VALUES (?, ?)", [(k, json.dumps(v)) for k, v in facts.items()])
            rows = [(place, *item) for place, item in enumerate(items)]
            cursor.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            cursor.execute(f"PRAGMA user_version={VERSION}")
        self.version = VERSION

    def facts(self) -> dict[str, Any]:
        """What was written down at the beginning."""
        return {name: json.loads(value) for name, value in self._rows("SELECT name, value FROM facts")}

    def items(self) -> list[Item]:
        """All pairs in the order in which they are shown."""
        query = "SELECT item, arm, unit, release_key, real_key, score FROM items ORDER BY place"
        return [Item(*row) for row in self._rows(query)]

    def events(self) -> list[Event]:
        """Everything that was done, in order."""
        return [Event(*row) for row in self._rows("SELECT * FROM events ORDER BY seq")]

    def seats(self) -> dict[str, list[str]]:
        """Names by role, in order of their first sign-in."""
        rows = self._rows(
            "SELECT role, reviewer FROM events WHERE kind = 'sign_in' GROUP BY role, reviewer ORDER BY min(seq)"
        )
        return {role: [name for of, name in rows if of == role] for role in ROLES}

    def sign_in(self, name: str, role: str, reviewers: int) -> str:
        """Take a seat, or come back to it; returns the name as it is kept.

        Raises
        ------
        Refused
            If the seats are taken by others, the name has the other role, or it cannot be a name.
        """
        asked = _name(name)
        if role not in ROLES:
            raise Refused(f"Choose a role: {' or '.join(ROLES)}.")
        with self._writing() as cursor:
            seats = self.seats()
            known = {one.casefold(): (one, of) for of, names in seats.items() for one in names}
            kept, of = known.get(asked.casefold(), (asked, role))
            if of != role:
                raise Refused(f"{kept} already takes part as {of}. An adjudicator has not labelled the pairs before.")
            room = reviewers if role == "reviewer" else 1
            if asked.casefold() not in known and len(seats[role]) >= room:
                raise Refused(f"This review has its {role}{'s' * (room > 1)} already: {', '.join(seats[role])}.")
            self._append(cursor, "sign_in", (kept, role))
        return kept

    def decide(self, reviewer: str, role: str, item: str, label: Label | None, note: str) -> None:
        """Append a decision; it is on disk when this returns. Refused after unblinding, and for unknown pairs."""
        with self._writing() as cursor:
            self._still_blind(cursor)
            if not cursor.execute("SELECT 1 FROM items WHERE item = ?", (item,)).fetchone():
                raise Refused("There is no such pair in this review.")
            if len(note) > NOTE_LENGTH:
                raise Refused(f"A note has at most {NOTE_LENGTH} characters.")
            self._append(cursor, "decide", (reviewer, role), item=item, label=label, note=note)

    def undo(self, reviewer: str, role: str) -> str | None:
        """Append what takes back this person's last decision that stands; returns its pair, or None without any."""
        with self._writing() as cursor:
            self._still_blind(cursor)
            own = [one for one in self.events() if one.reviewer == reviewer and one.kind in ("decide", "undo")]
            gone = {one.undoes for one in own}
            standing = [one for one in own if one.kind == "decide" and one.seq not in gone]
            if not standing:
                return None
            last = standing[-1]
            before = [one for one in standing[:-1] if one.item == last.item]
            label, note = (before[-1].label, before[-1].note) if before else (None, "")
            told = {"item": last.item, "label": label, "note": note, "undoes": last.seq}
            self._append(cursor, "undo", (reviewer, role), **told)
            return last.item

    def unblind(self, by: str, role: str, early: bool) -> None:
        """Record that the arms are shown from now on; the first time counts. Refused if not asked for `early`."""
        with self._writing() as cursor:
            if self.unblinding() is not None:
                return
            complete = None not in self.final().values()
            if not complete and not early:
                raise Refused("Not every pair is settled yet. Unblinding now ends the review as it stands.")
            self._append(cursor, "unblind", (by, role), label="complete" if complete else "early")

    def unblinding(self) -> Event | None:
        """The event that ended the blind part, if there is one."""
        rows = self._rows("SELECT * FROM events WHERE kind = 'unblind' ORDER BY seq LIMIT 1")
        return Event(*rows[0]) if rows else None

    def decisions(self) -> dict[str, dict[str, Decision]]:
        """What each person last said of each pair: `decisions()[name][item]`."""
        query = """SELECT reviewer, item, label, note FROM events WHERE seq IN (
            SELECT max(seq) FROM events WHERE kind IN ('decide', 'undo') GROUP BY reviewer, item)"""
        found: dict[str, dict[str, Decision]] = {name: {} for names in self.seats().values() for name in names}
        for reviewer, item, label, note in self._rows(query):
            found.setdefault(reviewer, {})[item] = Decision(None if label is None else Label(label), note)
        return found

    def given(self) -> dict[str, list[Label | None]]:
        """The labels of the reviewers for each pair, in order of seats."""
        decisions, names = self.decisions(), self.seats()["reviewer"]
        nothing = Decision(None, "")
        return {one.item: [decisions[name].get(one.item, nothing).label for name in names] for one in self.items()}

    def disagreements(self) -> list[str]:
        """Pairs that all reviewers labelled, and not alike, in the order in which they are shown."""
        reviewers = self.facts()["reviewers"]
        return [item for item, labels in self.given().items() if disagree(labels, reviewers)]

    def final(self) -> dict[str, Label | None]:
        """The final label of each pair; None where it is not settled."""
        decisions, seats, reviewers = self.decisions(), self.seats(), self.facts()["reviewers"]
        ruled = decisions[seats["adjudicator"][0]] if seats["adjudicator"] else {}
        return {
            item: settled(labels, ruled[item].label if item in ruled else None, reviewers)
            for item, labels in self.given().items()
        }

    def _still_blind(self, cursor: sqlite3.Cursor) -> None:
        if cursor.execute("SELECT 1 FROM events WHERE kind = 'unblind'").fetchone():
            raise Refused("The arms have been shown: labels can no longer be changed.")

    def _append(self, cursor: sqlite3.Cursor, kind: str, who: tuple[str, str], **about: str | int | None) -> None:
        """Add a row; `about` is `item`, `label`, `note` and `undoes`, as far as they matter."""
        last = cursor.execute("SELECT seq, chain FROM events ORDER BY seq DESC LIMIT 1").fetchone()
        seq, before = (last[0] + 1, last[1]) if last else (1, self._anchor())
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        label = about.get("label")
        told = (about.get("item"), label and str(label), about.get("note", ""), about.get("undoes"))
        row = (seq, at, kind, *who, *told)
        cursor.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, _chain(before, row)))

    def _anchor(self) -> str:
        """The digest that the chain of events begins with: of everything that was drawn."""
        return _chain("", [sorted(self.facts().items()), self.items()])

    def _check_chain(self) -> None:
        """StorageError where the rows are not those that were written."""
        before = self._anchor()
        for at, event in enumerate(self.events(), start=1):
            if event.seq != at or event.chain != _chain(before, event[:-1]):
                raise StorageError(f"{self.path}: row {at} is not what was written. Restore it, or move it away.")
            before = event.chain


def new_item() -> str:
    """An id that says nothing."""
    return secrets.token_hex(16)


def _chain(before: str, row: Sequence[Any]) -> str:
    text = json.dumps([before, row], ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _name(text: str) -> str:
    """A reviewer's name as it is kept; Refused if it is empty, too long, or holds what cannot be seen."""
    name = " ".join(unicodedata.normalize("NFC", text).split())
    if not 1 <= len(name) <= NAME_LENGTH or not name.isprintable():
        raise Refused(f"Give a name of 1 to {NAME_LENGTH} visible characters.")
    return name
