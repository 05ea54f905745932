"""Gallery images that are near to everything: hubs, and images too poor to say anything.

In many dimensions some points are among the nearest neighbours of very many others (Radovanović, Nanopoulos & Ivanović,
"Hubs in space", JMLR 11, 2010). A hub heads the list of every release, leaked or not. The screening is told nothing of
the arm of an image: one rule for training set and control set, over both together, or the comparison of the two would
be spoilt. It flags and gives reasons; it never removes an image, because a person who leaked into a thousand release
images occurs as often as a hub does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class HubConfig:
    """What counts as a hub or as a poor image."""

    k: int = 10
    """Neighbours of a release image that count as near."""
    times: float = 20.0
    """A hub is near to this many times as many release images as the average gallery image is."""
    least: int = 10
    """A hub is near to this many release images at least: where the average is far below 1, a few are chance."""
    spread: float = 5.0
    """A poor image lies this many standard deviations (from the median absolute deviation) below the median of a
    quality, pooled over all images."""

    def __post_init__(self) -> None:
        for name, low in (("k", 1), ("times", 1), ("least", 1), ("spread", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be {low} or more. Got {getattr(self, name)}.")


class Occurrence(NamedTuple):
    """How often each gallery image is among the k nearest of a release image."""

    count_G: NDArray[np.int64]
    queries: int
    """Release images that have neighbours."""
    expected: float
    """Average count over the gallery."""
    skewness: float
    """Third standardised moment of the counts: 0 where all images are alike, above 1 where hubs rule; NaN if all
    counts are equal."""

    def share(self) -> NDArray[np.float64]:
        """Part of the release images that each gallery image is near to."""
        return self.count_G / max(1, self.queries)


class Screening(NamedTuple):
    """Flags with their reasons; nothing is removed."""

    flagged_N: NDArray[np.bool_]
    reasons: dict[int, list[str]]
    """By row, for the flagged ones."""
    limit: float
    """Release images from which an image is a hub."""


class Remaining(NamedTuple):
    """A list of closest pairs without the shared hubs."""

    name: str
    pairs: int
    kept: int
    best: float
    """The highest cosine that remains; NaN if nothing does."""


def k_occurrence(
    query_P: NDArray[np.int64], gallery_P: NDArray[np.int64], cosine_P: NDArray[np.float64], k: int, gallery: int
) -> Occurrence:
    """Count occurrences among the k nearest.

    Parameters
    ----------
    query_P, gallery_P, cosine_P
        The best pairs of each release image (at least its k best), in any order. Galleries of several arms must be
        numbered through and given together: neighbours of one arm alone would not be the nearest.
    k
        Neighbours that count; all of those that tie with the k-th do, so that no order of rows decides.
    gallery
        Gallery images in all.
    """
    order = np.lexsort((-cosine_P, query_P))
    query, cosine = query_P[order], cosine_P[order]
    _, first, sizes = np.unique(query, return_index=True, return_counts=True)
    kth = cosine[first + np.minimum(sizes, k) - 1] if len(first) else np.zeros(0)
    near = gallery_P[order][cosine >= np.repeat(kth, sizes)]
    return _occurrence(np.bincount(near, minlength=gallery).astype(np.int64), len(first))


def _occurrence(count_G: NDArray[np.int64], queries: int) -> Occurrence:
    mean, spread = (float(count_G.mean()), float(count_G.std())) if len(count_G) else (0.0, 0.0)
    skewness = float(((count_G - mean) ** 3).mean() / spread**3) if spread else float("nan")
    return Occurrence(count_G, queries, mean, skewness)


def screen(occurrence: Occurrence, qualities: Mapping[str, NDArray[np.float64]], config: HubConfig) -> Screening:
    """Flag hubs and poor images over all arms at once.

    `qualities` are values per image by name, higher for better images: the embedding's length before normalisation
    (Meng et al., MagFace, CVPR 2021), sharpness, size of the face. NaN where unknown. Skewed ones should be given as
    logarithms.

    Raises
    ------
    ValueError
        If a quality does not have one value per gallery image.
    """
    rows = len(occurrence.count_G)
    limit = max(float(config.least), config.times * occurrence.expected)
    reasons: dict[int, list[str]] = {
        int(row): [
            f"near to {occurrence.count_G[row]:,} of {occurrence.queries:,} release images "
            f"({occurrence.expected:.3g} expected)"
        ]
        for row in np.flatnonzero(occurrence.count_G >= limit)
    }
    for name, value_N in qualities.items():
        if len(value_N) != rows:
            raise ValueError(f"qualities must have one {name} per gallery image ({rows}). Got {len(value_N)}.")
        floor = low_limit(value_N, config.spread)
        for row in np.flatnonzero(value_N < floor):
            reasons.setdefault(int(row), []).append(f"{name} {value_N[row]:.3g} is below {floor:.3g}")
    flagged_N = np.zeros(rows, np.bool_)
    flagged_N[list(reasons)] = True
    return Screening(flagged_N, dict(sorted(reasons.items())), limit)


def low_limit(value_N: NDArray[np.float64], spread: float) -> float:
    """Median minus `spread` standard deviations as the median absolute deviation tells them (times 1.4826 for normal
    values; Rousseeuw & Croux, JASA 88, 1993); minus infinity if nothing is known or half of the values are equal.
    """
    known = value_N[~np.isnan(value_N)]
    if not len(known):
        return float("-inf")
    middle = np.median(known)
    deviation = 1.4826 * np.median(np.abs(known - middle))
    return float(middle - spread * deviation) if deviation > 0 else float("-inf")


def shared_hubs(lists: Mapping[str, Sequence[str]], least: int = 2) -> dict[str, list[str]]:
    """Real persons that occur in the lists of `least` or more releases, with the releases' names.

    `lists` holds the persons of each release's closest pairs, by release. Generators that learnt from different people
    have no other reason to come close to one person than that the person's images are hubs. Two generators trained on
    the same set can both have leaked a person, so a list of such a generator is weak evidence of a hub.
    """
    where: dict[str, set[str]] = {}
    for name, own in lists.items():
        for person in own:
            where.setdefault(person, set()).add(name)
    return {person: sorted(names) for person, names in sorted(where.items()) if len(names) >= least}


def remaining(lists: Mapping[str, Sequence[tuple[str, float]]], least: int = 2) -> list[Remaining]:
    """Releases ranked by the best cosine that is left without the persons of other releases' lists, best first.

    `lists` holds (person, cosine) of each release's closest pairs. The best is taken, not an average: one leaked person
    is a leak, and lists from which hubs take 99 or none of 100 pairs have no common depth to average over. A release
    with nothing left comes last.
    """
    hubs = shared_hubs({name: [person for person, _ in own] for name, own in lists.items()}, least)
    ranked = []
    for name, own in lists.items():
        kept = [cosine for person, cosine in own if person not in hubs]
        ranked.append(Remaining(name, len(own), len(kept), max(kept, default=float("nan"))))
    return sorted(ranked, key=lambda one: (one.kept == 0, -one.best if one.kept else 0.0, one.name))


def summed(parts: Sequence[Occurrence], gallery: int) -> Occurrence:
    """The occurrences of parts with distinct release images, put together."""
    count_G = np.zeros(gallery, np.int64)
    for part in parts:
        count_G += part.count_G
    return _occurrence(count_G, sum(part.queries for part in parts))
