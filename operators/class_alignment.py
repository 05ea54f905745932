"""Does class k of the release look like class k of the training set?

A class-conditional generator trained on labels 0 to n-1 often keeps them: what it makes for label k resembles the
person who had label k. Where release and training identities share an order of labels this is evidence with an exact
null, whatever the cosines are: if the release owes its classes to nobody, renaming the training persons changes
nothing. It does not say which training image leaked, and it fails if both orders follow something else that faces show,
such as names sorted by country.

The unit is a release identity: images of one identity resemble the same persons, so they are no independent trials.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.calibration import Rate, proportion

WITHIN = 5
"""Label ranks by which two orders may have drifted apart, because identities are missing in one of them."""

PERMUTATIONS = 9999


class Alignment(NamedTuple):
    """How many release identities resemble the training person of their own label, against chance."""

    identities: int
    aligned: int
    """Release identities whose nearest training person lies within `within` ranks of their own label."""
    share: Rate
    """aligned / identities with its Clopper-Pearson interval."""
    expected: float
    """Exact mean of the share over all ways of naming the training persons."""
    within: int
    p_value: float
    """Share of random namings, the true one counted, with at least as many aligned; one-sided."""
    permutations: int


class OrderAlignment(NamedTuple):
    """How far the order of release labels is that of their nearest training persons, against chance."""

    identities: int
    correlation: float
    """Spearman's rank correlation; 0 where one of the two orders is constant."""
    p_value: float
    """Share of random pairings, the true one counted, with at least this correlation; one-sided."""
    permutations: int


def nearest_class(
    release_class_N: NDArray[np.int64], training_class_N: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Release identities in ascending order, and the training class that most of the images of each are nearest to.

    Of classes equally often nearest the lowest counts, which does not depend on the release's own label.

    Parameters
    ----------
    release_class_N, training_class_N
        Per release image: its class, and the class of its nearest training image.
    """
    pairs, counts = np.unique(np.stack([release_class_N, training_class_N], 1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -counts, pairs[:, 0]))
    identities, first = np.unique(pairs[order, 0], return_index=True)
    return identities, pairs[order, 1][first]


def alignment_test(
    release_class_N: NDArray[np.int64],
    training_class_N: NDArray[np.int64],
    classes: int,
    *,
    seed: int,
    within: int = WITHIN,
    permutations: int = PERMUTATIONS,
) -> Alignment:
    """Share of release identities within `within` label ranks of their nearest training person, and its null.

    The null names the training persons anew, all orders equally likely: a person whom many identities resemble moves
    as one, so hubs widen the null as they should. One identity is then within reach with the chance of its own window,
    (2 within + 1) / classes except at the ends, and the mean over identities is exact.

    Parameters
    ----------
    release_class_N
        Label rank of each release identity, once each, from 0.
    training_class_N
        Label rank of the training person nearest to it (`nearest_class`).
    classes
        Training persons, among them all of the release's labels.
    seed, permutations
        Of the random namings.
    within
        Ranks of reach.

    Raises
    ------
    ValueError
        If there are no identities, one is named twice, or a rank is not between 0 and `classes` - 1; if `within` is
        negative, or `permutations` is less than 1.
    """
    own, nearest = _checked(release_class_N, training_class_N, permutations)
    if within < 0:
        raise ValueError(f"within must be 0 or more. Got {within}.")
    for name, ranks in (("release_class_N", own), ("training_class_N", nearest)):
        if ranks.min() < 0 or ranks.max() >= classes:
            raise ValueError(f"{name} must lie between 0 and {classes - 1}. Got {ranks.min()} to {ranks.max()}.")
    aligned = int((np.abs(nearest - own) <= within).sum())
    window = np.minimum(own + within, classes - 1) - np.maximum(own - within, 0) + 1
    persons, of = np.unique(nearest, return_inverse=True)
    rng, reached = np.random.default_rng(seed), 0
    for _ in range(permutations):
        renamed = rng.choice(classes, len(persons), replace=False, shuffle=True)
        reached += int((np.abs(renamed[of] - own) <= within).sum() >= aligned)
    return Alignment(
        identities=len(own),
        aligned=aligned,
        share=proportion(aligned, len(own)),
        expected=float(window.mean() / classes),
        within=within,
        p_value=(1 + reached) / (1 + permutations),
        permutations=permutations,
    )


def order_test(
    release_class_N: NDArray[np.int64],
    training_rank_N: NDArray[np.int64],
    *,
    seed: int,
    permutations: int = PERMUTATIONS,
) -> OrderAlignment:
    """Rank correlation of release labels with the labels of their nearest training persons, and its null.

    For label orders of which only the order is known: no class counts, no ranks without gaps. The null pairs labels and
    nearest persons at random.

    Parameters
    ----------
    release_class_N
        Label of each release identity, once each.
    training_rank_N
        Any number that grows with the label of its nearest training person.
    seed, permutations
        Of the random pairings.

    Raises
    ------
    ValueError
        If there are no identities, one is named twice, or `permutations` is less than 1.
    """
    own, nearest = _checked(release_class_N, training_rank_N, permutations)
    left, right = (_centred_ranks(values) for values in (own, nearest))
    scale = float(np.sqrt((left**2).sum() * (right**2).sum())) or 1.0
    rng, found = np.random.default_rng(seed), float(left @ right) / scale
    # A pairing may give the same correlation by another order of additions: equal means equal to rounding.
    reached = sum(float(left @ rng.permutation(right)) / scale >= found - 1e-12 for _ in range(permutations))
    return OrderAlignment(len(own), found, (1 + reached) / (1 + permutations), permutations)


def _checked(
    own_N: NDArray[np.int64], nearest_N: NDArray[np.int64], permutations: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    own, nearest = np.asarray(own_N, np.int64), np.asarray(nearest_N, np.int64)
    if not len(own) or len(np.unique(own)) < len(own) or own.shape != nearest.shape:
        raise ValueError(
            f"release_class_N must name each identity once, with one nearest person each. Got {len(own)} labels, "
            f"{len(np.unique(own))} of them different, and {len(nearest)} persons."
        )
    if permutations < 1:
        raise ValueError(f"permutations must be 1 or more. Got {permutations}.")
    return own, nearest


def _centred_ranks(values_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mid-ranks less their mean."""
    _, of, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2
    return np.asarray(middle[of] - middle[of].mean(), np.float64)
