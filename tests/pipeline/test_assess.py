"""assess on made-up embeddings whose answer is known."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from operators.errors import CapacityError, ConfigError
from operators.records import embeddings
from operators.tables import CANDIDATES, FINDINGS, REJECTS, UNITS
from operators.vectors import normalise, to_arrow
from pipeline.assess import assess
from pipeline.config import AuditConfig
from pipeline.embed import closing_key, unit_store
from pipeline.search import search
from pipeline.stage import Run

pytestmark = pytest.mark.ray
Configured = Callable[..., AuditConfig]
PERSONS, IMAGES = 40, 5


def world(run: Run, *, labels: bool = True) -> dict[str, np.ndarray]:
    """Forty persons an arm; the first six release images copy training persons 0, 1 and 2 twice each."""
    rng = np.random.default_rng(3)
    vectors = {}
    for role in run.config.sets.given():
        centres = rng.standard_normal((PERSONS, 128)).repeat(IMAGES, axis=0)
        vectors[role] = centres + 0.6 * rng.standard_normal(centres.shape)
    for copy in range(6):
        vectors["release"][copy] = vectors["training"][IMAGES * (copy // 2)] + 0.2 * rng.standard_normal(128)
    stored = {role: normalise(raw)[0] for role, raw in vectors.items()}
    for role, unit in stored.items():
        _commit(run, role, unit, labels)
    return stored


def _commit(run: Run, role: str, stored: np.ndarray, labels: bool) -> None:
    count = len(stored)
    keys = [f"{i:04d}.jpg" for i in range(count)]
    identities = [f"{role}{i // IMAGES}" if labels else None for i in range(count)]
    table = pa.table(
        {
            "key": keys,
            "identity": pa.array(identities, pa.string()),
            "digest": [f"{role}{i}" for i in range(count)],
            "status": ["ok"] * count,
            "vector": to_arrow(stored, np.ones(count, bool)),
        }
    )
    schema = embeddings(128).schema
    columns = [table[f.name] if f.name in table.column_names else pa.nulls(count, f.type) for f in schema]
    facts = {"status": {"ok": count}, "device": "test"}
    unit_store(run).commit(
        role, pa.table(columns, schema=schema), contract=embeddings(128).contract, key=role, facts=facts
    )
    members = [{"key": k, "identity": i, "bytes": 1, "digest": "d"} for k, i in zip(keys, identities, strict=True)]
    row = {"set": role, "uri": "-", "format": "folder", "unit": role, "first_row": 0, "members": members}
    listed = {"images": count, "identities": PERSONS * labels, "unlisted": {}, "form": "folder", "notes": []}
    units = UNITS.from_rows([row])
    run.save("scan", role, UNITS, units, key="test", **listed)
    run.save("embed", role, REJECTS, REJECTS.from_rows([]), key=closing_key(run, units), status={"ok": count})


def assessed(config: AuditConfig, *, labels: bool = True) -> tuple[dict[str, np.ndarray], dict, pa.Table, pa.Table]:
    with Run(config) as run:
        stored = world(run, labels=labels)
        search(run)
        assess(run)
        summary = json.loads((Path(config.out) / "summary.json").read_text())
        return stored, summary, run.table("assess", "candidates", CANDIDATES), run.table("assess", "findings", FINDINGS)


def scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left.astype(np.float64) @ right.astype(np.float64).T


def test_the_whole_statement_agrees_with_numpy(session: None, configured: Configured) -> None:
    stored, summary, candidates, findings = assessed(configured())
    person = np.arange(PERSONS * IMAGES) // IMAGES
    upper = np.triu(np.ones((len(person),) * 2, bool), 1) & (person[:, None] != person[None])
    non_mated = scores(stored["training"], stored["training"])[upper]
    about = summary["calibration"]
    assert about["pairs"] == len(non_mated) == 200 * 199 // 2 - 40 * 10
    assert about["over"] == (non_mated >= about["threshold"]).sum() == 10
    assert about["fmr"] == 10 / len(non_mated)
    for arm in ("training", "control", "anchor"):
        truth = scores(stored["release"], stored[arm]) >= about["threshold"]
        said = summary["arms"][arm]
        assert said["comparisons"] == truth.size
        assert said["candidates"] == truth.sum()
        assert said["release_images"] == truth.any(1).sum()
        assert said["persons"] == len(set(person[truth.any(0)]))
        assert said["expected_false"] == pytest.approx(truth.size * 10 / len(non_mated))
        assert said["highest"] == scores(stored["release"], stored[arm]).max()
    best = findings.to_pylist()[:3]
    assert {row["training_identity"] for row in best} == {"training0", "training1", "training2"}
    assert findings.num_rows == summary["findings"] == summary["arms"]["training"]["persons"]
    assert set(candidates["arm"].to_pylist()) <= {"training", "control", "anchor"}
    assert not [row for row in findings.to_pylist() if not row["training_identity"].startswith("training")]


def test_a_set_without_labels_is_assessed_by_image_and_says_so(session: None, configured: Configured) -> None:
    _, summary, _, findings = assessed(configured(), labels=False)
    assert summary["calibration"]["labels"] is False and summary["calibration"]["mated"] == 0
    assert findings["training_identity"].null_count == findings.num_rows


def test_the_rate_can_be_chosen_and_a_rate_beyond_measure_is_refused(session: None, configured: Configured) -> None:
    _, summary, _, _ = assessed(configured("assess.fmr=0.01"))
    assert summary["calibration"]["over"] == int(0.01 * summary["calibration"]["pairs"])
    with pytest.raises(CapacityError, match=r"assess\.fmr=1e-09 cannot be measured"):
        assessed(configured("assess.fmr=1e-9"))


def test_a_threshold_below_the_searchs_floor_is_refused_with_the_floor_to_use(
    session: None, configured: Configured
) -> None:
    with pytest.raises(ConfigError, match=r"kept pairs from 0\.9 up only.*search\.floor=0\.\d\d or without"):
        assessed(configured("search.floor=0.9"))


def test_the_calibration_sample_is_a_function_of_the_seed(session: None, configured: Configured) -> None:
    def threshold(seed: int) -> float:
        overrides = ("assess.calibration_images=90", f"assess.seed={seed}", "search.floor=0.0")
        return assessed(configured(*overrides))[1]["calibration"]["threshold"]

    assert threshold(1) == threshold(1) != threshold(2)
