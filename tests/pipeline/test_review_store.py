"""The file of a review: nothing in it is ever changed, and what was confirmed is there."""

import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from cluster.faults import StorageError
from operators.reviewing import Label
from pipeline.review_store import Item, Refused, ReviewStore

pytestmark = pytest.mark.usefixtures("closed_connections")

ITEMS = [Item(f"{at:032x}", ("training", "control")[at % 2], at, f"r{at}", f"k{at}", at / 8) for at in range(4)]
IDS = [one.item for one in ITEMS]
FACTS = {"reviewers": 2, "people": "abc", "seed": 7}


@pytest.fixture
def store(tmp_path: Path) -> ReviewStore:
    made = ReviewStore(tmp_path / "review" / "review.sqlite")
    made.begin(FACTS, ITEMS)
    return made


def say(store: ReviewStore, name: str, *labels: Label | None) -> None:
    for item, label in zip(IDS, labels, strict=False):
        store.decide(name, "reviewer", item, label, "")


def test_what_was_drawn_is_kept_in_order_and_private(store: ReviewStore) -> None:
    store.sign_in("Ada", "reviewer", 2)
    again = ReviewStore(store.path)
    assert (again.facts(), again.items()) == (FACTS, ITEMS)
    files = list(store.path.parent.iterdir())
    assert len(files) == 3 and {stat.S_IMODE(one.stat().st_mode) for one in files} == {0o600}
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700
    modes = [store._open.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert modes == ["wal", 2]


def test_rows_can_be_added_and_neither_changed_nor_removed(store: ReviewStore) -> None:
    store.sign_in("Ada", "reviewer", 2)
    other = sqlite3.connect(store.path)
    for change in (
        "UPDATE events SET label = 'x'",
        "DELETE FROM events",
        "UPDATE items SET arm = 'x'",
        "DELETE FROM facts",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="only added"):
            other.execute(change)


@pytest.mark.parametrize(
    "forgery",
    [
        "UPDATE events SET label = 'near_copy' WHERE seq = 2",
        "UPDATE events SET at = '2020-01-01' WHERE seq = 3",
        "DELETE FROM events WHERE seq = 2",
        "UPDATE items SET arm = 'training'",
        "UPDATE facts SET value = '1' WHERE name = 'reviewers'",
    ],
)
def test_a_forged_row_is_noticed(store: ReviewStore, forgery: str) -> None:
    store.sign_in("Ada", "reviewer", 2)
    say(store, "Ada", Label.DIFFERENT, Label.LOOK_ALIKE)
    store.close()
    forger = sqlite3.connect(store.path)
    for (name,) in forger.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        forger.execute(f"DROP TRIGGER {name}")
    forger.execute(forgery)
    forger.commit()
    with pytest.raises(StorageError, match="not what was written"):
        ReviewStore(store.path)


def test_a_file_that_is_no_review_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(StorageError, match="not a review"):
        ReviewStore(tmp_path / "a.sqlite")
    other = sqlite3.connect(tmp_path / "b.sqlite")
    other.execute("PRAGMA user_version=9")
    with pytest.raises(StorageError, match="version 9"):
        ReviewStore(tmp_path / "b.sqlite")


def test_a_drawing_that_broke_off_leaves_nothing(tmp_path: Path) -> None:
    made = ReviewStore(tmp_path / "review.sqlite")
    with pytest.raises(sqlite3.IntegrityError):
        made.begin(FACTS, [*ITEMS, ITEMS[0]])
    made.close()
    again = ReviewStore(tmp_path / "review.sqlite")
    assert again.version == 0
    again.begin(FACTS, ITEMS)
    assert again.items() == ITEMS


def test_undo_goes_back_one_decision_at_a_time(store: ReviewStore) -> None:
    store.sign_in("Ada", "reviewer", 2)
    store.decide("Ada", "reviewer", IDS[0], Label.DIFFERENT, "first")
    store.decide("Ada", "reviewer", IDS[1], Label.NEAR_COPY, "")
    store.decide("Ada", "reviewer", IDS[0], Label.SAME_PERSON, "second")
    store.decide("Bob", "reviewer", IDS[0], Label.UNUSABLE, "")
    seen = []
    while (item := store.undo("Ada", "reviewer")) is not None:
        seen.append((item, store.decisions()["Ada"][item]))
    assert seen == [(IDS[0], (Label.DIFFERENT, "first")), (IDS[1], (None, "")), (IDS[0], (None, ""))]
    assert store.decisions()["Bob"] == {IDS[0]: (Label.UNUSABLE, "")}
    kinds = [(event.kind, event.undoes) for event in store.events()]
    assert kinds == [("sign_in", None), *[("decide", None)] * 4, ("undo", 4), ("undo", 3), ("undo", 2)]
    store.decide("Ada", "reviewer", IDS[2], Label.NEAR_COPY, "")
    assert store.undo("Ada", "reviewer") == IDS[2]


def test_seats_are_for_those_who_took_them(store: ReviewStore) -> None:
    assert store.sign_in("  Ada   Byron ", "reviewer", 2) == "Ada Byron"
    assert store.sign_in("ada byron", "reviewer", 2) == "Ada Byron"
    store.sign_in("Bob", "reviewer", 2)
    for name, role, why in (
        ("Cid", "reviewer", "has its reviewers already: Ada Byron, Bob"),
        ("BOB", "adjudicator", "Bob already takes part as reviewer"),
        ("Cid", "admin", "Choose a role"),
        ("", "reviewer", "Give a name"),
        ("x" * 41, "reviewer", "Give a name"),
        ("a\u202eb", "reviewer", "Give a name"),
    ):
        with pytest.raises(Refused, match=why):
            store.sign_in(name, role, 2)
    store.sign_in("Cid", "adjudicator", 2)
    with pytest.raises(Refused, match="adjudicator already"):
        store.sign_in("Dan", "adjudicator", 2)
    assert store.seats() == {"reviewer": ["Ada Byron", "Bob"], "adjudicator": ["Cid"]}


def test_labels_are_settled_by_agreement_or_by_the_adjudicator(store: ReviewStore) -> None:
    store.sign_in("Ada", "reviewer", 2)
    say(store, "Ada", Label.NEAR_COPY, Label.DIFFERENT, Label.DIFFERENT)
    assert set(store.final().values()) == {None}
    store.sign_in("Bob", "reviewer", 2)
    say(store, "Bob", Label.NEAR_COPY, Label.LOOK_ALIKE, None, Label.UNUSABLE)
    assert list(store.final().values()) == [Label.NEAR_COPY, None, None, None]
    assert store.disagreements() == [IDS[1]]
    store.sign_in("Cid", "adjudicator", 2)
    store.decide("Cid", "adjudicator", IDS[1], Label.SAME_PERSON, "")
    store.decide("Cid", "adjudicator", IDS[0], Label.UNUSABLE, "")  # nobody asked
    assert list(store.final().values()) == [Label.NEAR_COPY, Label.SAME_PERSON, None, None]


def test_unblinding_is_recorded_once_and_ends_the_review(store: ReviewStore) -> None:
    store.sign_in("Ada", "reviewer", 2)
    with pytest.raises(Refused, match="Not every pair is settled"):
        store.unblind("Ada", "reviewer", early=False)
    assert store.unblinding() is None
    store.unblind("Ada", "reviewer", early=True)
    store.unblind("Bob", "reviewer", early=True)
    event = store.unblinding()
    assert event is not None and (event.reviewer, event.label) == ("Ada", "early")
    with pytest.raises(Refused, match="can no longer be changed"):
        store.decide("Ada", "reviewer", IDS[0], Label.NEAR_COPY, "")
    with pytest.raises(Refused, match="can no longer be changed"):
        store.undo("Ada", "reviewer")


def test_unknown_pairs_and_endless_notes_are_refused(store: ReviewStore) -> None:
    before = store.events()
    with pytest.raises(Refused, match="no such pair"):
        store.decide("Ada", "reviewer", "f" * 32, Label.NEAR_COPY, "")
    with pytest.raises(Refused, match="at most 2000"):
        store.decide("Ada", "reviewer", IDS[0], Label.NEAR_COPY, "x" * 2001)
    assert store.events() == before


def test_two_processes_may_write_at_once(store: ReviewStore) -> None:
    other = ReviewStore(store.path)

    def work(own: ReviewStore, name: str) -> None:
        for at in range(40):
            own.decide(name, "reviewer", IDS[at % 4], Label.DIFFERENT, str(at))

    threads = [threading.Thread(target=work, args=pair) for pair in ((store, "Ada"), (store, "Cid"), (other, "Bob"))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    events = ReviewStore(store.path).events()  # opening checks the chain
    assert [event.seq for event in events] == list(range(1, 121))
    for name in ("Ada", "Bob", "Cid"):
        assert [event.note for event in events if event.reviewer == name] == [str(at) for at in range(40)]
