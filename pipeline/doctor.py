"""doctor: is this machine ready for this audit?"""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from cluster.encrypted_parts import encryption_functions
from cluster.faults import ClusterError
from cluster.keys import master_key, named
from operators.alignment import alignment
from operators.backbones import BackboneConfig, open_backbone
from operators.errors import AuditError, ModelError
from operators.faces import open_detector
from operators.selftest import drawn_face, self_test_vector
from pipeline.config import AuditConfig
from pipeline.ledger import versions
from pipeline.models import obtained

EXCLUSIVE = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "faiss": (
        *("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cu12-cuvs"),
        *("faiss-gpu-cu13-cuvs", "faiss-cuda"),
    ),
}
"""Libraries that come in builds of which exactly one may be installed: two overwrite each other's files."""


PATCHED = {(3, 11): 13, (3, 12): 11}
"""Oldest patch release of a Python without known holes that matter here."""

TRIAL_SECONDS = 1.0
"""How long a model's speed is tried."""


def doctor(config: AuditConfig) -> tuple[str, bool]:
    """A report on versions, builds, devices and models, and whether all is well."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {_cpus()} CPUs"]
    lines += [f"{name} {version}" for name, version in versions().items()]
    lines += old_python(sys.version_info[:3])
    checks: list[tuple[str, Callable[[], str]]] = [
        *((f"one build of {library}", _one_build(library)) for library in EXCLUSIVE),
        ("detector", lambda: _detector(config)),
        *((f"embedder {model.name}", _embedder(model)) for model in config.models()),
        *([("encryption", lambda: _encryption(config))] if config.encryption.key else []),
    ]
    results = list(_outcomes(checks))
    return "\n".join([*lines, "", *(line for line, _ in results)]), all(good for _, good in results)


def _outcomes(checks: list[tuple[str, Callable[[], str]]]) -> Iterator[tuple[str, bool]]:
    for name, check in checks:
        try:
            yield f"ok      {name}: {check()}", True
        except (AuditError, ClusterError) as error:
            yield f"FAILED  {name}: {error}", False


def old_python(version: tuple[int, int, int]) -> list[str]:
    """A warning if this Python is older than the security releases of `PATCHED`; else nothing."""
    least = PATCHED.get(version[:2])
    if least is None or version[2] >= least:
        return []
    return [
        f"warning: python {'.'.join(map(str, version))} lacks security fixes of {version[0]}.{version[1]}.{least} "
        f"(such as CVE-2025-4517, in unpacking tar archives, which Unveil does not do). Update it."
    ]


def _encryption(config: AuditConfig) -> str:
    master_key(config.encryption.key)
    encryption_functions()
    return f"the key of {named(config.encryption.key)} is there; whether workers elsewhere find it is not tried here"


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
    open_detector(faces)
    return f"{faces.detector} opens, SHA-256 {faces.detector_sha256[:16]}..."


def _embedder(model: BackboneConfig) -> Callable[[], str]:
    return lambda: try_embedder(obtained(model))


def try_embedder(model: BackboneConfig) -> str:
    """What a model runs on, how fast one worker of it is here, and its self-test.

    Raises
    ------
    ModelError
        If it cannot be opened, or fails its self-test, or gives no finite vector.
    """
    backbone = open_backbone(model)
    plain = backbone if not model.flip else open_backbone(replace(model, flip=False))
    vector = self_test_vector(plain)
    faces = np.stack([drawn_face(alignment(model.alignment).pixels)] * model.batch)
    backbone(faces)
    start, done = time.perf_counter(), 0
    while done < model.batch or time.perf_counter() - start < TRIAL_SECONDS:
        backbone(faces)
        done += len(faces)
    rate = done / (time.perf_counter() - start)
    tested = "passes its self-test" if model.self_test else "has no self_test; on the drawn face it gives"
    shown = ", ".join(f"{value:.6f}" for value in vector)
    return (
        f"runs on {backbone.device} ({getattr(backbone, 'reason', '') or 'the only choice'}), {rate:,.0f} faces/s in "
        f"batches of {model.batch}, width {model.width}; {tested} [{shown}]"
    )
