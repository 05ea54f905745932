"""Which pairs a review draws, what it shows of them, and what it gives back: on a run made by hand."""

import hashlib
import io
import json
import os
import signal
import stat
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cluster.faults import IncompleteTable
from operators.errors import ConfigError
from operators.formats import SetConfig
from operators.records import embeddings
from operators.reviewing import Label
from operators.tables import PEOPLE, UNITS
from pipeline.config import AuditConfig, SetsConfig
from pipeline.embed import unit_store
from pipeline.review import Pictures, ReviewConfig, opened, review
from pipeline.review_results import results, reviewed
from pipeline.stage import Run

PEOPLE_OF = {"training": 12, "control": 8}
IMAGES = {"release": 6, **PEOPLE_OF}


def image_of(role: str, at: int) -> np.ndarray:
    """Flat halves whose colours say role and row."""
    size = {"release": (112, 112), "training": (90, 160), "control": (112, 112)}[role]
    pixels = np.empty((*size, 3), np.uint8)
    pixels[:] = (20 * at, 10 + 80 * ["release", "training", "control"].index(role), 200)
    return pixels


def make_set(run: Run, folder: Path, role: str) -> None:
    """Image files, JPEG with a comment in the training set and PNG elsewhere, and what scan and embed say of them."""
    (folder / role).mkdir(parents=True)
    members, rows = [], []
    for at in range(IMAGES[role]):
        out = io.BytesIO()
        kind = {"format": "JPEG", "comment": b"of the training set"} if role == "training" else {"format": "PNG"}
        PIL.Image.fromarray(image_of(role, at)).save(out, **kind)
        key, digest = f"{role}-{at}.img", hashlib.sha256(out.getvalue()).hexdigest()
        (folder / role / key).write_bytes(out.getvalue())
        members.append({"key": key, "identity": f"p{at}", "bytes": len(out.getvalue()), "digest": digest})
        rows.append({"key": key, "identity": f"p{at}", "digest": digest, "status": "ok"})
    unit = hashlib.sha256(role.encode()).hexdigest()[:32]
    whole = {"set": role, "uri": str(folder / role), "format": "folder", "unit": unit, "first_row": 0}
    run.save("scan", role, UNITS, UNITS.from_rows([{**whole, "anonymous": False, "members": members}]), key="test")
    contract = embeddings(run.config.embedder.width)
    unit_store(run).commit(unit, contract.from_rows(rows), contract=contract.contract, key=unit)


def person(arm: str, at: int) -> dict[str, Any]:
    """A person by image row; scores fall with the row, and the first row of either arm takes no part."""
    unit = at + (100 if arm == "control" else 0)
    score = 5.0 - at / 2 - (0.25 if arm == "control" else 0)
    return {"unit": unit, "arm": arm, "key": f"{arm}-{at}.img", "release_key": f"release-{at % 6}.img",
            "statistic": score, "eligible": at > 0}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> AuditConfig:
    sets = {role: SetConfig(uri=str(tmp_path / "sets" / role), format="folder") for role in IMAGES}
    made = AuditConfig(
        out=str(tmp_path / "run"), sets=SetsConfig(**sets), review=ReviewConfig(pairs=4, reviewers=1, port=0)
    )
    with Run(made) as run:
        for role in IMAGES:
            make_set(run, tmp_path / "sets", role)
        people = [person(arm, at) for arm, count in PEOPLE_OF.items() for at in range(count)]
        run.save("assess", "people", PEOPLE, PEOPLE.from_rows(people), key="test")
    return made


def with_review(config: AuditConfig, **changed: Any) -> AuditConfig:
    return replace(config, review=replace(config.review, **changed))


def test_the_closest_of_both_arms_are_drawn_in_an_order_that_the_seed_gives(config: AuditConfig) -> None:
    with Run(config) as run, opened(run) as store:
        items, facts = store.items(), store.facts()
    drawn = {arm: sorted(one.unit for one in items if one.arm == arm) for arm in PEOPLE_OF}
    assert drawn == {"training": [1, 2, 3, 4], "control": [101, 102, 103, 104]}
    assert facts["tested"] == {"training": 11, "control": 7} and facts["passed_over"] == {"training": 0, "control": 0}
    order = np.random.default_rng(facts["seed"]).permutation(8)
    assert [one.unit for one in items] == [[1, 2, 3, 4, 101, 102, 103, 104][at] for at in order]
    assert len({one.item for one in items}) == 8 and all(len(one.item) == 32 for one in items)
    for one in items:
        at = one.unit % 100
        assert (one.real_key, one.release_key) == (f"{one.arm}-{at}.img", f"release-{at % 6}.img")
    with Run(config) as run, opened(run) as store:
        assert store.items() == items


def test_people_whose_images_are_gone_are_passed_over(config: AuditConfig, tmp_path: Path) -> None:
    (tmp_path / "sets" / "control" / "control-2.img").unlink()
    (tmp_path / "sets" / "release" / "release-3.img").write_bytes(b"another file")  # of row 3 of both arms
    with Run(with_review(config, pairs=50)) as run, opened(run) as store:
        items, facts = store.items(), store.facts()
    assert sorted(one.unit for one in items if one.arm == "control") == [101, 104, 105, 106, 107]
    assert sorted(one.unit for one in items if one.arm == "training") == [1, 2, 4, 5, 6]  # as many
    assert facts["passed_over"]["control"] == 2


def test_pictures_are_those_of_the_pair_and_do_not_tell_the_arm(config: AuditConfig) -> None:
    with Run(config) as run, opened(run) as store, Pictures(run, store.items()) as pictures:
        for one in store.items():
            for side, role in (("real", one.arm), ("release", "release")):
                at = one.unit % 100
                for part, pixels in (("face", 224), ("whole", 640)):
                    data = pictures(one.item, side, part)
                    assert data is not None and b"training" not in data
                    image = PIL.Image.open(io.BytesIO(data))
                    assert (image.format, image.size, image.info) == ("PNG", (pixels, pixels), {})
                    middle = np.asarray(image)[pixels // 2, pixels // 2].astype(int)
                    assert np.abs(middle - image_of(role, at)[0, 0]).max() <= 3


def test_a_picture_that_went_missing_is_no_crash(config: AuditConfig, tmp_path: Path) -> None:
    with Run(config) as run, opened(run) as store, Pictures(run, store.items()) as pictures:
        one = store.items()[0]
        (tmp_path / "sets" / one.arm / one.real_key).unlink()
        assert pictures(one.item, "real", "face") is None
        assert pictures(one.item, "release", "face") is not None


@pytest.mark.parametrize("changed", [{"pairs": 5}, {"reviewers": 2}])
def test_a_begun_review_keeps_its_options(config: AuditConfig, changed: dict[str, int]) -> None:
    with Run(config) as run, opened(run):
        pass
    other = with_review(config, **changed)
    with Run(other) as run, pytest.raises(ConfigError, match="was begun with review"), opened(run):
        pass


def test_a_review_belongs_to_its_assessment(config: AuditConfig) -> None:
    with Run(config) as run:
        with opened(run) as store:
            store.unblind("Ada", "reviewer", early=True)
            results(run, store)
        assert reviewed(run) is not None
        people = run.table("assess", "people", PEOPLE)
        run.save("assess", "people", PEOPLE, people.slice(1), key="test")
        assert reviewed(run) is None
        with pytest.raises(ConfigError, match="another assessment"), opened(run):
            pass
        run.save("assess", "people", PEOPLE, people, key="test")
        assert reviewed(run) is not None


def test_what_is_missing_is_named(config: AuditConfig) -> None:
    alone = replace(config, sets=replace(config.sets, control=None))
    with pytest.raises(ConfigError, match=r"needs sets\.control"):
        review(alone, lambda _: None)
    with pytest.raises(ConfigError, match="has no review yet"):
        review(with_review(config, unblind=True), lambda _: None)
    with Run(config) as run:
        (run.folder / "assess" / "people.commit.json").unlink()
        assert reviewed(run) is None
    with pytest.raises(IncompleteTable, match="Run `unveil assess` first"):
        review(config, lambda _: None)


@pytest.mark.parametrize("changed", [{"pairs": 0}, {"reviewers": 3}, {"port": 70000}, {"idle_minutes": 0.0}])
def test_options_that_make_no_sense_are_refused(changed: dict[str, Any]) -> None:
    (name,) = changed
    with pytest.raises(ValueError, match=f"^{name} must .* Got "):
        ReviewConfig(**changed)


def test_results_are_hidden_until_unblinding_and_then_complete(config: AuditConfig) -> None:
    with Run(config) as run, opened(run) as store:
        with pytest.raises(ConfigError, match="still hidden"):
            results(run, store)
        store.sign_in("Ada", "reviewer", 1)
        said = {1: "near_copy", 2: "same_person", 3: "same_person", 4: "different", 101: "same_person",
                102: "look_alike", 103: "unusable", 104: "different"}  # fmt: skip
        for one in store.items():
            store.decide("Ada", "reviewer", one.item, Label(said[one.unit]), "")
        store.unblind("Ada", "reviewer", early=False)
        found = results(run, store)
        path = run.folder / "review" / "review.json"
        assert json.loads(path.read_bytes()) == found == reviewed(run)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert found["complete"] is True and found["agreement"] is None and found["adjudicated"] == 0
    assert found["labels"]["training"] == dict.fromkeys(found["labels"]["training"], 0) | {
        "near_copy": 1, "same_person": 2, "different": 1}  # fmt: skip
    assert found["labels"]["control"]["unusable"] == 1 and found["labels"]["control"]["undecided"] == 0
    outcome = found["outcome"]
    assert (outcome["member_confirmed"], outcome["control_confirmed"], outcome["excess"]) == (3, 1, 2)
    assert outcome["false_alarm"]["value"] == 0.25 and outcome["share"]["value"] == 0.5
    assert [(one["unit"], one["label"]) for one in found["persons"]] == [
        (unit, said[unit]) for unit in (101, 102, 103, 104, 1, 2, 3, 4)
    ]


def test_an_early_end_counts_what_is_settled_and_says_so(config: AuditConfig) -> None:
    with Run(config) as run, opened(run) as store:
        store.sign_in("Ada", "reviewer", 1)
    told: list[str] = []
    review(with_review(config, unblind=True), told.append)
    with Run(config) as run:
        found = reviewed(run)
    assert found is not None and found["complete"] is False
    assert found["outcome"]["undecided"] == 8 and found["outcome"]["share"]["value"] is None
    assert found["labels"]["control"]["undecided"] == 4
    assert "confirmed 0 of 0 training pairs" in told[-1]


def test_the_verb_serves_the_page_until_it_is_interrupted(config: AuditConfig, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    told: list[str] = []
    pages: list[bytes] = []

    def visit() -> None:
        link = told[0].rpartition(" ")[2]
        for _ in range(100):
            try:
                with urllib.request.urlopen(link.partition("#")[0], timeout=5) as answer:
                    pages.append(answer.read())
                break
            except urllib.error.URLError:
                threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    def say(text: str) -> None:
        told.append(text)
        if len(told) == 2:
            threading.Thread(target=visit).start()

    review(config, say)
    assert b"link that the terminal shows" in pages[0]
    assert told[-1] == "review: 0 pairs settled, 8 to go. Arms are hidden until the end."
    token = told[0].rpartition("#")[2]
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or token.encode() not in path.read_bytes()
