"""A small audit that takes a few seconds: made-up faces, and a network of one pooling and one product."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import yaml

WIDTH = 128
CELLS = 14
SIZES = {"release": (24, 4), "training": (24, 4), "control": (24, 4), "anchor": (12, 2)}
"""Persons and images of each in every set."""
COPIES = 5
"""Release images that are copies of training images."""


def make_audit(folder: Path, **changes: Any) -> Path:
    """Write sets, network and configuration into `folder`; return the configuration file."""
    rng = np.random.default_rng(0)
    for role, (persons, images) in SIZES.items():
        for person in range(persons):
            _write_person(folder / "sets" / role / f"{person:03d}", rng, images)
    for at in range(COPIES):
        source = folder / "sets" / "training" / f"{at:03d}" / "0.png"
        (folder / "sets" / "release" / f"{at:03d}" / "0.png").write_bytes(source.read_bytes())
    network = folder / "network.onnx"
    network.write_bytes(_network())
    values: dict[str, Any] = {
        "sets": {role: {"uri": str(folder / "sets" / role), "identity": "parent"} for role in SIZES},
        "faces": {"mode": "aligned"},
        "embedder": {
            "name": "small", "path": str(network), "sha256": hashlib.sha256(network.read_bytes()).hexdigest(),
            "width": WIDTH, "mean": 127.5, "scale": 1 / 127.5, "runtime": "onnxruntime", "batch": 4,
        },
        "scan": {"unit_images": 8},
        "embed": {"encode": {"workers": 2}},
        "assess": {"controlled": False},
        "search": {
            "engine": "faiss", "k": 9, "columns": 2, "shard_images": 8, "block_images": 16,
            "shards": {"workers": 2, "cpus": 0.5}, "certify": {"tiles": 12},
        },
        "ray": {"cpus": 2, "object_store_mb": 256},
    }  # fmt: skip
    values.update(changes)
    path = folder / "audit.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _write_person(folder: Path, rng: np.random.Generator, images: int) -> None:
    """Blurred squares that belong to one person, with changes from image to image."""
    folder.mkdir(parents=True)
    own = rng.normal(0, 1, (CELLS, CELLS, 3))
    for at in range(images):
        cells = np.clip(128 + 40 * (own + 0.5 * rng.normal(0, 1, own.shape)), 0, 255).astype(np.uint8)
        picture = PIL.Image.fromarray(cells).resize((112, 112), PIL.Image.Resampling.BICUBIC)
        picture.save(folder / f"{at}.png")


def _network() -> bytes:
    """Mean of each square of 8 x 8 pixels, then a fixed random projection to the embedding."""
    from onnx import TensorProto, helper, numpy_helper

    inner = 3 * CELLS * CELLS
    weights = np.random.default_rng(1).normal(0, inner**-0.5, (inner, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["x"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])],
        [numpy_helper.from_array(weights, "weights")],
    )
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())
