"""Planted copies of control people, and two face models, in one small audit of real images."""

import json
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from operators.calibration import proportion
from operators.errors import ConfigError
from operators.tables import FINDINGS, IMAGE_UNITS, PAIR_EVIDENCE, PEOPLE
from pipeline.audit import audit
from pipeline.calibrate import set_columns
from pipeline.config import load
from pipeline.imagery import Imagery
from pipeline.plant import PlantConfig, _inner, chosen, plant_copies, planted_recall
from pipeline.second import opinions
from pipeline.stage import Run
from pipeline.tiers import stored_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]
OPTIONS = (
    "assess.controlled=true", "assess.evidence.source=hold_out", "assess.evidence.neutral=true",
    "assess.evidence.alphas=[0.2]", "assess.evidence.combine=none", "embedders=[sface_2021dec,dlib_resnet_v1]",
    "plant.transforms=[copy,flip,blend_50]", "plant.persons=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(session: None, root: Path, audited: Path) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        config = load(str(audited), OPTIONS)
        audit(config)
        audit(config, "plant", "assess", "report")
        return Run(config)


def test_recall_is_that_of_plain_counting_over_all_cosines(run: Run) -> None:
    inner = _inner(run, run.folder / "plant")
    (planted_ND, all_planted), (control_ND, audited) = stored_rows(inner, "release"), stored_rows(run, "control")
    cosine_PG = np.full((len(all_planted), len(audited)), -1.0)
    cosine_PG[np.ix_(all_planted, audited)] = planted_ND.astype(np.float64) @ control_ND.astype(np.float64).T
    best_G = cosine_PG.max(axis=0)
    people = {row["unit"]: row for row in run.table("assess", "people", PEOPLE).to_pylist()}
    units = run.table("assess", "image_units", IMAGE_UNITS)
    unit_G = units.filter(pc.equal(units["arm"], "control"))["unit"].to_numpy()
    found = json.loads((run.folder / "plant/recall.json").read_bytes())
    sources = chosen(run, run.table("assess", "people", PEOPLE), run.config.plant)
    assert len(all_planted) == len(sources) == len({source.unit for source in sources}) == 12
    assert {source.transform: len(source.rows) for source in sources} == {"copy": 1, "flip": 1, "blend_50": 2}
    for told in found["classes"]:
        own = [source.unit for source in sources if source.transform == told["transform"]]
        cosines = [max(people[unit]["cosine"], best_G[unit_G == unit].max()) for unit in own]
        statistics = [cosine - people[unit]["anchor_cosine"] for cosine, unit in zip(cosines, own, strict=True)]
        for bar, values in (("over_threshold", cosines), ("excess", statistics)):
            reached = sum(value >= found["bars"][bar] for value in values)
            assert told["recall"][bar] == proportion(reached, 4)._asdict()
        if told["transform"] == "blend_50":
            keys = set_columns(inner, "release", ("key",))["key"].to_pylist()
            pairs = [(keys.index(source.key), source.rows) for source in sources if source.transform == "blend_50"]
            both = [min(cosine_PG[row][list(rows)]) >= found["bars"]["over_threshold"] for row, rows in pairs]
            assert told["mmpmr"] == proportion(sum(both), 4)._asdict()
        if told["transform"] == "copy":
            assert min(cosines) > 0.999


def test_the_summary_and_a_second_call_take_the_recall_of_the_same_audit_only(run: Run) -> None:
    told = json.loads((run.folder / "summary.json").read_bytes())["evidence"]
    assert [one["transform"] for one in told["recall"]] == ["copy", "flip", "blend_50"]
    assert list(planted_recall(run)) == told["recall"]
    found = json.loads((run.folder / "plant/recall.json").read_bytes())
    changed = json.dumps(found | {"key": "of another audit"})
    (run.folder / "plant/recall.json").write_text(changed)
    assert list(planted_recall(run)) == []
    (run.folder / "plant/recall.json").write_text(json.dumps(found))


def test_planted_images_are_private_and_reach_no_table_of_the_audit(run: Run) -> None:
    images = sorted((run.folder / "plant/images").rglob("*.png"))
    assert len(images) == 12
    assert {path.stat().st_mode & 0o777 for path in images} == {0o600}
    release = set_columns(run, "release", ("key",))["key"].to_pylist()
    assert not [key for key in release if key.endswith(".png")]


def test_a_second_model_searches_the_same_sets_and_confirms(run: Run) -> None:
    (other,) = opinions(run)
    assert other.config.embedder.name == "dlib_resnet_v1"
    rows = [len(set_columns(one, "training", ("key",))) for one in (run, other)]
    assert rows[0] == rows[1]
    evidence = run.table("assess", "pair_evidence", PAIR_EVIDENCE).to_pylist()
    assert any(row["second_z"] is not None for row in evidence)
    findings = run.table("assess", "findings", FINDINGS).to_pylist()
    assert len(evidence) == len(findings)
    assert any("second model" in row["reasons"] for row in findings)
    told = json.loads((run.folder / "summary.json").read_bytes())["evidence"]
    assert told["models"] == ["sface_2021dec", "dlib_resnet_v1"]
    assert "determine a rotation" in told["disagreement"]["not_possible"]  # so few anchor faces fit no map


def test_tiers_tell_copies_from_the_rest_by_pixels(run: Run) -> None:
    told = json.loads((run.folder / "summary.json").read_bytes())["evidence"]["pairs"]
    assert told["judged"] == sum(told["tiers"].values()) > 0
    assert told["copies"]["control_pairs"] > 5
    with Imagery(run, "training") as training:
        first = training(0)
        assert first is not None
        assert first.crop.shape == (112, 112, 3)
        missing = [row for row, status in enumerate(training.columns["status"].to_pylist()) if status != "ok"]
        assert [training(row) for row in missing] == [None] * len(missing)


def test_an_image_that_is_not_what_was_audited_is_not_looked_at(run: Run) -> None:
    with Imagery(run, "training") as training:
        row = training.columns["status"].to_pylist().index("ok")
        assert training(row) is not None
        at = training.columns.schema.get_field_index("digest")
        training.columns = training.columns.set_column(at, "digest", [["0" * 64] * len(training.columns)])
        assert training(row) is None
        assert training.gone.total() == 1


def test_an_audit_without_a_control_set_has_nobody_to_plant(audited: Path, root: Path) -> None:
    config = load(str(audited), ["sets.control=null", "assess.controlled=true"])
    with pytest.raises(ConfigError, match="this audit has none"):
        plant_copies(Run(config))


@pytest.mark.parametrize(("option", "value"), [("transforms", ["x"]), ("persons", 0)])
def test_options_that_mean_nothing_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        PlantConfig(**{option: value})
