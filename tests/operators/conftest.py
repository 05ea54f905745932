"""Prepared models, generated faces, and the small things that tests of operators build from them."""

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import TensorProto, helper
from PIL import Image

from operators.backbones import BackboneConfig
from operators.faces import FaceConfig
from operators.tables import UNITS
from seeds.demo.generator import Generator

REPOSITORY = Path(__file__).parents[2]
MODEL_FILES = (Path(FaceConfig().detector).name, Path(BackboneConfig().path).name)


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder with the prepared detector and embedder."""
    for folder in (REPOSITORY / "models", Path(os.environ.get("UNVEIL_TEST_MODELS", REPOSITORY / "models"))):
        if all((folder / name).is_file() for name in MODEL_FILES):
            return folder
    pytest.fail("the prepared face models are missing: run `make setup` first")


@pytest.fixture(scope="session")
def face_config(models: Path) -> FaceConfig:
    """The default preparation, with the detector's path made absolute."""
    return replace(FaceConfig(), detector=str(models / Path(FaceConfig().detector).name), isolate=False)


@pytest.fixture(scope="session")
def backbone_config(models: Path) -> BackboneConfig:
    """The default embedder, with its path made absolute."""
    return replace(BackboneConfig(), path=str(models / Path(BackboneConfig().path).name))


@pytest.fixture(scope="session")
def portraits() -> list[np.ndarray]:
    """Twelve generated people, RGB 128 x 128; the detector is sure of each (about 0.9; number 9 of the draw is not)."""
    latents_ND = np.random.default_rng(7).standard_normal((13, 100)).astype(np.float32)
    small = np.delete(Generator().faces(latents_ND), 9, axis=0)
    return [np.asarray(Image.fromarray(face).resize((128, 128), Image.Resampling.BICUBIC)) for face in small]


@pytest.fixture(scope="session")
def canvas() -> Callable[..., np.ndarray]:
    """A function that puts portraits on a grey picture: `canvas(height, width, (portrait, side, left, top), ...)`."""

    def paint(height: int, width: int, *placed: tuple[np.ndarray, int, int, int]) -> np.ndarray:
        picture = np.full((height, width, 3), 90, np.uint8)
        for portrait, side, left, top in placed:
            sized = Image.fromarray(portrait).resize((side, side), Image.Resampling.BICUBIC)
            picture[top : top + side, left : left + side] = np.asarray(sized)
        return picture

    return paint


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """A function that gives the bytes of an image file: `encode(pixels or Pillow image, "JPEG", quality=95)`."""

    def write(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    return write


@pytest.fixture(scope="session")
def unit_table() -> Callable[..., pa.Table]:
    """A function that lists a folder as one row of UNITS: `unit_table(folder, {key: {"error": "..."}})`.

    The second argument changes members, or adds those that are not files.
    """

    def table(folder: Path, changes: Mapping[str, Mapping[str, Any]] | None = None) -> pa.Table:
        members = {}
        for path in (p for p in folder.rglob("*") if p.is_file()):
            data, key = path.read_bytes(), path.relative_to(folder).as_posix()
            label = path.parent.relative_to(folder).as_posix()
            digest = hashlib.sha256(data).hexdigest()
            members[key] = {"identity": None if label == "." else label, "bytes": len(data), "digest": digest}
        for key, change in (changes or {}).items():
            members[key] = members.get(key, {}) | change
        rows = [{"key": key} | members[key] for key in sorted(members)]
        unit = {
            "set": "release",
            "uri": str(folder),
            "format": "folder",
            "anonymous": False,
            "unit": "0f" * 16,
            "first_row": 0,
        }
        return UNITS.from_rows([unit | {"members": rows}])

    return table


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BackboneConfig]:
    """A function that writes a hand-made network from input `x` to output `y` and gives its pinned configuration."""
    folder = tmp_path_factory.mktemp("networks")

    def write(
        nodes: list[onnx.NodeProto],
        weights: list[onnx.TensorProto] | None = None,
        *,
        takes: tuple[int | str, ...] = ("N", 3, 112, 112),
        gives: tuple[int | str, ...] = ("N", 3),
        outputs: tuple[str, ...] = ("y",),
        **config: Any,
    ) -> BackboneConfig:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, takes)
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, gives) for name in outputs]
        graph = helper.make_graph(nodes, "network", [x], made, weights or [])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        data = model.SerializeToString()
        sha256 = hashlib.sha256(data).hexdigest()
        path = folder / f"{sha256[:16]}.onnx"
        path.write_bytes(data)
        return BackboneConfig(**{"name": "hand_made", "path": str(path), "sha256": sha256, "width": 3} | config)

    return write
