"""The run's manifest `run.json`: what was run, on what, with which versions, and how long each stage took."""

import hashlib
import importlib.metadata
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage import to_json, write_private
from operators.addresses import public, public_values
from pipeline import __version__

if TYPE_CHECKING:
    from pipeline.config import AuditConfig

PACKAGES = (
    "ray", "torch", "onnxruntime", "onnxruntime-gpu", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu11",
    "faiss-gpu-cu12", "faiss-gpu-cu12-cuvs", "faiss-gpu-cu13-cuvs", "faiss-cuda", "pyarrow", "numpy", "scipy", "numba",
    "cryptography", "omegaconf", "onnx", "opencv-python-headless", "pillow", "jinja2", "matplotlib",
)  # fmt: skip


class Ledger:
    """Keeps `run.json` current; every change is one atomic replacement of the file."""

    def __init__(self, path: Path, config: "AuditConfig") -> None:
        from pipeline.config import to_dict

        self.path = path
        self.record: dict[str, Any] = {
            "unveil": __version__,
            "code": code_fingerprint(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "versions": versions(),
            "config": public_values(to_dict(config)),
            "weights": {public(config.embedder.path): config.embedder.sha256},
            "datasets": {},
            "stages": {},
        }
        if config.faces.mode == "detect":
            self.record["weights"][public(config.faces.detector)] = config.faces.detector_sha256
        earlier = _read(path)
        for part in ("datasets", "stages"):
            self.record[part] = earlier.get(part, {})

    def stage(self, name: str, facts: dict[str, Any]) -> None:
        """Record what a stage did."""
        self.record["stages"][name] = facts
        self._write()

    def datasets(self, digests: dict[str, str]) -> None:
        """Record the digest of each set's content."""
        self.record["datasets"] = digests
        self._write()

    def _write(self) -> None:
        write_private(self.path, to_json(self.record))


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_fingerprint() -> str:
    """SHA-256 over the source of the three packages, 32 hex digits."""
    root = Path(__file__).resolve().parent.parent
    whole = hashlib.sha256()
    for package in ("operators", "cluster", "pipeline"):
        for path in sorted((root / package).rglob("*.py")):
            whole.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:32]
