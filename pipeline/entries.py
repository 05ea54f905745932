"""The schema of the catalogue's files: known releases and real sets, every fact with its source and how sure it is.

A file states every key of its groups. What is not known is null, and the group's note says so. `read` refuses a file
that states less, more or something else, and names the file and the key.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from operators.errors import ConfigError
from operators.formats import FORMATS, IDENTITIES

CERTAINTIES: Mapping[str, str] = {
    "primary": "read in what its authors published: paper, repository, card, data",
    "abstract": "read in an abstract or the first part of a page only",
    "secondary": "read in somebody else's text",
    "computed": "computed from published data",
    "unverified": "not read anywhere; the source is where to look",
}
"""How sure a fact is."""
KINDS = ("release", "real")
RELATIONS = ("part_of", "made_from", "shares_people")
"""How one set stands to another. The first two mean: whoever is in this set is in that one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """What every group of facts states of itself."""

    source: str
    """Address of the page, paper or data."""
    certainty: str
    """One of `CERTAINTIES`."""
    note: str = ""

    def __post_init__(self) -> None:
        if not self.source.startswith(("https://", "http://")):
            raise ValueError(f"source must be an address (https://...). Got {self.source!r}.")
        if self.certainty not in CERTAINTIES:
            raise ValueError(f"certainty must be one of {', '.join(CERTAINTIES)}. Got {self.certainty!r}.")
        for one in dataclasses.fields(self):
            needed = one.default is dataclasses.MISSING
            if needed and getattr(self, one.name) is None and not self.note:
                raise ValueError(f"{one.name} is null and nothing says why. Write it in the note. Got no note.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper(Fact):
    """The publication of a set."""

    title: str
    arxiv: str | None
    """Number without version."""
    venue: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Size(Fact):
    """How large one published version is."""

    version: str
    images: int | None
    identities: int | None
    rounded: bool
    """The numbers are as round as their source gives them, so a copy may differ by a few percent."""

    def __post_init__(self) -> None:
        Fact.__post_init__(self)
        for name in ("images", "identities"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive. Got {value}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedOn(Fact):
    """One set that a generator saw."""

    set: str
    """Name in the catalogue."""
    role: str
    """Which part of the generator saw it, or what it served for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generator(Fact):
    """How the images of a release were made."""

    method: str
    trained_on: tuple[TrainedOn, ...]
    """Empty: no real face that is known of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication(Fact):
    """The form in which a set comes."""

    format: str | None
    """One of `operators.formats.FORMATS`; null: not known, the audit recognises it."""
    layout: str
    key: str | None
    """The name of one image, as an example."""

    def __post_init__(self) -> None:
        Fact.__post_init__(self)
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"format must be null or one of {', '.join(FORMATS)}. Got {self.format!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop(Fact):
    """What the images show: whole photographs, or faces cut to the template of face recognition."""

    mode: str
    """`faces.mode` for this set. `aligned` only if it is known to be cut to the 112 x 112 template."""
    width: int | None
    height: int | None

    def __post_init__(self) -> None:
        Fact.__post_init__(self)
        if self.mode not in ("detect", "aligned"):
            raise ValueError(f"mode must be 'detect' or 'aligned'. Got {self.mode!r}.")
        if self.mode == "aligned" and (self.width, self.height) != (112, 112):
            raise ValueError(f"mode is 'aligned' for 112 x 112 pixels only. Got {self.width} x {self.height}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class People(Fact):
    """Where a person's label comes from."""

    option: str
    """The set's `identity` option."""
    meaning: str

    def __post_init__(self) -> None:
        Fact.__post_init__(self)
        if self.option not in IDENTITIES and not self.option.startswith("attribute:"):
            raise ValueError(f"option must be one of {', '.join(IDENTITIES)}, or attribute:NAME. Got {self.option!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Licence(Fact):
    """Terms, as a summary, and how one gets the set."""

    terms: str | None
    access: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure(Fact):
    """One published statement about leakage: what somebody found or claimed, not what this project says."""

    what: str
    how: str
    value: float | None = None
    against: str | None = None
    """The set compared with, by its name in the catalogue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation(Fact):
    """How this set stands to another."""

    kind: str
    set: str

    def __post_init__(self) -> None:
        Fact.__post_init__(self)
        if self.kind not in RELATIONS:
            raise ValueError(f"kind must be one of {', '.join(RELATIONS)}. Got {self.kind!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A set proposed as control or anchor."""

    set: str
    why: str
    part: str = ""
    """Which images of it, where not all may serve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """How to audit a release in the judgement of this project; no fact, so without a source."""

    training: tuple[str, ...]
    """The real sets to compare with, the first one first."""
    controls: tuple[Arm, ...]
    anchors: tuple[Arm, ...]
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """All that the catalogue says of one set."""

    name: str
    title: str
    kind: str
    """`release` (synthetic) or `real`."""
    aliases: tuple[str, ...]
    """Other names that are in use for the set or its parts."""
    paper: Paper
    sizes: tuple[Size, ...]
    """The main version first."""
    generator: Generator | None
    form: Publication
    crop: Crop
    people: People
    licence: Licence
    leakage: tuple[Figure, ...]
    relations: tuple[Relation, ...]
    audit: Advice | None
    note: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}. Got {self.kind!r}.")
        if not self.sizes:
            raise ValueError("sizes must hold at least one version. Got none.")
        for name in ("generator", "audit"):
            if (getattr(self, name) is None) == (self.kind == "release"):
                raise ValueError(f"{name} must be stated for a release and null for a real set. Got {self.kind!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedderFaces(Fact):
    """The sets that one of the shipped models was trained on."""

    sets: tuple[str, ...]


def read(path: Path) -> Any:
    """What the YAML file holds; ConfigError if it cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error


def build(kind: Any, given: Any, path: Path, key: str = "") -> Any:
    """`given`, found in `path` under `key`, as a value of the type `kind`: a dataclass of this module, a tuple of one
    type, a plain type, or one of these or None. ConfigError names file and key of whatever is not as it must be.
    """
    if isinstance(kind, types.UnionType):
        (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
        return None if given is None else build(kind, given, path, key)
    if dataclasses.is_dataclass(kind):
        return _group(kind, given, path, key)
    if typing.get_origin(kind) is tuple:
        if not isinstance(given, list):
            raise ConfigError(f"{path}: {key} must be a list ([] if empty). Got {given!r}.")
        return tuple(build(typing.get_args(kind)[0], one, path, f"{key}[{at}]") for at, one in enumerate(given))
    fits = isinstance(given, int | float if kind is float else kind) and (kind is bool or not isinstance(given, bool))
    if not fits:
        names = {str: "a text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
        raise ConfigError(f"{path}: {key} must be {names[kind]}. Got {given!r}.")
    return given


def _group(kind: Any, given: Any, path: Path, key: str) -> Any:
    """`given` as the dataclass `kind`."""
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: {key or 'the file'} must hold `key: value` lines. Got {given!r}.")
    hints = typing.get_type_hints(kind)
    below = f"{key}." if key else ""
    for name in given:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"Did you mean {below}{near[0]}?" if near else f"Known here: {', '.join(hints)}."
            raise ConfigError(f"{path}: unknown key '{below}{name}'. {hint}")
    for one in dataclasses.fields(kind):
        if one.default is dataclasses.MISSING and one.name not in given:
            raise ConfigError(f"{path}: {below}{one.name} is missing. Write null, and why in the note, if not known.")
    values = {name: build(hints[name], value, path, f"{below}{name}") for name, value in given.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{path}: {below}{error}") from error
