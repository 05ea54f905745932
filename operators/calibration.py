"""From scores to error rates: the threshold, and how many false candidates to expect at it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.errors import CapacityError
from operators.vectors import exact_matrix

BLOCK = 2048
RESOLUTION = 10
"""Non-mated pairs over the threshold below which a false match rate is too rough to choose by itself."""


class Tail(NamedTuple):
    """The highest scores among all non-mated pairs of a sample."""

    pairs: int
    """Non-mated pairs in all."""
    mated: int
    """Mated pairs, left out."""
    cosines: NDArray[np.float64]
    """The highest scores, descending; may hold fewer than `pairs`."""


class Rate(NamedTuple):
    """A proportion with its exact (Clopper-Pearson) 95 % interval."""

    value: float
    low: float
    high: float


class Threshold(NamedTuple):
    """The score from which a pair is a candidate."""

    cosine: float
    fmr: Rate
    """False match rate at the threshold, measured on non-mated pairs."""
    pairs: int
    over: int
    """Non-mated pairs at or over the threshold."""


def non_mated_tail(vectors_ND: NDArray[np.float16], person_N: NDArray[np.int64], keep: int) -> Tail:
    """Scores of all pairs of rows that belong to different persons; the `keep` highest.

    Pairs are formed inside one sample, each unordered pair once.
    """
    total, top = 0, np.zeros(0)
    for start in range(0, len(vectors_ND), BLOCK):
        rows = slice(start, start + BLOCK)
        scores = exact_matrix(vectors_ND[rows], vectors_ND[start:])
        later = np.arange(scores.shape[1])[None] > np.arange(scores.shape[0])[:, None]
        chosen = scores[later & (person_N[rows][:, None] != person_N[start:][None])]
        total += len(chosen)
        top = np.concatenate([top, chosen])
        if len(top) > keep:
            top = np.partition(top, len(top) - keep)[len(top) - keep :]
    everything = len(vectors_ND) * (len(vectors_ND) - 1) // 2
    return Tail(total, everything - total, np.sort(top)[::-1])


def finest_fmr(pairs: int, wanted: float) -> float:
    """`wanted`, or the smallest false match rate that `pairs` can measure with `RESOLUTION` exceedances."""
    return max(wanted, RESOLUTION / pairs) if pairs else 1.0


def threshold_at(tail: Tail, fmr: float) -> Threshold:
    """The smallest cosine at which at most `fmr` of the non-mated pairs are candidates.

    Ties are taken pessimistically: a group of equal scores that would break the rate lies below the threshold.

    Raises
    ------
    CapacityError
        If `fmr` is below one pair in the sample, so that it cannot be measured.
    """
    allowed = int(fmr * tail.pairs + 1e-9)
    if allowed < 1:
        raise CapacityError(
            f"assess.fmr={fmr:g} cannot be measured with {tail.pairs:,} non-mated pairs (one pair is "
            f"{1 / max(tail.pairs, 1):.1g}). Raise assess.fmr, assess.calibration_images, or the training set."
        )
    if allowed >= len(tail.cosines):
        raise CapacityError(
            f"{len(tail.cosines)} of the highest scores were kept; assess.fmr={fmr:g} needs {allowed + 1}."
        )
    cosine = float(np.nextafter(tail.cosines[allowed], 2))
    over = int((tail.cosines >= cosine).sum())
    return Threshold(cosine, proportion(over, tail.pairs), tail.pairs, over)


def proportion(count: int, total: int) -> Rate:
    """`count / total` with its Clopper-Pearson 95 % interval (Clopper & Pearson, Biometrika 26, 1934).

    Exact for independent trials. Pairs share images, so for pairs the true uncertainty is wider.
    """
    from scipy.stats import beta

    low = float(beta.ppf(0.025, count, total - count + 1)) if count else 0.0
    high = float(beta.ppf(0.975, count + 1, total - count)) if count < total else 1.0
    return Rate(count / total if total else float("nan"), low, high)
