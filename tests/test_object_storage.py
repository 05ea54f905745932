"""Sets and embeddings in object storage give the embeddings that local ones give, to the bit."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest

from cluster.faults import IncompleteTable
from operators.tables import UNITS
from pipeline.config import AuditConfig, load
from pipeline.embed import embed, unit_store
from pipeline.scan import scan
from pipeline.stage import Run
from seeds.demo.corpus import make

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def servers(root: Path) -> ModuleType:
    name = "object_store_for_audits"
    spec = importlib.util.spec_from_file_location(name, root / "tests" / "object_store.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def configuration(root: Path, folder: Path, release: str, training: str, *more: str) -> AuditConfig:
    path = folder / "audit.yaml"
    models = root / "models"
    lines = [
        f"out: {folder}/run", f"faces: {{detector: {models}/yunet_2023mar.onnx}}",
        f"embedder: {{path: {models}/sface_2021dec.onnx, runtime: onnxruntime}}",
        "sets:", f"  release: {{uri: '{release}'}}", f"  training: {{uri: '{training}'}}",
        "scan: {unit_images: 16}", "ray: {cpus: 2, object_store_mb: 256}", *more,
    ]  # fmt: skip
    path.write_text("\n".join(lines))
    return load(str(path))


def embedded(config: AuditConfig, role: str) -> pa.Table:
    run = Run(config)
    store = unit_store(run)
    units = run.table("scan", role, UNITS)["unit"].to_pylist()
    return pa.concat_tables([store.read(name) for name in units]).combine_chunks()


def test_an_audit_from_and_to_object_storage(root: Path, session: None, tmp_path: Path, monkeypatch) -> None:
    make(tmp_path / "corpus", scale=0.01)
    places = {role: tmp_path / "corpus" / role for role in ("release", "training")}
    (tmp_path / "local").mkdir()
    local = configuration(root, tmp_path / "local", *map(str, places.values()))
    with Run(local) as run:
        scan(run)
        embed(run)
    archive = tmp_path / "training.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(places["training"].rglob("*")):
            file.write(path, path.relative_to(places["training"]))
    with servers(root).object_store() as server:
        for path in sorted(path for path in places["release"].rglob("*") if path.is_file()):
            server.put(f"synthetic/{path.relative_to(places['release'])}", path.read_bytes())
        server.put("real/training.zip", archive.read_bytes())
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "far").mkdir()
        far = configuration(
            root, tmp_path / "far", "s3://sets/synthetic", "s3://sets/real/training.zip", "store: s3://sets/store"
        )
        for verb in ("scan", "embed"):
            unveil(root, verb, tmp_path / "far" / "audit.yaml")
        for role in places:
            assert embedded(far, role).equals(embedded(local, role))
        stored = [key for key in server.names() if key.startswith("store/") and key.endswith(".parquet")]
        assert len(stored) == len({*units(local, "release"), *units(local, "training")})
        for key in stored:
            server.put(key, b"damaged")
        with pytest.raises(IncompleteTable, match="bytes differ from the committed ones"):
            embedded(far, "release")


def unveil(root: Path, verb: str, path: Path) -> None:
    """In a process of its own, whose workers see the credentials."""
    command = [sys.executable, "-m", "pipeline", verb, str(path)]
    ended = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in ended.stderr + ended.stdout


def units(config: AuditConfig, role: str) -> list[str]:
    return Run(config).table("scan", role, UNITS)["unit"].to_pylist()
