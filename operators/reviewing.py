"""What people say of pairs that they see without knowing the arm, and what follows from it.

The pairs shown are the closest of both arms, the same number of each, so that what reviewers confirm among control
people, whom the generator never saw, measures how often they are wrong (docs/review.md).
"""

import io
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.calibration import Rate, proportion
from operators.excess import difference

PADDING_RGB = (128, 128, 128)
"""Around images that are not square."""


class Label(StrEnum):
    """What a reviewer may say of a pair, in the order of the keys 1 to 5."""

    NEAR_COPY = "near_copy"
    SAME_PERSON = "same_person"
    LOOK_ALIKE = "look_alike"
    DIFFERENT = "different"
    UNUSABLE = "unusable"


CONFIRMED = frozenset({Label.NEAR_COPY, Label.SAME_PERSON})


class Judged(NamedTuple):
    """A pair after the review."""

    member: bool
    """Whether it is of the training set, not of the control set."""
    score: float
    """The person's statistic."""
    label: Label | None
    """None: not decided."""


class Agreement(NamedTuple):
    """How far two reviewers agree."""

    pairs: int
    """Labelled by both."""
    observed: float
    """Share of them with the same label."""
    kappa: Rate | None
    """Cohen's kappa with its 95 % interval; None where both gave one and the same label to everything."""


class Bar(NamedTuple):
    """Both arms over one common bar: the higher of the two scores at which the lists of the arms end."""

    score: float
    member_shown: int
    control_shown: int
    member_confirmed: int
    control_confirmed: int
    delta: Rate
    """Confirmed share of all members less that of all controls."""
    p: float


class Outcome(NamedTuple):
    """The result of a blinded review; all intervals are at 95 %."""

    members: int
    """Decided pairs of members."""
    controls: int
    """Decided pairs of controls: the decoys."""
    member_confirmed: int
    control_confirmed: int
    undecided: int
    false_alarm: Rate
    """Confirmed decoys / decoys."""
    excess: int
    """Confirmed members less confirmed decoys."""
    share: Rate
    """The same as shares of the decided pairs of each arm: (x - y) / B where all are decided."""
    p_shown: float
    """Fisher's exact test of confirmed members against confirmed decoys among the pairs shown. Only valid where both
    arms have about as many people: of ten times as many, the closest are closer by chance alone."""
    bar: Bar
    """What is valid whatever the sizes of the arms; its p-value is the review's."""


def ranked(score_P: NDArray[np.float64]) -> NDArray[np.int64]:
    """Row numbers by falling score, equal scores in row order, shape (P,)."""
    return np.argsort(-score_P, kind="stable").astype(np.int64)


def settled(labels: Sequence[Label | None], adjudicated: Label | None, reviewers: int) -> Label | None:
    """The final label of a pair: that of all `reviewers` if they agree, else the adjudicator's; None: not there yet."""
    given = [label for label in labels if label is not None]
    if len(given) < reviewers:
        return None
    return given[0] if len(set(given)) == 1 else adjudicated


def disagree(labels: Sequence[Label | None], reviewers: int) -> bool:
    """Whether all reviewers have decided, and not alike."""
    given = [label for label in labels if label is not None]
    return len(given) >= reviewers and len(set(given)) > 1


def agreement(first: Sequence[Label], second: Sequence[Label]) -> Agreement | None:
    """Agreement of two reviewers over the same pairs; None without any pair."""
    if not first:
        return None
    places = {label: at for at, label in enumerate(Label)}
    table_KK = np.zeros((len(places), len(places)), np.int64)
    for one, other in zip(first, second, strict=True):
        table_KK[places[one], places[other]] += 1
    return Agreement(len(first), float(np.trace(table_KK) / len(first)), cohen_kappa(table_KK))


def cohen_kappa(table_KK: NDArray[np.int64]) -> Rate | None:
    """Cohen's kappa (Educ. Psychol. Meas. 20, 1960) of a table of counts, first rater by second, with its interval.

    kappa = (observed - chance) / (1 - chance). The limits put the Clopper-Pearson limits of the observed agreement in
    its place. Simulated with five labels, 20 to 200 pairs and kappa from 0.1 to 0.95 they cover 96 to 99 %; the usual
    standard error (Fleiss, Cohen and Everitt, Psychol. Bull. 72, 1969) covers 55 to 96 %, and is zero where the raters
    never differ. None where chance agreement is 1: both raters gave one and the same label to everything.

    Raises
    ------
    ValueError
        If the table is not square, or holds nothing.
    """
    if table_KK.ndim != 2 or table_KK.shape[0] != table_KK.shape[1] or table_KK.sum() < 1:
        raise ValueError(f"table_KK must be a square table of at least one pair. Got shape {table_KK.shape}.")
    total = int(table_KK.sum())
    share_KK = table_KK / total
    row_K, column_K = share_KK.sum(axis=1), share_KK.sum(axis=0)
    observed, chance = float(np.trace(share_KK)), float(row_K @ column_K)
    if 1 - chance < 1e-12:
        return None
    exact = proportion(int(np.trace(table_KK)), total)
    limits = (max((limit - chance) / (1 - chance), -1.0) for limit in (exact.low, exact.high))
    return Rate((observed - chance) / (1 - chance), *limits)


def outcome(judged: Sequence[Judged], members: int, controls: int) -> Outcome:
    """Counts, excess and exact p-values of a review.

    Parameters
    ----------
    judged
        All pairs that were drawn: the closest of each arm.
    members, controls
        People of each arm that the pairs were drawn from.

    Raises
    ------
    ValueError
        If an arm has no pair at all, or more pairs than people.
    """
    drawn = {member: sum(one.member is member for one in judged) for member in (True, False)}
    if not (0 < drawn[True] <= members and 0 < drawn[False] <= controls):
        raise ValueError(f"judged must have pairs of both arms, no more than people. Got {drawn[True], drawn[False]}.")
    decided = [one for one in judged if one.label is not None]
    shown = {member: sum(one.member is member for one in decided) for member in (True, False)}
    found = {member: _confirmed(decided, member) for member in (True, False)}
    rates = {member: proportion(found[member], shown[member]) for member in (True, False)}
    return Outcome(
        members=shown[True],
        controls=shown[False],
        member_confirmed=found[True],
        control_confirmed=found[False],
        undecided=len(judged) - len(decided),
        false_alarm=rates[False],
        excess=found[True] - found[False],
        share=difference(rates[True], rates[False]),
        p_shown=fisher_p(found[True], found[False], shown[True], shown[False]),
        bar=_over_bar(judged, members, controls),
    )


def _confirmed(judged: Sequence[Judged], member: bool) -> int:
    return sum(one.member is member and one.label in CONFIRMED for one in judged)


def _over_bar(judged: Sequence[Judged], members: int, controls: int) -> Bar:
    """Confirmed people of both arms from one bar up, as parts of all people.

    Everybody over the bar was shown, in both arms. If members and controls are exchangeable, being over the bar and
    confirmed falls on either alike, so confirmed members are hypergeometric given all confirmed (Fisher's exact test).
    The bar depends on the data; simulated at 2,000 against 2,000, 10,000 against 1,000 and 1,000 against 10,000 people,
    with reviewers who confirm strangers the more often the closer they are, the test at 5 % rejects 1 to 3 % without a
    leak, where the test of the pairs shown rejects 2 %, 100 % and 0 %. A pair over the bar that nobody decided counts
    as not confirmed: nobody knew its arm.
    """
    score = max(min(one.score for one in judged if one.member is member) for member in (True, False))
    over = [one for one in judged if one.score >= score]
    shown = {member: sum(one.member is member for one in over) for member in (True, False)}
    found = {member: _confirmed(over, member) for member in (True, False)}
    return Bar(
        score=score,
        member_shown=shown[True],
        control_shown=shown[False],
        member_confirmed=found[True],
        control_confirmed=found[False],
        delta=difference(proportion(found[True], members), proportion(found[False], controls)),
        p=fisher_p(found[True], found[False], members, controls),
    )


def fisher_p(member_hits: int, control_hits: int, members: int, controls: int) -> float:
    """P(X >= member_hits) given all hits, X hypergeometric: Fisher's exact test, one-sided; 1 without any hit."""
    from scipy.stats import hypergeom

    drawn = member_hits + control_hits
    if not drawn:
        return 1.0
    return min(float(hypergeom.sf(member_hits - 1, members + controls, members, drawn)), 1.0)


def framed(image_HWC: NDArray[np.uint8], side: int) -> bytes:
    """A PNG of `side` x `side` pixels: the whole image, scaled to fit, in the middle of a grey square.

    Made from pixels only, so neither format, size nor anything else that came with the file is in it.

    Raises
    ------
    ValueError
        If `image_HWC` is not a uint8 RGB image with at least one pixel.
    """
    import PIL.Image

    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or not image_HWC.size:
        raise ValueError(f"image_HWC must be uint8 pixels (H, W, 3). Got {image_HWC.dtype} {image_HWC.shape}.")
    height, width = image_HWC.shape[:2]
    scale = side / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    image = PIL.Image.fromarray(np.ascontiguousarray(image_HWC)).resize(size, PIL.Image.Resampling.BICUBIC)
    canvas = PIL.Image.new("RGB", (side, side), PADDING_RGB)
    canvas.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    out = io.BytesIO()
    canvas.save(out, "PNG", compress_level=1)
    return out.getvalue()
