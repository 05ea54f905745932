"""Sets in other forms, and ready vectors, give the units and embeddings that a folder gives."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from operators.errors import FormatError
from operators.tables import UNITS
from pipeline.calibrate import set_columns
from pipeline.config import AuditConfig
from pipeline.embed import embed, unit_store
from pipeline.scan import scan
from pipeline.stage import Run

Configured = Callable[..., AuditConfig]


def units(run: Run, role: str) -> list[str]:
    return run.table("scan", role, UNITS)["unit"].to_pylist()


def test_a_zip_of_a_folder_has_the_units_of_the_folder(configured: Configured, tmp_path: Path) -> None:
    """So nothing of it has to be embedded again."""
    with Run(configured()) as run:
        scan(run)
        folder = units(run, "training")
    root = Path(configured().sets.training.uri)
    with zipfile.ZipFile(tmp_path / "training.zip", "w") as archive:
        for path in sorted(root.rglob("*"), reverse=True):
            archive.write(path, path.relative_to(root))
    with Run(configured(f"sets.training.uri={tmp_path}/training.zip", f"out={tmp_path}/zipped")) as run:
        scan(run)
        assert run.commit("scan", "training").facts["form"] == "zip"
        assert units(run, "training") == folder


@pytest.fixture
def vectors(tmp_path: Path) -> dict[str, np.ndarray]:
    """Two sets of ready vectors as `.npy` with ids."""
    rng = np.random.default_rng(0)
    made = {role: rng.normal(0, 2, (12, 128)).astype(np.float32) for role in ("release", "training")}
    for role, own in made.items():
        folder = tmp_path / "vectors" / role
        folder.mkdir(parents=True)
        np.save(folder / "embeddings.npy", own)
        (folder / "embeddings.txt").write_text("\n".join(f"p{at % 4}/{at}.jpg" for at in range(12)))
    return made


def options(folder: Path) -> list[str]:
    return [
        *(f"sets.{role}.uri={folder}/vectors/{role}" for role in ("release", "training")),
        "sets.control=null",
        "sets.anchor=null",
        f"out={folder}/given",
    ]


def test_ready_vectors_are_stored_without_models_or_ray(
    configured: Configured, tmp_path: Path, vectors: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "ray", lambda self: pytest.fail("no session is needed"))
    config = configured(*options(tmp_path), "embedder.path=gone.onnx")
    with Run(config) as run:
        scan(run)
        embed(run)
        for role, own in vectors.items():
            assert run.commit("scan", role).facts["form"] == "vectors"
            columns = set_columns(run, role, ("key", "identity", "status", "norm"))
            assert set(columns["status"].to_pylist()) == {"ok"}
            place = {f"p{at % 4}/{at}.jpg": at for at in range(12)}
            rows = [place[key] for key in columns["key"].to_pylist()]
            assert columns["identity"].to_pylist() == [f"p{at % 4}" for at in rows]
            lengths = np.linalg.norm(own.astype(np.float64), axis=1)
            np.testing.assert_allclose(columns["norm"].to_numpy(), lengths[rows], rtol=1e-6)
            stored = np.concatenate(
                [unit_store(run).read(u)["vector"].combine_chunks().flatten() for u in units(run, role)]
            )
            expected = (own.astype(np.float64) / lengths[:, None]).astype(np.float16)[rows]
            np.testing.assert_array_equal(stored.reshape(-1, 128), expected)


def test_vectors_of_another_width_are_rows_and_a_set_of_nothing_else_is_refused(
    configured: Configured, tmp_path: Path, vectors: dict[str, np.ndarray]
) -> None:
    np.save(tmp_path / "vectors/release/embeddings.npy", vectors["release"][:, :100])
    with Run(configured(*options(tmp_path))) as run:
        scan(run)
        with pytest.raises(
            FormatError, match=r"sets\.release: none of its 12 images could be audited .bad_embedding 12"
        ):
            embed(run)
        rejects = run.store.child("embed").read("release")
    assert pc.unique(rejects["error"]).to_pylist() == ["the vector has 100 components; the model gives 128"]


def test_vectors_are_of_one_model(
    configured: Configured, tmp_path: Path, root: Path, vectors: dict, monkeypatch
) -> None:
    monkeypatch.chdir(root)
    with Run(configured(*options(tmp_path), "embedders=[sface_2021dec,dlib_resnet_v1]")) as run:
        scan(run)
        with pytest.raises(FormatError, match="holds ready embeddings, which are of one model"):
            embed(run)
