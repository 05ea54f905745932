"""Release images made of two people: the best pair of gallery images for each, and the test that a pair is no chance.

A face blended of two may be near neither. All pairs of a gallery are too many, but both sources of a blend are among
its own nearest, so the pairs of the main search's list are searched, and a certificate says for which release images
no other pair of the whole gallery could do better. The mean of any two of many strangers is nearer to a face than the
best single one, so a pair's cosine is never evidence by itself: the decoy-partner test asks whether partners from the
training set do better than as many partners whom the generator never saw.

Cosines are exact (`operators.vectors`); the formulas take stored vectors as having length 1, which they have within
`vectors.NORM_TOLERANCE`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.calibration import Rate, proportion
from operators.vectors import exact_cosines

Floats = NDArray[np.float64]
Score = Callable[[Floats, Floats, Floats], Floats]

BLOCK_BYTES = 64 * 2**20
"""Vectors of the lists that are widened to fp64 at once."""

ROUNDING = 1e-12
"""How far a bound may err by rounding, relatively; taken against the certificate."""


class Shortlist(NamedTuple):
    """The nearest gallery images of each release image, best first."""

    rows_QK: NDArray[np.int64]
    """Rows of the gallery; -1 fills up short lists, and its cosine does not matter."""
    cosines_QK: Floats


class Pairs(NamedTuple):
    """The best pair of each release image among those of its list that are of two people."""

    first_Q: NDArray[np.int64]
    """Gallery row of the nearer source; -1 where the list holds no two people."""
    second_Q: NDArray[np.int64]
    cosine_Q: Floats
    """Cosine with the pair; -inf where there is none."""
    certified_Q: NDArray[np.bool_]
    """No other pair of two people in the whole gallery has a higher cosine."""


class DecoyTest(NamedTuple):
    """Which release images have a second source, one entry per release image."""

    rejected_Q: NDArray[np.bool_]
    """Chance is rejected: a second source is found."""
    q_value_Q: Floats
    """The lowest false discovery rate at which the image is found; 1 where the decoy won or nobody did."""
    partner_Q: NDArray[np.int64]
    """Training row of the best partner; -1 without one."""
    gain_Q: Floats
    """What the best training partner adds to the cosine of the first source alone; -inf without one."""
    decoy_gain_Q: Floats


def mean_cosine(a: Floats, b: Floats, c: Floats) -> Floats:
    """Cosine of a face with the normalised mean of two: (a + b) / sqrt(2 + 2 c), with c their own cosine.

    For opposite sources, whose mean has no direction, -inf.
    """
    length = np.sqrt(np.maximum(2 + 2 * np.asarray(c), 0.0))
    total = np.asarray(a + b, np.float64)
    return np.asarray(
        np.divide(total, length, out=np.full(np.broadcast(total, length).shape, -np.inf), where=length > 0)
    )


def best_cosine(a: Floats, b: Floats, c: Floats) -> Floats:
    """Cosine of a face with the best blend of two, of any shares of 0 or more.

    sqrt((a^2 + b^2 - 2abc) / (1 - c^2)) where a > bc and b > ac, else the better of the two alone: the face is
    projected onto the cone that the two span. Computed as b^2 + (a - bc)^2 / (1 - c^2) under the root, which does not
    cancel for alike sources.
    """
    a, b, c = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (a, b, np.clip(c, -1.0, 1.0))))
    area = 1 - c * c
    inside = (a > b * c) & (b > a * c) & (area > 0)
    over = np.divide((a - b * c) ** 2, area, out=np.zeros(a.shape), where=inside)
    return np.where(inside, np.sqrt(b * b + over), np.maximum(a, b))


def best_pairs(
    lists: Shortlist,
    gallery_GD: NDArray[np.float16],
    person_G: NDArray[np.int64],
    *,
    score: Score = mean_cosine,
    lowest: float = -1.0,
) -> Pairs:
    """The best pair of two people in each list, with its certificate.

    A pair with a member outside the list scores at most `score(a_1, a_K, lowest)`, because the formulas grow with both
    cosines and fall with c; a_K stands for the best cosine outside.

    Parameters
    ----------
    lists
        Sorted by cosine.
    gallery_GD
        Stored vectors of the gallery.
    person_G
        Who each gallery image shows: two photographs of one person are no pair.
    score
        `mean_cosine` or `best_cosine`.
    lowest
        A lower bound of all cosines between gallery images. -1 is always true, but certifies complete lists only; the
        true minimum certifies more. An estimate proves nothing.
    """
    parts = [_pairs(part, gallery_GD, person_G, score) for part in _parts(lists, gallery_GD.shape[1])]
    none = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    first, second, cosine = (np.concatenate(column) for column in zip(none, *parts, strict=True))
    here = lists.rows_QK >= 0
    complete, some = here.sum(axis=1) >= len(gallery_GD), here.any(axis=1)
    bound = np.full(len(cosine), np.inf)
    if lowest > -1 and some.any():
        nearest = np.where(here, lists.cosines_QK, -np.inf)[some].max(axis=1)
        last = np.where(here, lists.cosines_QK, np.inf)[some].min(axis=1)
        bound[some] = score(nearest, last, np.array(lowest))
    return Pairs(first, second, cosine, complete | (bound + ROUNDING * np.abs(bound) <= cosine))


def _parts(lists: Shortlist, width: int) -> Iterator[Shortlist]:
    """The lists in blocks whose vectors fit `BLOCK_BYTES` in fp64."""
    size = max(1, BLOCK_BYTES // max(1, lists.rows_QK.shape[1] * width * 8))
    for start in range(0, len(lists.rows_QK), size):
        rows = slice(start, start + size)
        yield Shortlist(lists.rows_QK[rows], lists.cosines_QK[rows])


def _pairs(
    lists: Shortlist, gallery_GD: NDArray[np.float16], person_G: NDArray[np.int64], score: Score
) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """First row, second row and cosine of the best pair of each list."""
    rows, cosines = lists
    queries, kept = rows.shape
    if kept < 2:
        missing = np.full(queries, -1)
        return missing, missing, np.full(queries, -np.inf)
    vectors = gallery_GD[rows].astype(np.float64)
    gram = vectors @ vectors.transpose(0, 2, 1)
    here, person = rows >= 0, person_G[rows]
    cosines = np.where(here, cosines, 0.0)
    pair = score(cosines[:, :, None], cosines[:, None, :], gram)
    two = here[:, :, None] & here[:, None, :] & (person[:, :, None] != person[:, None, :])
    pair = np.where(two & np.triu(np.ones((kept, kept), np.bool_), 1), pair, -np.inf).reshape(queries, -1)
    place = pair.argmax(axis=1)
    cosine = np.take_along_axis(pair, place[:, None], 1)[:, 0]
    first, second = (np.take_along_axis(rows, at[:, None], 1)[:, 0] for at in np.divmod(place, kept))
    return np.where(cosine > -np.inf, first, -1), np.where(cosine > -np.inf, second, -1), cosine


def decoy_partners(
    training: Shortlist,
    control: Shortlist,
    training_GD: NDArray[np.float16],
    control_GD: NDArray[np.float16],
    person_G: NDArray[np.int64],
    *,
    rng: np.random.Generator,
    q: float = 0.1,
    score: Score = best_cosine,
) -> DecoyTest:
    """Release images whose nearest training image has a partner that chance does not explain.

    The first source of each release image is its nearest training image. Partners compete from the other training
    persons and from equally many control images, in lists of equal length (`_fair`). Where the release owes its second
    source to nobody, either side is as likely to win, if control and training faces are prepared alike and no person is
    in both or has two labels.

    Parameters
    ----------
    training, control
        Lists of the same release images in the two galleries.
    training_GD, control_GD
        Stored vectors of the two.
    person_G
        Who each training image shows.
    rng
        Draws which images of the larger gallery compete.
    q
        False discovery rate.
    score
        `best_cosine`, or `mean_cosine` for equal shares only.

    Raises
    ------
    ValueError
        If one of the lists has no entries, or they are of different release images.
    """
    if not (training.rows_QK.size and control.rows_QK.size) or len(training.rows_QK) != len(control.rows_QK):
        shapes = f"{training.rows_QK.shape} and {control.rows_QK.shape}"
        raise ValueError(
            f"training and control must list the same release images, one neighbour or more. Got {shapes}."
        )
    ours, decoys = _fair(training, control, person_G, len(control_GD), rng)
    first_Q, alone_Q = training.rows_QK[:, 0], training.cosines_QK[:, 0]
    first_QD = training_GD[first_Q]
    partner_Q, gain_Q = _partners(first_QD, alone_Q, training, ours, training_GD, score)
    _, decoy_gain_Q = _partners(first_QD, alone_Q, control, decoys, control_GD, score)
    q_value_Q = competition(gain_Q, decoy_gain_Q)
    return DecoyTest(q_value_Q <= q, q_value_Q, partner_Q, gain_Q, decoy_gain_Q)


def _fair(
    training: Shortlist, control: Shortlist, person_G: NDArray[np.int64], controls: int, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which entries of the two lists compete: equally many galleries' images, then equally many entries.

    Of the larger gallery a random part takes part. Without the first source's person the training side is smaller by
    that person's images, which favours the decoys and so is safe.
    """
    size = min(len(person_G), controls)
    entries = []
    for lists, images in ((training, len(person_G)), (control, controls)):
        drawn = np.zeros(images, np.bool_)
        drawn[rng.permutation(images)[:size]] = True
        entries.append((lists.rows_QK >= 0) & drawn[lists.rows_QK])
    entries[0] &= person_G[training.rows_QK] != person_G[training.rows_QK[:, :1]]
    length = np.minimum(*(side.sum(axis=1) for side in entries))[:, None]
    ours, decoys = (side & (np.cumsum(side, axis=1) <= length) for side in entries)
    return ours, decoys


def _partners(
    first_QD: NDArray[np.float16],
    alone_Q: Floats,
    lists: Shortlist,
    taking_part_QK: NDArray[np.bool_],
    gallery_GD: NDArray[np.float16],
    score: Score,
) -> tuple[NDArray[np.int64], Floats]:
    """The best partner of each first source, and what it adds."""
    gain_QK = np.full(lists.rows_QK.shape, -np.inf)
    query, place = np.nonzero(taking_part_QK)
    size = max(1, BLOCK_BYTES // (16 * gallery_GD.shape[1]))
    for start in range(0, len(query), size):
        q, k = query[start : start + size], place[start : start + size]
        between = exact_cosines(first_QD[q], gallery_GD[lists.rows_QK[q, k]])
        gain_QK[q, k] = score(alone_Q[q], lists.cosines_QK[q, k], between) - alone_Q[q]
    best = gain_QK.argmax(axis=1)[:, None]
    gain_Q = np.take_along_axis(gain_QK, best, 1)[:, 0]
    return np.where(gain_Q > -np.inf, np.take_along_axis(lists.rows_QK, best, 1)[:, 0], -1), gain_Q


def competition(gain_Q: NDArray[np.floating[Any]], decoy_gain_Q: NDArray[np.floating[Any]]) -> Floats:
    """The q-value of each winner over its decoy; 1 where the decoy won, on ties, and where neither gained.

    The lowest of (1 + decoys that won with t or more) / (winners with t or more) over all t up to its own score, the
    larger of the two gains: target-decoy competition with the "+1" of Barber & Candès (Annals of Statistics 43(5),
    2015). It controls the false discovery rate over release images that are independent; images of one release identity
    are not, so give one image per identity where that matters.
    """
    score = np.maximum(gain_Q, decoy_gain_Q)
    won, lost = (score > 0) & (gain_Q > decoy_gain_Q), (score > 0) & (decoy_gain_Q > gain_Q)
    order = np.argsort(-score, kind="stable")
    last = np.searchsorted(-score[order], -score, side="right") - 1  # place of the last entry of an equal score
    rate = (1 + np.cumsum(lost[order])[last]) / np.maximum(np.cumsum(won[order])[last], 1)
    lowest = np.minimum.accumulate(rate[order][::-1])[::-1]
    q_value = np.ones(len(score))
    q_value[order] = np.minimum(lowest, 1.0)
    return np.where(won, q_value, 1.0)


def mmpmr(cosines_MN: Floats, threshold: float) -> Rate:
    """Mated morph presentation match rate: the share of M blends over `threshold` with *each* of their N sources.

    Scherhag et al., BIOSIG 2017; with its 95 % interval for independent blends.
    """
    return proportion(int((cosines_MN.min(axis=1) > threshold).sum()), len(cosines_MN))
