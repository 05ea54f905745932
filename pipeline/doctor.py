"""doctor: is this machine ready for this audit?"""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from operators.backbones import OnnxBackbone
from operators.detectors import YuNet
from operators.errors import AuditError, ModelError
from operators.tables import FACE_PIXELS
from pipeline.config import AuditConfig
from pipeline.ledger import versions

EXCLUSIVE = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12"),
}
"""Libraries that come in builds of which exactly one may be installed: two overwrite each other's files."""


def doctor(config: AuditConfig) -> tuple[str, bool]:
    """A report on versions, builds, devices and models, and whether all is well."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {_cpus()} CPUs"]
    lines += [f"{name} {version}" for name, version in versions().items()]
    checks: list[tuple[str, Callable[[], str]]] = [
        *((f"one build of {library}", _one_build(library)) for library in EXCLUSIVE),
        ("detector", lambda: _detector(config)),
        ("embedder", lambda: _embedder(config)),
    ]
    results = list(_outcomes(checks))
    return "\n".join([*lines, "", *(line for line, _ in results)]), all(good for _, good in results)


def _outcomes(checks: list[tuple[str, Callable[[], str]]]) -> Iterator[tuple[str, bool]]:
    for name, check in checks:
        try:
            yield f"ok      {name}: {check()}", True
        except AuditError as error:
            yield f"FAILED  {name}: {error}", False


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _one_build(library: str) -> Callable[[], str]:
    return lambda: one_build(library)


def one_build(library: str) -> str:
    """Name and version of the only installed build of `library`.

    Raises
    ------
    ModelError
        If none or several builds are installed.
    """
    found = []
    for name in EXCLUSIVE[library]:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if not found:
        raise ModelError(f"{library} is not installed. Install `unveil[cpu]`, or `unveil[gpu]` where there is a GPU.")
    if len(found) > 1:
        raise ModelError(f"{' and '.join(found)} overwrite each other. Uninstall all of them, then install one.")
    return found[0]


def _detector(config: AuditConfig) -> str:
    if config.faces.mode == "aligned":
        return "not needed, the sets are aligned"
    faces = config.faces
    YuNet(faces.detector, faces.detector_sha256, min_score=faces.min_score, longest_side=faces.longest_side)
    return f"{faces.detector} opens, SHA-256 {faces.detector_sha256[:16]}..."


def _embedder(config: AuditConfig) -> str:
    backbone = OnnxBackbone(replace(config.embedder, batch=1))
    grey = np.full((1, FACE_PIXELS, FACE_PIXELS, 3), 127, np.uint8)
    if not np.isfinite(backbone(grey)).all():
        raise ModelError(f"{config.embedder.path}: the embedding of a grey picture is not finite. Use another model.")
    return f"{config.embedder.name} runs on {backbone.device}, width {config.embedder.width}"
