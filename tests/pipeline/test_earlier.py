"""A set that grew is embedded where it is new, whatever units its images fall into."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from operators.tables import UNITS
from pipeline.config import AuditConfig
from pipeline.embed import embed, unit_store
from pipeline.scan import scan
from pipeline.stage import Run


@pytest.mark.ray
def test_scattered_new_images_are_the_only_ones_embedded_and_the_units_are_those_of_a_fresh_audit(
    session: None, configured: Callable[..., AuditConfig], corpus: Path, audited_once: Path, tmp_path: Path
) -> None:
    release = tmp_path / "release"
    shutil.copytree(corpus / "release", release)
    images = sorted(path for path in release.rglob("*") if path.suffix in (".jpg", ".png"))
    held = images[5::20]
    assert len(held) >= 2
    for path in held:
        shutil.move(path, tmp_path / path.name)
    config = configured(f"sets.release.uri={release}")
    shutil.copytree(audited_once / "run" / "store", tmp_path / "run" / "store")
    with Run(config) as run:
        for unit in audited_units(audited_once, run):
            unit_store(run).forget(f"{unit}.commit.json")
        scan(run)
        embed(run)
        before = set(run.table("scan", "release", UNITS)["unit"].to_pylist())
        for path in held:
            shutil.move(tmp_path / path.name, path)
        scan(run)
        embed(run)
        facts = run.ledger.record["stages"]["embed"]
        units = run.table("scan", "release", UNITS)["unit"].to_pylist()
        assert facts["embedded_now"] - facts["copied_now"] == len(held) < facts["embedded_now"]
        assert len(before - set(units)) >= 2
        fresh = audited_once / "run" / "store" / "embeddings" / unit_store(run).name
        for unit in units:
            path = unit_store(run).root / f"{unit}.parquet"
            assert path.read_bytes() == (fresh / path.name).read_bytes()


def audited_units(folder: Path, run: Run) -> list[str]:
    """The units of the release that the audit in `folder` embedded."""
    made = run.store.__class__(folder / "run").child("scan").read("release")
    units: list[str] = made["unit"].to_pylist()
    return units
