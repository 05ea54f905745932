"""A small audit on real images: made-up faces, real models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.audit import audit
from pipeline.config import AuditConfig, load

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo corpus at its smallest scale."""
    from seeds.demo.corpus import make

    out = tmp_path_factory.mktemp("corpus") / "small"
    make(out, scale=0.02)
    return out


@pytest.fixture
def configured(corpus: Path, tmp_path: Path) -> Callable[..., AuditConfig]:
    """Build the configuration of an audit of the small corpus; overrides are `key=value` texts."""

    def build(*overrides: str) -> AuditConfig:
        return load(str(write_config(corpus, tmp_path)), overrides)

    return build


@pytest.fixture
def config_file(corpus: Path, tmp_path: Path) -> Path:
    """The same configuration as a file."""
    return write_config(corpus, tmp_path)


@pytest.fixture(scope="module")
def audited(session: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of an audit that has run."""
    path = write_config(corpus, tmp_path_factory.mktemp("audited"))
    audit(load(str(path)))
    return path


def write_config(corpus: Path, folder: Path) -> Path:
    values: dict[str, Any] = {
        "out": str(folder / "run"),
        "sets": {role: {"uri": str(corpus / role)} for role in ("release", "training", "control", "anchor")},
        "faces": {"detector": str(ROOT / "models" / "yunet_2023mar.onnx")},
        "embedder": {"path": str(ROOT / "models" / "sface_2021dec.onnx")},
        "scan": {"unit_images": 16},
        "ray": {"cpus": 2, "object_store_mb": 256},
    }
    path = folder / "audit.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
