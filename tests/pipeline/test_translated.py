"""Another model's embeddings in an audit, on made-up vectors: a rotation and noise lie between the two models."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from operators.errors import CapacityError, ConfigError, FormatError
from operators.tables import REJECTS, UNITS
from pipeline.calibrate import set_columns
from pipeline.config import AuditConfig, load
from pipeline.embed import embed, unit_store
from pipeline.scan import scan
from pipeline.search import comparisons
from pipeline.stage import Run
from pipeline.translated import cautions, fit, told

WIDTH, FOREIGN = 128, 96
SIZES = {"release": 40, "training": 60, "control": 60, "bridge": 300}
LEAKED = 20
NOISE = 0.2
Configured = Callable[..., AuditConfig]
Write = Callable[..., None]


def keys(role: str, count: int) -> list[str]:
    return [f"{role}-{at:03d}.jpg" for at in range(count)]


@pytest.fixture(scope="module")
def world() -> dict[str, np.ndarray]:
    """People have 64 features. Each model sees them through a rotation of its own, with noise of its own; the first
    `LEAKED` release images show training people."""
    rng = np.random.default_rng(0)
    people = {role: rng.standard_normal((size, 64)) for role, size in SIZES.items()}
    people["release"][:LEAKED] = people["training"][:LEAKED]
    sees = {width: np.linalg.qr(rng.standard_normal((width, 64)))[0].T for width in (WIDTH, FOREIGN)}

    def embedded(role: str, width: int) -> np.ndarray:
        clean = people[role] @ sees[width]
        return np.asarray(clean + NOISE * rng.standard_normal(clean.shape), np.float32)

    made = {"release": WIDTH, "training": FOREIGN, "control": FOREIGN, "bridge": WIDTH}
    return {role: embedded(role, width) for role, width in made.items()} | {
        "bridge_vectors": embedded("bridge", FOREIGN)
    }


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(role: str, vectors: np.ndarray, names: list[str] | None = None) -> None:
        (tmp_path / role).mkdir(exist_ok=True)
        np.save(tmp_path / role / "v.npy", vectors)
        names = names or keys(role.removesuffix("_vectors"), len(vectors))
        (tmp_path / role / "v.txt").write_text("\n".join(names))

    return save


@pytest.fixture
def configured(
    tmp_path: Path, world: dict[str, np.ndarray], write: Write, monkeypatch: pytest.MonkeyPatch
) -> Configured:
    monkeypatch.setattr(Run, "ray", lambda self: pytest.fail("no session is needed"))
    for role, own in world.items():
        write(role, own)
    values = {
        "out": str(tmp_path / "run"),
        "store": str(tmp_path / "store"),
        "sets": {role: {"uri": str(tmp_path / role), "foreign": role in ("training", "control")} for role in world},
        "embedder": {"path": "none.onnx", "width": WIDTH},
        "scan": {"unit_images": 32},
    }
    path = tmp_path / "audit.yaml"
    path.write_text(yaml.safe_dump(values))
    return lambda *overrides: load(str(path), overrides)


def stored(run: Run, role: str) -> np.ndarray:
    """Stored vectors in key order, not a number where there is none."""
    column = set_columns(run, role, ("vector",))["vector"].to_pylist()
    return np.array([[np.nan] * WIDTH if one is None else one for one in column], np.float64)


def units(run: Run, role: str) -> list[str]:
    return list(run.table("scan", role, UNITS)["unit"].to_pylist())


def hits(cosine: np.ndarray) -> int:
    return int((cosine[:LEAKED].argmax(axis=1) == np.arange(LEAKED)).sum())


def test_leaked_pairs_are_found_through_the_map(configured: Configured, world: dict[str, np.ndarray]) -> None:
    with Run(configured()) as run:
        scan(run)
        embed(run)
        cosine = stored(run, "release") @ stored(run, "training").T
        chance = stored(run, "release") @ stored(run, "control").T
        assert hits(cosine) == LEAKED
        assert cosine[np.arange(LEAKED), np.arange(LEAKED)].min() > max(chance.max(), cosine[LEAKED:].max())
        given = world["training"].astype(np.float64)
        norms = set_columns(run, "training", ("norm",))["norm"].to_numpy()
        np.testing.assert_allclose(norms, np.linalg.norm(given, axis=1), rtol=1e-6)
        facts = json.loads((run.folder / "run.json").read_bytes())["stages"]["embed"]
        assert facts["translation"]["sets"] == ["training", "control"]
        assert facts["bridge"]["status"] == {"ok": 300} and "bridge_vectors" not in facts
    # the same space seen as it is, without the map
    left, right = world["release"][:, :FOREIGN].astype(np.float64), given
    plain = left @ right.T / np.linalg.norm(left, axis=1)[:, None] / np.linalg.norm(right, axis=1)
    assert hits(plain) <= 3


def test_the_map_is_the_least_squares_one_and_its_facts_are_told(
    configured: Configured, world: dict[str, np.ndarray]
) -> None:
    with Run(configured()) as run:
        scan(run)
        embed(run)
        fitted, facts = fit(run, unit_store(run))
        about = told(run, unit_store(run))
        x, y = (world[role].astype(np.float64) for role in ("bridge_vectors", "bridge"))
        x, y = (one / np.linalg.norm(one, axis=1)[:, None] for one in (x, y))
        centred = x - x.mean(axis=0)
        inner = centred.T @ centred + fitted.penalty * np.eye(FOREIGN)
        solved = np.linalg.solve(inner, centred.T @ (y - y.mean(axis=0)))
        np.testing.assert_allclose(x @ fitted.map_DE + fitted.offset_E, centred @ solved, atol=2e-3)  # about the mean
        left_out = facts["error"] ** 2 / ((y - y.mean(axis=0)) ** 2).sum(axis=1).mean()
        assert facts["explained"] == pytest.approx(1 - left_out, abs=1e-3) and facts["explained"] > 0.5
        assert (facts["kind"], facts["pairs"], facts["source_width"]) == ("ridge", 300, FOREIGN)
        assert about == {"sets": ["training", "control"], **facts}
        assert [role for one in comparisons(run, 0.5) for role in (one.queries, *one.gallery) if "bridge" in role] == []
        (only,) = cautions(about)
        assert "training, control" in only and "not those of one model" in only
        assert "hardly anything" in cautions(about | {"explained": 0.05})[1]
        assert cautions(None) == []


def test_images_of_the_bridge_without_a_vector_are_counted_and_few_pairs_give_a_rotation(
    configured: Configured, world: dict[str, np.ndarray], write: Write
) -> None:
    write("bridge_vectors", world["bridge_vectors"][:120], [*keys("bridge", 110), *(f"gone-{i}" for i in range(10))])
    with Run(configured()) as run:
        scan(run)
        embed(run)
        facts = told(run, unit_store(run))
        assert facts is not None
        assert (facts["kind"], facts["pairs"]) == ("rotation", 110)
        assert (facts["bridge_without_vector"], facts["vectors_without_bridge"]) == (190, 10)
        assert hits(stored(run, "release") @ stored(run, "training").T) == LEAKED


def test_too_few_pairs_and_no_common_key_are_refused(
    configured: Configured, world: dict[str, np.ndarray], write: Write
) -> None:
    write("bridge_vectors", world["bridge_vectors"][:50])
    with Run(configured()) as run:
        scan(run)
        with pytest.raises(CapacityError, match="50 paired faces do not determine a rotation of 96 components"):
            embed(run)
    write("bridge_vectors", world["bridge_vectors"], keys("other", 300))
    with Run(configured()) as run, pytest.raises(FormatError, match="no key in common"):
        scan(run)


def test_an_audited_face_in_the_bridge_is_refused(
    configured: Configured, world: dict[str, np.ndarray], write: Write
) -> None:
    changed = world["bridge_vectors"].copy()
    changed[7] = world["control"][3]
    write("bridge_vectors", changed)
    with Run(configured()) as run, pytest.raises(FormatError, match=r"bridge_vectors and sets\.control share 1 rec"):
        scan(run)


def test_names_of_foreign_units_and_of_no_others_change_with_the_bridge(
    configured: Configured, world: dict[str, np.ndarray], write: Write
) -> None:
    with Run(configured()) as run:
        scan(run)
        embed(run)
        before = {role: units(run, role) for role in ("release", "bridge", "training", "control")}
        scan(run)
        assert before == {role: units(run, role) for role in before}
        embed(run)
        facts = json.loads((run.folder / "run.json").read_bytes())["stages"]["embed"]
        assert facts["embedded_now"] == 0 and facts["translation"]["pairs"] == 300
        earlier = stored(run, "training")
    changed = world["bridge_vectors"].copy()
    changed[0] *= -1
    write("bridge_vectors", changed)
    with Run(configured()) as run:  # shares the store
        scan(run)
        after = {role: units(run, role) for role in before}
        embed(run)
        assert not np.array_equal(stored(run, "training"), earlier)
    assert after["release"] == before["release"] and after["bridge"] == before["bridge"]
    assert not set(after["training"] + after["control"]) & set(before["training"] + before["control"])


def test_bad_vectors_are_rows(configured: Configured, world: dict[str, np.ndarray], write: Write) -> None:
    bad = world["training"].copy()
    bad[3], bad[5, 2] = 0, np.nan
    write("training", bad)
    write("control", np.c_[world["control"], world["control"][:, :4]])
    with Run(configured()) as run:
        scan(run)
        with pytest.raises(FormatError, match=r"sets\.control: none of its 60 images could be audited"):
            embed(run)
        rejects = run.store.child("embed").read("training").to_pylist()
        wide = run.table("embed", "control", REJECTS)
        assert [row["key"] for row in rejects] == ["training-003.jpg", "training-005.jpg"]
        assert {row["status"] for row in rejects} == {"bad_embedding"}
        assert np.flatnonzero(np.isnan(stored(run, "training")[:, 0])).tolist() == [3, 5]
        (error,) = set(wide["error"].to_pylist())
        assert error == "the vector has more than 96 components; the model gives 96"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("sets.bridge_vectors=null", r"sets\.training is `foreign`.* Give sets\.bridge .* and sets\.bridge_vectors"),
        ("sets.control.foreign=false", r"sets\.training is `foreign` and control is not"),
        ("sets.training.foreign=false", r"sets\.control is `foreign` and training is not"),
        ("sets.bridge.foreign=true", r"sets\.bridge is embedded by the audit's embedder"),
        ("sets.control.format=zip", r"sets\.control\.foreign is for ready embeddings .* Got format 'zip'"),
    ],
)
def test_a_configuration_without_a_valid_map_is_refused(configured: Configured, override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        configured(override)


def test_several_embedders_overlaps_and_an_unused_bridge_are_refused(
    configured: Configured, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"sets\.bridge and release overlap"):
        configured(f"sets.release.uri={tmp_path}/bridge")
    with pytest.raises(ConfigError, match=r"sets\.bridge: no set is another model's embeddings"):
        configured("sets.control.foreign=false", "sets.training.foreign=false")
    configured("sets.release.foreign=true", "sets.control.foreign=false", "sets.training.foreign=false")
    monkeypatch.chdir(root)
    with pytest.raises(ConfigError, match=r"embedders must name one model where a set is `foreign`"):
        configured("embedders=[sface_2021dec,dlib_resnet_v1]")


def test_images_are_no_foreign_set(configured: Configured, tmp_path: Path) -> None:
    (tmp_path / "control" / "v.npy").unlink()
    (tmp_path / "control" / "v.txt").rename(tmp_path / "control" / "v.jpg")
    with Run(configured()) as run, pytest.raises(FormatError, match=r"sets\.control: `foreign` is for ready emb"):
        scan(run)
