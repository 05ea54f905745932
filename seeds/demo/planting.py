"""Who is in the demo corpus and what leaks where: decided before any pixel is made, from a seed alone.

Every random decision has a stream of its own, named after what it decides. So the images of a person are the same at
every scale, and changing one part of the plan leaves the others as they are.
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import asdict, dataclass

import numpy as np

from operators.errors import ConfigError
from seeds.demo.leaks import BLENDS, LEAKS

VERSION = 2
"""Version of the corpus: a change that changes files or their meaning raises it."""

SEED = 20240

PERSONS = {"training": 275, "control": 275, "anchor": 150, "placebo": 150, "release": 325}
"""Persons per set at scale 1; each has 2 to 6 images, 4 on average."""

FOLDERS = {
    "training": "p{:05d}",
    "control": "n{:05d}",
    "anchor": "a{:05d}",
    "placebo": "b{:05d}",
    "release": "syn_{:05d}",
}
"""Names of identities: a style per set, and numbers that mean nothing across sets."""

LEAKS_PER_CLASS = 22
"""Planted images per class of leaks at scale 1."""

BROKEN = {
    "training": ("empty", "truncated", "text", "no_face", "two_faces", "other_extension"),
    "control": ("truncated", "no_face"),
    "anchor": (),
    "placebo": (),
    "release": ("empty", "truncated", "text", "no_face", "two_faces", "other_extension"),
}
"""Kinds of files per set that cannot be audited, at every scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One image of a set; `key` is its path inside the set."""

    key: str
    identity: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """A release image made from a training image, or from two."""

    release_key: str
    leak: str
    source: Picture
    second: Picture | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken:
    """A file of a set that cannot be audited, and why."""

    set: str
    key: str
    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All files of a corpus. The same seed and scale give the same plan."""

    seed: int
    scale: float
    pictures: dict[str, tuple[Picture, ...]]
    planted: tuple[Planted, ...]
    broken: tuple[Broken, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the plan and the version: two corpora with the same digest have the same files."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def stream(seed: int, *name: str) -> np.random.Generator:
    """The random stream of that name: independent of all others, and the same wherever it is asked for."""
    digest = hashlib.sha256("/".join((str(seed), *name)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def make_plan(seed: int = SEED, scale: float = 1.0) -> Plan:
    """The corpus with `scale` times the usual persons and leaks, at least one leak per class.

    Raises
    ------
    ConfigError
        If `scale` is not above 0 and at most 100, the most that five digits of folder names can hold.
    """
    if not 0 < scale <= 100:
        raise ConfigError(f"scale: must be above 0 and at most 100, found {scale}. Give, say, 0.1.")
    pictures = {name: _pictures(seed, name, scale) for name in PERSONS}
    return Plan(
        seed=seed,
        scale=float(scale),
        pictures=pictures,
        planted=_planted(seed, scale, pictures),
        broken=tuple(b for name in PERSONS for b in _broken(seed, name, pictures[name])),
    )


def _pictures(seed: int, name: str, scale: float) -> tuple[Picture, ...]:
    """The images of a set, person by person; at least as many persons as there are classes of leaks."""
    pictures = []
    for number in range(max(len(LEAKS) + 1, round(scale * PERSONS[name]))):
        identity = FOLDERS[name].format(number)
        for shot in range(stream(seed, "shots", name, identity).integers(2, 7)):
            pictures.append(Picture(key=f"{identity}/{shot + 1}.jpg", identity=identity))
    return tuple(pictures)


def _planted(seed: int, scale: float, pictures: dict[str, tuple[Picture, ...]]) -> tuple[Planted, ...]:
    """The leaks in the order of release keys, in random places of the release.

    No two leaks have the same person as their first source, so that the leaks of a class are independent trials.
    """
    rng = stream(seed, "leaks")
    persons = _persons(pictures["training"])
    kinds = [leak for leak in LEAKS for _ in range(max(1, round(scale * LEAKS_PER_CLASS)))]
    places = rng.permutation(len(pictures["release"]))[: len(kinds)]
    sources = rng.permutation(len(persons))[: len(kinds)]
    partners = (sources + rng.integers(1, len(persons), len(kinds))) % len(persons)

    def shot(person: int) -> Picture:
        return persons[person][rng.integers(len(persons[person]))]

    planted = [
        Planted(
            release_key=pictures["release"][place].key,
            leak=leak,
            source=shot(source),
            second=shot(partner) if leak in BLENDS else None,
        )
        for leak, place, source, partner in zip(kinds, places, sources, partners, strict=True)
    ]
    return tuple(sorted(planted, key=lambda p: p.release_key))


def _broken(seed: int, name: str, pictures: tuple[Picture, ...]) -> list[Broken]:
    """The broken files of a set: each is one more file of some person."""
    persons = _persons(pictures)
    chosen = stream(seed, "broken", name).permutation(len(persons))
    broken = []
    for kind, person in zip(BROKEN[name], chosen, strict=False):
        shots = persons[person]
        file = "notes.txt" if kind == "other_extension" else f"{len(shots) + 1}.jpg"
        broken.append(Broken(set=name, key=f"{shots[0].identity}/{file}", kind=kind))
    return broken


def _persons(pictures: tuple[Picture, ...]) -> list[list[Picture]]:
    """The images of each person, in the order of the pictures."""
    persons: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        persons[picture.identity].append(picture)
    return list(persons.values())
