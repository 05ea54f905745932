"""A world of embeddings in which the truth is known, to try the statistics of the audit on.

Persons are directions on the sphere and images scatter round them, as in a mixture of von Mises-Fisher distributions
(here normal noise made unit length, the same to first order). What spoils audits of real faces is there, by axis: some
persons lie nearer to the crowd than others (axis 0), groups of persons lie together (axes 1 to 4), and poor images of
anybody resemble each other (axis 5). Error control shown here carries over to faces as far as exchangeability does;
power does not.

The world gives images, labels and best cosines as the search would; everything after that is the audit's own code.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.comparability import Comparison, GateConfig, gate
from operators.conformal import benjamini_hochberg, p_values
from operators.excess import excess
from operators.membership import auc
from operators.persons import CONTROL, MEMBER, Duplicates, PersonsConfig, persons
from operators.statistic import anchored, cap_images, image_hashes, match_groups, unit_best, unit_hashes
from operators.vectors import normalise

WIDTH = 96
AXES = 6
CROWD = 0.25
"""Scale of how much nearer than average a person lies to all others."""
DENSITY = (0.20, 0.30, 0.40, 0.50)
"""How closely the persons of each group lie together."""
SCATTER = 0.65
"""Length of an image's noise, against a person's direction of length 1: images of a person have cosines near 0.7."""
SCATTER_SYNTHETIC = 0.5
COPY = 0.3
"""Length of the noise that makes a near copy of an image: cosine near 0.96."""
BLUR = 0.15
"""Mean pull of an image towards what poor images look like."""
FLOOR = 0.6
"""Pairs of real images from this cosine up are given to `persons`."""
EVEN = (0.25, 0.25, 0.25, 0.25)
QS = (0.05, 0.10)

Mix = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """One simulated audit."""

    members: int = 1500
    """Persons of the training set."""
    controls: int = 1500
    images: tuple[int, int] = (3, 3)
    """Images per person, of members and of controls."""
    identities: int = 500
    """Persons of the release, and of the anchor set."""
    per_identity: int = 4
    """Images of each of them."""
    leak: float = 0.0
    """Part of the members whom an identity of the release resembles."""
    likeness: tuple[float, float] = (0.30, 0.80)
    """Least and greatest cosine of a leaked identity's direction to the member's."""
    copies: int = 0
    """Members of whom the release has a near copy of one image, besides its other images."""
    label_noise: float = 0.0
    """Part of the members who stand in the training set under two labels."""
    contaminated: float = 0.0
    """Part of the controls whom the generator saw although no member shows them: they leak as often as members do."""
    shared: float = 0.0
    """Part of the controls who are members too, with other images."""
    mixes: tuple[Mix, Mix, Mix, Mix] = (EVEN, EVEN, EVEN, EVEN)
    """Shares of the four groups among members, controls, release and anchor set."""
    blur: tuple[float, float] = (1.0, 1.0)
    """Poor quality of members' and controls' images, as a multiple of `BLUR`."""
    trained: Literal["neither", "members", "controls"] = "neither"
    """Whose images the face model was trained on: it moves those persons away from the crowd."""

    def __post_init__(self) -> None:
        for name in ("leak", "label_noise", "contaminated", "shared"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]. Got {getattr(self, name)}.")
        if round(self.leak * (self.members + self.contaminated * self.controls)) > self.identities:
            raise ValueError(f"identities must be at least the leaked persons. Got {self.identities}.")


class World(NamedTuple):
    """What the stages before the statistics would hand over, and the truth."""

    label_N: NDArray[np.int64]
    arm_N: NDArray[np.int8]
    vectors_ND: NDArray[np.float16]
    pairs: Duplicates
    release_N: NDArray[np.float64]
    """Best cosine of each real image with the release."""
    anchor_N: NDArray[np.float64]
    """And with the anchor set."""
    group_N: NDArray[np.int64]
    leaked_N: NDArray[np.bool_]
    """Whether the image's person leaked."""


class Outcome(NamedTuple):
    """One audit of one world."""

    discoveries: tuple[int, ...]
    """Members listed at each level of `QS`."""
    false_share: tuple[float, ...]
    """Part of the listed who did not leak, 0 of none."""
    power: tuple[float, ...]
    """Part of the leaked members who are listed; NaN where nobody leaked."""
    excess_p: float
    """1 where the test is not defined."""
    auc: float
    gated: Comparison
    straddlers: int
    several_labels: int
    """Units with more than one label."""


def draw(config: WorldConfig, seed: tuple[int, ...]) -> World:
    """A world of `config`; without its copies or leaks the same seed gives the same real persons and anchor set."""
    streams = [np.random.default_rng([*seed, stream]) for stream in range(4)]
    centre_UD, group_U, seen_U = _people(config, streams[0])
    person_N = np.repeat(
        np.arange(len(group_U)), np.repeat(config.images, (config.members, config.controls)).astype(np.int64)
    )
    arm_N = np.where(person_N < config.members, MEMBER, CONTROL).astype(np.int8)
    poor_N = np.where(arm_N == MEMBER, *config.blur)
    real_ND = _images(centre_UD[person_N], SCATTER, poor_N, streams[1])
    leaked_U = np.zeros(len(group_U), np.bool_)
    release_SD = _release(config, centre_UD, seen_U, leaked_U, streams[2])
    twice = _shared(config)
    leaked_U[config.members + twice] = leaked_U[twice]
    if config.copies:
        chosen = streams[2].choice(np.flatnonzero(arm_N == MEMBER)[:: config.images[0]], config.copies, replace=False)
        noise = streams[2].standard_normal((config.copies, WIDTH)) * (COPY / np.sqrt(WIDTH))
        release_SD = np.concatenate([release_SD, normalise(real_ND[chosen] + noise)[0]])
        leaked_U[person_N[chosen]] = True
    anchor_UD = _centres(_groups(config.mixes[3], config.identities, streams[3]), streams[3])
    own = np.repeat(np.arange(config.identities), config.per_identity)
    anchor_SD = _images(anchor_UD[own], SCATTER_SYNTHETIC, np.ones(len(own)), streams[3])
    return World(
        _labels(config, person_N, streams[1]),
        arm_N,
        real_ND,
        _close_pairs(real_ND, person_N),
        _best(real_ND, release_SD),
        _best(real_ND, anchor_SD),
        group_U[person_N],
        leaked_U[person_N],
    )


def _people(
    config: WorldConfig, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """Directions and groups of members, then controls, and whom of them the generator saw."""
    sizes = (config.members, config.controls)
    group_U = np.concatenate([_groups(mix, size, rng) for mix, size in zip(config.mixes, sizes, strict=False)])
    arm_U = np.repeat([MEMBER, CONTROL], sizes)
    known_arm = {"neither": None, "members": MEMBER, "controls": CONTROL}[config.trained]
    aside_U = np.where(arm_U == known_arm, 0.5, 1.0) if known_arm is not None else np.ones(len(arm_U))
    seen_U = arm_U == MEMBER
    seen_U[config.members : config.members + round(config.contaminated * config.controls)] = True
    twice = _shared(config)
    group_U[config.members + twice] = group_U[twice]
    centre_UD = _centres(group_U, rng, aside_U)
    centre_UD[config.members + twice] = centre_UD[twice]
    return centre_UD, group_U, seen_U


def _shared(config: WorldConfig) -> NDArray[np.int64]:
    """Numbers of the first members, who are the first controls too."""
    return np.arange(round(config.shared * config.controls))


def _groups(mix: Mix, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.choice(len(mix), size, p=mix).astype(np.int64)


def _centres(
    group_U: NDArray[np.int64], rng: np.random.Generator, aside_U: NDArray[np.float64] | float = 1.0
) -> NDArray[np.float64]:
    """Directions of persons (U, D); `aside_U` below 1 moves them away from the crowd and from their group."""
    centre_UD = rng.standard_normal((len(group_U), WIDTH)) / np.sqrt(WIDTH - AXES)
    centre_UD[:, :AXES] = 0
    centre_UD[:, 0] = np.abs(rng.standard_normal(len(group_U))) * CROWD * aside_U
    centre_UD[np.arange(len(group_U)), 1 + group_U] = np.asarray(DENSITY)[group_U] * aside_U
    return np.asarray(centre_UD / np.linalg.norm(centre_UD, axis=1, keepdims=True))


def _images(
    centre_ND: NDArray[np.float64], scatter: float, poor_N: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float16]:
    """Stored vectors of one image per direction."""
    length_N = scatter * np.exp(0.15 * rng.standard_normal(len(centre_ND)))
    raw_ND = rng.standard_normal(centre_ND.shape) * (length_N / np.sqrt(WIDTH))[:, None]
    raw_ND += centre_ND
    raw_ND[:, AXES - 1] += BLUR * poor_N * rng.standard_exponential(len(centre_ND))
    return normalise(raw_ND)[0]


def _release(
    config: WorldConfig,
    centre_UD: NDArray[np.float64],
    seen_U: NDArray[np.bool_],
    leaked_U: NDArray[np.bool_],
    rng: np.random.Generator,
) -> NDArray[np.float16]:
    """Images of the release; marks in `leaked_U` the persons whom its first identities resemble."""
    own_UD = _centres(_groups(config.mixes[2], config.identities, rng), rng)
    seen = np.flatnonzero(seen_U)
    who = rng.choice(seen, round(config.leak * len(seen)), replace=False)
    leaked_U[who] = True
    like = rng.uniform(*config.likeness, len(who))[:, None]
    own_UD[: len(who)] = like * centre_UD[who] + np.sqrt(1 - like**2) * own_UD[: len(who)]
    own_UD /= np.linalg.norm(own_UD, axis=1, keepdims=True)
    own = np.repeat(np.arange(config.identities), config.per_identity)
    return _images(own_UD[own], SCATTER_SYNTHETIC, np.ones(len(own)), rng)


def _labels(config: WorldConfig, person_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """One label per person, two for the noisy ones, who keep every other image under each."""
    noisy = rng.choice(config.members, round(config.label_noise * config.members), replace=False)
    second = np.isin(person_N, noisy) & (np.arange(len(person_N)) % 2 == 1)
    return np.where(second, config.members + config.controls + person_N, person_N)


def _close_pairs(vectors_ND: NDArray[np.float16], person_N: NDArray[np.int64], block: int = 1024) -> Duplicates:
    """All pairs of images of one arm's or both arms' persons with a cosine of `FLOOR` or more."""
    wide_ND = vectors_ND.astype(np.float32)
    found = []
    for at in range(0, len(wide_ND), block):
        cosine = wide_ND[at : at + block] @ wide_ND[at:].T
        near, far = np.divmod(np.flatnonzero(cosine >= FLOOR), cosine.shape[1])
        later = far > near
        near, far = near[later], far[later]
        found.append((near + at, far + at, cosine[near, far].astype(np.float64)))
    return Duplicates(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _best(vectors_ND: NDArray[np.float16], other_SD: NDArray[np.float16], block: int = 1024) -> NDArray[np.float64]:
    """The best cosine of each row of `vectors_ND` with any of `other_SD`."""
    other_DS = other_SD.astype(np.float32).T
    parts = [vectors_ND[at : at + block].astype(np.float32) @ other_DS for at in range(0, len(vectors_ND), block)]
    return np.concatenate([part.max(axis=1) for part in parts]).astype(np.float64)


def audit(
    world: World,
    *,
    raw: bool = False,
    cap: int | None = None,
    match: bool = False,
    alpha: float = 0.01,
    chosen: PersonsConfig | None = None,
) -> Outcome:
    """The audit's own path from images to claims: units, statistic, gate, list, excess test, AUC.

    `raw` leaves the anchor set out; `cap` and `match` are the repairs of unequal images and groups.
    """
    units = persons(world.label_N, world.arm_N, world.pairs, chosen or PersonsConfig(), world.vectors_ND)
    count = len(units.arm_U)
    unit_N, kept_U = units.unit_N, np.ones(count, np.bool_)
    if cap is not None or match:
        hash_N = image_hashes([str(row) for row in range(len(unit_N))], seed=0)
        if match:
            group_U = np.zeros(count, np.int64)
            group_U[unit_N[unit_N >= 0]] = world.group_N[unit_N >= 0]
            kept_U = match_groups(group_U, units.arm_U, unit_hashes(unit_N, hash_N, count))
        if cap is not None:
            unit_N = np.where(cap_images(unit_N, hash_N, cap), unit_N, -1)
    release_U = unit_best(unit_N, world.release_N, count).cosine_U
    score_U = anchored(release_U, None if raw else unit_best(unit_N, world.anchor_N, count).cosine_U)
    leaked_U = np.bincount(unit_N[unit_N >= 0], weights=world.leaked_N[unit_N >= 0], minlength=count) > 0
    inside, outside = kept_U & (units.arm_U == MEMBER), kept_U & (units.arm_U == CONTROL)
    member, control, leaked = score_U[inside], score_U[outside], leaked_U[inside]
    p_M = p_values(member, control)
    listed = [benjamini_hochberg(p_M, q) for q in QS]
    found = excess(member, control, alpha)
    return Outcome(
        tuple(int(mask.sum()) for mask in listed),
        tuple(float((mask & ~leaked).sum() / max(1, mask.sum())) for mask in listed),
        tuple(float(mask[leaked].mean()) if leaked.any() else float("nan") for mask in listed),
        1.0 if found is None else found.p,
        auc(member, control),
        gate(member, control, GateConfig()),
        units.straddlers,
        units.several_labels,
    )
