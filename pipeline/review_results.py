"""What a review found, as `review/review.json` keeps it for assess and report."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from cluster.storage import to_json, write_private
from operators import reviewing
from operators.errors import ConfigError
from operators.reviewing import CONFIRMED, Judged, Label
from pipeline.review_store import Item, ReviewStore
from pipeline.stage import Run
from pipeline.wording import count, p_value

ARMS = ("training", "control")


def results(run: Run, store: ReviewStore) -> dict[str, Any]:
    """The outcome of a review whose arms were shown, also written to `review/review.json`.

    Raises
    ------
    ConfigError
        If the arms are still hidden.
    """
    ended = store.unblinding()
    if ended is None:
        raise ConfigError("the arms of this review are still hidden. Finish it, or give review.unblind=true.")
    facts, final, items = store.facts(), store.final(), store.items()
    judged = [Judged(one.arm == "training", one.score, final[one.item]) for one in items]
    made = reviewing.outcome(judged, facts["tested"]["training"], facts["tested"]["control"])
    found = {
        "people": facts["people"],
        "drawn_at": facts["drawn_at"],
        "unblinded_at": ended.at,
        "complete": ended.label == "complete",
        "reviewers": facts["reviewers"],
        "pairs": len(items) // 2,
        "tested": facts["tested"],
        "passed_over": facts["passed_over"],
        "labels": {arm: _labels(arm, items, final) for arm in ARMS},
        "outcome": _plain({**made._asdict(), "bar": made.bar._asdict()}),
        "agreement": _agreement(store),
        "adjudicated": len(store.disagreements()),
        "persons": [
            {"arm": one.arm, "unit": one.unit, "key": one.real_key, "release_key": one.release_key}
            | {"label": final[one.item], "confirmed": final[one.item] in CONFIRMED}
            for one in sorted(items, key=lambda one: (one.arm, -one.score, one.unit))
        ],
    }
    write_private(run.folder / "review" / "review.json", to_json(found))
    return found


def _labels(arm: str, items: list[Item], final: Mapping[str, Label | None]) -> dict[str, int]:
    said = [final[one.item] for one in items if one.arm == arm]
    return {str(label): said.count(label) for label in Label} | {"undecided": said.count(None)}


def _agreement(store: ReviewStore) -> dict[str, Any] | None:
    both = [labels for labels in store.given().values() if len(labels) == 2 and None not in labels]
    first, second = (
        [label for label in side if label is not None] for side in (list(zip(*both, strict=True)) or [(), ()])
    )
    made = reviewing.agreement(first, second)
    return None if made is None else _plain(made._asdict())


def _plain(value: Any) -> Any:
    """`value` with named tuples as dicts, and None for what is not finite."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if hasattr(value, "_asdict"):
        value = value._asdict()
    return {name: _plain(one) for name, one in value.items()} if isinstance(value, dict) else value


def reviewed(run: Run) -> dict[str, Any] | None:
    """What `review.json` says, for assess and report; None without a finished review of the people of this run."""
    path = run.folder / "review" / "review.json"
    made = run.store.child("assess").find("people")
    if made is None or not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found if found["people"] == made.sha256 else None


def standing(run: Run, store: ReviewStore) -> str:
    """How far the review is, or what it found, in a line or two for the terminal."""
    if store.unblinding() is None:
        final = store.final()
        left = sum(label is None for label in final.values())
        return f"review: {count(len(final) - left, 'pair')} settled, {left:,} to go. Arms are hidden until the end."
    found = results(run, store)
    outcome = found["outcome"]
    return (
        f"review: confirmed {outcome['member_confirmed']:,} of {outcome['members']:,} training pairs and "
        f"{outcome['control_confirmed']:,} of {outcome['controls']:,} control pairs (decoys); exact p = "
        f"{p_value(outcome['bar']['p'])} (docs/review.md)\n{run.folder / 'review' / 'review.json'}"
    )
