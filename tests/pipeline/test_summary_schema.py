"""The JSON Schema of `summary.json`, against the summaries of small audits of several kinds."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml

from operators import reviewing
from operators.reviewing import Judged, Label
from operators.vectors import normalise
from pipeline.assess import assess
from pipeline.audience import public_summary
from pipeline.config import load
from pipeline.embed import embed, unit_store
from pipeline.review_results import _plain
from pipeline.scan import scan
from pipeline.search import search
from pipeline.stage import Run
from pipeline.summary_schema import SUMMARY, summary_schema
from pipeline.translated import told

WIDTH = 128
CONTROLLED = (
    "assess.controlled=true", "assess.evidence.source=hold_out", "assess.evidence.neutral=true", "assess.fmr=0.01",
    "assess.evidence.alphas=[0.05]", "search.k=10",
)  # fmt: skip


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    made = summary_schema()
    assert made["properties"]["schema"]["const"] == SUMMARY
    jsonschema.Draft202012Validator.check_schema(made)
    return made


def faults(schema: dict[str, Any], found: Any) -> list[str]:
    return [f"{one.json_path}: {one.message}" for one in jsonschema.Draft202012Validator(schema).iter_errors(found)]


def summary(run: Run) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((run.folder / "summary.json").read_bytes())
    return made


@pytest.fixture(scope="module")
def world(planted_unit: Callable, planted_sets: Callable) -> Any:
    """Unlabelled sets that have nothing to do with each other."""
    rng = np.random.default_rng(5)
    units: dict[str, Any] = {}
    for role in ("release", "training", "control", "anchor", "placebo"):
        stored, failed = normalise(rng.standard_normal((60, WIDTH)))[0], np.zeros(60, bool)
        units[role] = (planted_unit(role, 0, stored[:20], failed[:20]), planted_unit(role, 1, stored[20:], failed[20:]))
    return planted_sets(units)


def test_an_audit_of_real_images_without_a_control_claim_follows_the_schema(schema: Any, audited: Path) -> None:
    with Run(load(str(audited))) as run:
        found = summary(run)
    assert found["evidence"] is None and found["schema"] == SUMMARY
    assert found["sets"]["release"]["rejected"] and found["classes"] is not None
    assert faults(schema, found) == []
    assert faults(schema, public_summary(found)) == []


def test_a_controlled_audit_that_finds_nothing_follows_the_schema(
    session: None, schema: Any, world: Any, committed: Callable[..., Run]
) -> None:
    """One that finds leaked people is checked in test_audience.py, as it is published."""
    run = committed(world, *CONTROLLED)
    search(run)
    assess(run)
    found = summary(run)
    told = found["evidence"]
    assert told["claim"] and told["excess"] and told["listed"] == 0
    assert told["placebo"] is not None and found["calibration"]["labels"] is False and found["classes"] is None
    assert faults(schema, found) == []
    assert faults(schema, public_summary(found)) == []


def test_a_translated_set_follows_the_schema(schema: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "ray", lambda self: pytest.fail("no session is needed"))
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    vectors = {role: rng.standard_normal((count, WIDTH)) for role, count in (("release", 5), ("bridge", 300))}
    vectors |= {"training": rng.standard_normal((5, WIDTH)) @ turn, "bridge_vectors": vectors["bridge"] @ turn}
    for role, own in vectors.items():
        (tmp_path / role).mkdir()
        np.save(tmp_path / role / "v.npy", own.astype(np.float32))
    sets: dict[str, Any] = {role: {"uri": str(tmp_path / role)} for role in vectors}
    sets["training"]["foreign"] = True
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"out": str(tmp_path / "run"), "sets": sets}))
    with Run(load(str(tmp_path / "a.yaml"))) as run:
        scan(run)
        embed(run)
        found = told(run, unit_store(run))
    assert found is not None and found["sets"] == ["training"]
    assert faults(schema["properties"]["translation"], found) == []
    assert faults(schema["properties"]["translation"], {"sets": ["training"]}) == [], "not embedded yet"


def test_a_review_follows_the_schema(schema: Any) -> None:
    labels = [Label.NEAR_COPY, Label.DIFFERENT, None, Label.LOOK_ALIKE]
    judged = [Judged(bool(at % 2), float(at), labels[at % 4]) for at in range(20)]
    made = reviewing.outcome(judged, 100, 100)
    part = schema["$defs"]["review"]["properties"]
    assert faults(part["outcome"], _plain({**made._asdict(), "bar": made.bar._asdict()})) == []
    both = reviewing.agreement([Label.DIFFERENT, Label.NEAR_COPY], [Label.DIFFERENT, Label.DIFFERENT])
    assert both is not None and faults(part["agreement"], _plain(both._asdict())) == []
    assert set(part["labels"]["properties"]["training"]["propertyNames"]["enum"]) == {*map(str, Label), "undecided"}


def test_what_the_schema_does_not_know_or_misses_is_refused(schema: Any, audited: Path) -> None:
    with Run(load(str(audited))) as run:
        found = summary(run)
    for change in (
        {"new": 1}, {"findings": -1}, {"arms": {}}, {"schema": "unveil/summary/2"}, {"limit": "none"},
        {"calibration": {**found["calibration"], "fmr": 1.5}},
        {"sets": {**found["sets"], "release": {**found["sets"]["release"], "rejected": {"unheard_of": 1}}}},
    ):  # fmt: skip
        assert faults(schema, found | change), change
    assert faults(schema, {name: value for name, value in found.items() if name != "arms"})


def subschemas(schema: Any, place: str = "$") -> Iterator[tuple[str, Any]]:
    """Every schema in the schema, with its place."""
    yield place, schema
    for part in ("properties", "$defs"):
        for name, one in schema.get(part, {}).items():
            yield from subschemas(one, f"{place}.{name}")
    for part in ("items", "additionalProperties"):
        if isinstance(schema.get(part), dict):
            yield from subschemas(schema[part], f"{place}[]")
    for part in ("oneOf", "anyOf"):
        for one in schema.get(part, []):
            yield from subschemas(one, place)


def test_every_field_is_described_and_every_structure_is_closed(schema: Any) -> None:
    for place, one in subschemas(schema):
        if "properties" in one:
            assert one["additionalProperties"] is False, place
            assert set(one["required"]) <= set(one["properties"]), place
            for name, field in one["properties"].items():
                assert field.get("description", "").strip(), f"{place}.{name}"
        if isinstance(one.get("additionalProperties"), dict):
            assert one["additionalProperties"]["description"], place
