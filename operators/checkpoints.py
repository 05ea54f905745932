"""Weights of face recognition networks, read without running anything that a file contains.

Two kinds of file are read: safetensors, which can hold nothing but numbers, and state dicts of PyTorch as far as its
restricted reader takes them. A file that asks for more is refused: whoever wrote it would decide what runs here.

Names are brought to one form, that of InsightFace's `arcface_torch`, which `operators/iresnet.py` follows. AdaFace's
files (Kim et al., CVPR 2022, and CVLface) name the same tensors differently and number units through all stages.
"""

import importlib
import io
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple

from operators.backbones import pinned_bytes
from operators.errors import ModelError

if TYPE_CHECKING:
    import torch

ARCFACE = "arcface"
ADAFACE = "adaface"

WRAPPERS = re.compile(r"((module|model|backbone|net|_orig_mod)\.)+")
"""What data parallelism, Lightning, CVLface and `torch.compile` put in front of a name."""
UNUSED = re.compile(r"head\..*|kernel|(.*\.)?num_batches_tracked")
"""Class centres of the training loss, and counters that only training reads."""
ADAFACE_ENDS = {
    "input_layer.0": "conv1",
    "input_layer.1": "bn1",
    "input_layer.2": "prelu",
    "output_layer.0": "bn2",
    "output_layer.3": "fc",
    "output_layer.4": "features",
}
"""AdaFace's names before and after the residual units, and ours."""
ADAFACE_UNIT = {
    "res_layer.0": "bn1",
    "res_layer.1": "conv1",
    "res_layer.2": "bn2",
    "res_layer.3": "prelu",
    "res_layer.4": "conv2",
    "res_layer.5": "bn3",
    "shortcut_layer.0": "downsample.0",
    "shortcut_layer.1": "downsample.1",
}
"""AdaFace's names within a residual unit, and ours."""
ADAFACE_PLACE = re.compile(r"body\.(\d+)\.((?:res|shortcut)_layer\.\d+)\.(\w+)")
STAGES = {64: 1, 128: 2, 256: 3, 512: 4}
"""Stage of a unit by the channels that it gives."""
CONVERT = (
    "Convert it once, where running code of whoever wrote it does no harm: save_file(torch.load(FILE, "
    "map_location='cpu', weights_only=False)['state_dict'], NEW) with safetensors.torch.save_file; then pin the new "
    "file. Leave ['state_dict'] out for a plain state dict."
)


class Checkpoint(NamedTuple):
    """The weights of a network, by the names that `operators/iresnet.py` gives them."""

    weights: dict[str, "torch.Tensor"]
    layout: str
    """Whose names the file has: `arcface` or `adaface`. Their networks differ in one shortcut."""


def load(path: str, sha256: str) -> Checkpoint:
    """The weights in the pinned file at `path`, on the CPU.

    Raises
    ------
    ModelError
        If the file is missing, altered, damaged, no file of weights, or holds more than weights.
    """
    found = _tensors(path, pinned_bytes(path, sha256))
    found = _renamed(path, found, lambda name: WRAPPERS.sub("", name, count=1) if WRAPPERS.match(name) else name)
    found = {name: tensor for name, tensor in found.items() if not UNUSED.fullmatch(name)}
    if not any(name.startswith("input_layer.") for name in found):
        return Checkpoint(found, ARCFACE)
    return Checkpoint(_with_affine_features(_renamed(path, found, _adaface_namer(found))), ADAFACE)


def require(path: str, weights: Mapping[str, "torch.Tensor"], shapes: Mapping[str, tuple[int, ...]], hint: str) -> None:
    """Refuse weights that are not exactly those of a network with tensors of these names and shapes.

    Raises
    ------
    ModelError
        If any is missing, superfluous, of another shape or not of floating point. It ends with `hint`.
    """
    wrong = [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}, needed are floats {shapes[name]}"
        for name, tensor in weights.items()
        if name in shapes and (tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point())
    ]
    faults = {
        "missing": [name for name in shapes if name not in weights],
        "unknown": [name for name in weights if name not in shapes],
        "of another kind": wrong,
    }
    listed = [f"{len(names)} {fault}: {_few(names)}" for fault, names in faults.items() if names]
    if listed:
        raise ModelError(f"{path}: its weights do not fit. {'; '.join(listed)}. {hint}")


def units(weights: Mapping[str, Any]) -> tuple[int, ...]:
    """Residual units in each of the four stages, as far as their names tell."""
    names = [re.match(r"layer([1-4])\.(\d+)\.", name) for name in weights]
    seen = {(match[1], match[2]) for match in names if match}
    return tuple(sum(stage == str(number) for stage, _ in seen) for number in STAGES.values())


def _tensors(path: str, data: bytes) -> dict[str, "torch.Tensor"]:
    """What a file holds, told by its content: its name may say anything."""
    import torch

    if data[8:9] == b"{":
        held = _from_safetensors(path, data)
    elif data.startswith((b"PK\x03\x04", b"\x80")):
        held = _from_torch(path, data)
    else:
        raise ModelError(f"{path}: neither safetensors nor a PyTorch state dict. Correct the path or embedder.backend.")
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    if not isinstance(held, dict) or not held:
        raise ModelError(f"{path}: holds no state dict but {type(held).__name__}. {CONVERT}")
    for name, value in held.items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(name, str) or not plain or value.is_quantized:
            raise ModelError(f"{path}: {name!r} is {type(value).__name__}, not a tensor of plain numbers. {CONVERT}")
    return held


def _from_safetensors(path: str, data: bytes) -> Any:
    try:
        package = importlib.import_module("safetensors")
        reader = importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ModelError(
            f"{path}: safetensors files need the package safetensors, which is not installed. "
            f"Run `pip install 'unveil[safetensors]'`."
        ) from error
    try:
        return reader.load(data)
    except (package.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: damaged safetensors file ({error}). Restore it.") from error


def _from_torch(path: str, data: bytes) -> Any:
    """See CVE-2025-32434 and CVE-2026-24747: the restricted reader is to be trusted from PyTorch 2.10 on."""
    import torch

    raised = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, MemoryError)
    damage = (*raised, OSError, ArithmeticError, NameError, struct.error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]}" if asked else "it is not of the restricted form"
        raise ModelError(f"{path}: needs pickle, which can run code, so it is refused ({what}). {CONVERT}") from error
    except damage as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: PyTorch cannot read it ({reason}). Restore it, or export it again.") from error


def _renamed(path: str, found: Mapping[str, "torch.Tensor"], rename: Callable[[str], str]) -> dict[str, "torch.Tensor"]:
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        new = rename(name)
        if new in renamed:
            raise ModelError(f"{path}: two of its tensors are {new}, one of them {name}. Keep one network in the file.")
        renamed[new] = tensor
    return renamed


def _adaface_namer(found: Mapping[str, "torch.Tensor"]) -> Callable[[str], str]:
    """A function from AdaFace's names to ours. Names that it does not know stay as they are."""
    places: list[str] = []
    counts = dict.fromkeys(STAGES.values(), 0)
    while (weight := found.get(f"body.{len(places)}.res_layer.4.weight")) is not None:
        stage = STAGES.get((*weight.shape, 0)[0])
        if stage is None:
            break
        places.append(f"layer{stage}.{counts[stage]}")
        counts[stage] += 1

    def rename(name: str) -> str:
        match = ADAFACE_PLACE.fullmatch(name)
        if match and int(match[1]) < len(places) and match[2] in ADAFACE_UNIT:
            return f"{places[int(match[1])]}.{ADAFACE_UNIT[match[2]]}.{match[3]}"
        parent, dot, leaf = name.rpartition(".")
        return ADAFACE_ENDS.get(parent, parent) + dot + leaf

    return rename


def _with_affine_features(weights: dict[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """AdaFace's last normalisation has no gain and no offset; ours has the neutral ones."""
    import torch

    mean = weights.get("features.running_mean")
    if mean is None:
        return weights
    return {"features.weight": torch.ones_like(mean), "features.bias": torch.zeros_like(mean), **weights}


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
