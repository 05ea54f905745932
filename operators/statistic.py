"""One number per person: how much closer the release comes to the person than an unrelated set of faces does.

`T_u = M_u(S) - M_u(A)`: the best cosine of any image of person u with the release, minus the best with the anchor set.
The difference takes away what makes a person close to any faces at all: crowded regions, many images, poor quality. It
is the density ratio of van Breugel et al. ("Membership inference attacks against synthetic data through overfitting
detection", AISTATS 2023) in its simplest form. Whatever the statistic, error control holds as long as it is computed
alike for both arms; here no function but `match_groups`, which needs the arms' sizes, is told the arm.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.errors import CapacityError
from operators.persons import CONTROL, MEMBER

MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class Best(NamedTuple):
    """The best cosine of each unit, and whose it is."""

    cosine_U: NDArray[np.float64]
    """NaN for a unit without an audited image."""
    row_U: NDArray[np.int64]
    """The image with that cosine, the lowest row of several; -1 for none."""


def unit_best(unit_N: NDArray[np.int64], cosine_N: NDArray[np.float64], units: int) -> Best:
    """`M_u`: the highest of the images' best cosines, by unit.

    `unit_N` is -1 for images that do not count; `cosine_N` is the column maximum of each image, NaN if not audited.
    """
    row_M = np.flatnonzero((unit_N >= 0) & ~np.isnan(cosine_N))
    unit_M, cosine_M = unit_N[row_M], cosine_N[row_M]
    best_U = np.full(units, -np.inf)
    np.maximum.at(best_U, unit_M, cosine_M)
    first_U = np.full(units, len(unit_N), np.int64)
    top = cosine_M == best_U[unit_M]
    np.minimum.at(first_U, unit_M[top], row_M[top])
    none = first_U == len(unit_N)
    return Best(np.where(none, np.nan, best_U), np.where(none, -1, first_U))


def anchored(release_U: NDArray[np.float64], anchor_U: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """`T_u = M_u(S) - M_u(A)`, or `M_u(S)` itself without an anchor set: unanchored, which the report must say.

    NaN where either is.
    """
    return release_U.copy() if anchor_U is None else release_U - anchor_U


def combined(statistics: Sequence[NDArray[np.float64]], how: Literal["min", "sum"]) -> NDArray[np.float64]:
    """One statistic from those of several face models, shape (U,), to be calibrated once.

    Each is standardised by the median and the median absolute deviation over all units of both arms, then the least is
    taken (a person must stand out under every model) or the sum. The models should be of similar strength: a much
    weaker one costs power. P-values must never be combined instead: the models err together.

    A unit that lacks one of the statistics has none.

    Raises
    ------
    CapacityError
        If half of the units or more share one value, so that a statistic has no scale.
    ValueError
        If `statistics` is empty or `how` is unknown.
    """
    if not statistics:
        raise ValueError("statistics must hold at least one. Got none.")
    if how not in ("min", "sum"):
        raise ValueError(f"how must be min or sum. Got {how!r}.")
    score_JU = np.stack(statistics)
    known = ~np.isnan(score_JU).any(axis=0)
    for number, score_U in enumerate(score_JU, 1):
        middle = np.median(score_U[known]) if known.any() else 0.0
        scale = np.median(np.abs(score_U[known] - middle)) if known.any() else 1.0
        if scale == 0:
            raise CapacityError(
                f"the statistic of face model {number} has the same value for half of the {known.sum():,} persons or "
                f"more, so that it cannot be combined with another. Use one face model, or larger sets."
            )
        score_U -= middle
        score_U /= scale
    score_JU[:, ~known] = np.nan
    return np.asarray(score_JU.min(axis=0) if how == "min" else score_JU.sum(axis=0))


def image_hashes(keys: Sequence[str], seed: int) -> NDArray[np.uint64]:
    """A number per image from its key and the seed, the same wherever the image stands in the set, shape (N,)."""
    start = hashlib.blake2b(str(seed).encode(), digest_size=8, person=b"unveil")

    def one(key: str) -> bytes:
        own = start.copy()
        own.update(b"\0" + key.encode())
        return own.digest()

    return np.frombuffer(b"".join(map(one, keys)), "<u8").astype(np.uint64)


def cap_images(unit_N: NDArray[np.int64], hash_N: NDArray[np.uint64], k: int) -> NDArray[np.bool_]:
    """Which images count when at most `k` random ones of each unit do; images with unit -1 never do.

    The choice depends on the hashes alone, so it is the same for any order of images, and alike in both arms. Images
    that were not audited should have unit -1, or they use up places.

    Raises
    ------
    ValueError
        If `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more. Got {k}.")
    order = np.lexsort((hash_N, unit_N))
    start = np.searchsorted(unit_N[order], unit_N[order], side="left")
    kept = np.zeros(len(unit_N), np.bool_)
    kept[order] = np.arange(len(order)) - start < k
    return kept & (unit_N >= 0)


def unit_hashes(unit_N: NDArray[np.int64], hash_N: NDArray[np.uint64], units: int) -> NDArray[np.uint64]:
    """A number per unit from its images' hashes, shape (U,).

    The lowest hash of a unit, mixed once more (splitmix64; Steele, Lea & Flood, OOPSLA 2014): without that, units of
    many images would have low numbers.
    """
    low_U = np.full(units, np.iinfo(np.uint64).max, np.uint64)
    inside = unit_N >= 0
    np.minimum.at(low_U, unit_N[inside], hash_N[inside])
    with np.errstate(over="ignore"):
        low_U = (low_U ^ (low_U >> np.uint64(30))) * np.uint64(MIX[0])
        low_U = (low_U ^ (low_U >> np.uint64(27))) * np.uint64(MIX[1])
    return low_U ^ (low_U >> np.uint64(31))


def match_groups(group_U: NDArray[np.int64], arm_U: NDArray[np.int8], hash_U: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which units to keep so that members and controls have the same proportion in every group.

    The proportion is that of all members to all controls; of each group the units with the lowest hashes are kept, as
    many as the proportion allows, and a group that one arm lacks is left out. `group_U` may be of any kind: a declared
    or predicted group of persons, the number of images, or both in one number, from 0; -1 (unknown) is a group too.
    """
    count = [np.bincount(group_U[arm_U == arm] + 1) for arm in (MEMBER, CONTROL)]
    groups = max(map(len, count))
    count_AG = np.stack([np.pad(one, (0, groups - len(one))) for one in count])
    few, many = (MEMBER, CONTROL) if count_AG[MEMBER].sum() <= count_AG[CONTROL].sum() else (CONTROL, MEMBER)
    ratio = count_AG[many].sum() / max(1, count_AG[few].sum())
    quota_AG = np.zeros_like(count_AG)
    quota_AG[few] = np.minimum(count_AG[few], np.floor(count_AG[many] / ratio + 1e-9)) if ratio else 0
    quota_AG[many] = np.minimum(count_AG[many], np.floor(quota_AG[few] * ratio + 1e-9))
    cell_U = (group_U + 1) * 2 + arm_U
    order = np.lexsort((hash_U, cell_U))
    place = np.arange(len(order)) - np.searchsorted(cell_U[order], cell_U[order], side="left")
    kept = np.zeros(len(group_U), np.bool_)
    kept[order] = place < quota_AG[arm_U[order], group_U[order] + 1]
    return kept
