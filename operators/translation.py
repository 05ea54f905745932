"""Linear maps from one embedder's space to another's, fitted on faces that both have embedded.

Two uses. Where real faces exist only as embeddings of a foreign model, all arms of the audit go through the same map:
conformal p-values stay valid however bad the map is, and only power drops, because the map treats training and control
alike. And where two models should agree, an image whose translated embedding is far from what the other model says is
looked at: a model with a backdoor answers to a trigger that the other does not know (Unnervik et al.,
arXiv:2402.18718).

The paired faces must be outside the training, control and release sets: a map fitted on one of them fits it better.
Embeddings are unit vectors of any float type; all arithmetic is fp64.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.copies import Cut, cut
from operators.errors import CapacityError
from operators.vectors import normalise

Vectors = NDArray[np.floating[Any]]

RIDGE, ROTATION = "ridge", "rotation"

PENALTIES = np.geomspace(1e-9, 1e3, 49)
"""Ridge penalties that are tried, as multiples of the mean squared singular value of the source embeddings."""

ENOUGH = 2
"""Pairs per source component that a ridge map needs; a rotation needs one pair per component."""

LEVEL = 1e-3
"""Share of control images that may be flagged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """A linear map between embedding spaces: `source_D @ map_DE + offset_E` points where the target model would."""

    kind: str
    """`ridge` or `rotation`."""
    map_DE: NDArray[np.float64]
    offset_E: NDArray[np.float64]
    """Zero unless centred."""
    penalty: float
    """Of the ridge regression; 0 for a rotation."""
    pairs: int
    """Faces that it was fitted on."""
    error: float
    """Ridge: root mean square error per face of a face left out of the fit, by the closed form for leaving one out.
    Rotation: of the fit itself, which flatters it."""


class Disagreement(NamedTuple):
    """Images on which the second model does not say what the first one lets expect."""

    cosine_N: NDArray[np.float64]
    """Cosine of the translated embedding with the target model's own, per image."""
    flagged_N: NDArray[np.bool_]
    cut: Cut
    """An image is flagged at its `value` or below; what level it measures, on how many control images."""


def fit_ridge(source_ND: Vectors, target_NE: Vectors, *, centred: bool = False) -> Translation:
    """The ridge map (X'X + penalty I)^-1 X'Y, with the penalty that leaves out single faces best.

    With X = U S V', the prediction of a face by the fit without it misses by e_i / (1 - h_i), where e is the fit's own
    error and h_i = sum_k u_ik^2 s_k^2 / (s_k^2 + penalty) (Allen's PRESS, Technometrics 16(1), 1974).

    Parameters
    ----------
    source_ND, target_NE
        Embeddings of the same faces by both models.
    centred
        Fit a constant too (then 1/N joins h_i). Directions need none, but some models put all faces to one side: the
        cosines of dlib's lie between 0.8 and 1, and a map without a constant cannot reach there.

    Raises
    ------
    ValueError
        If the two do not hold the same number of finite rows.
    CapacityError
        If there are fewer than `ENOUGH` pairs per source component.
    """
    x, y = _paired(source_ND, target_NE)
    if len(x) < ENOUGH * x.shape[1]:
        raise CapacityError(
            f"{len(x):,} paired faces cannot fit a ridge map from {x.shape[1]} components: {ENOUGH * x.shape[1]:,} are "
            f"needed. Embed more faces outside the audited sets with both models, or fit a rotation."
        )
    mean_x, mean_y = _means(x, y, centred)
    x, y, constant = x - mean_x, y - mean_y, centred / len(x)
    left, single, right = np.linalg.svd(x, full_matrices=False)
    projected, best = left.T @ y, (np.inf, 0.0)
    for penalty in PENALTIES * float((single**2).mean()):
        shrink = single**2 / (single**2 + penalty)
        free = np.maximum(1 - constant - (left**2) @ shrink, np.finfo(np.float64).eps)
        missed = (y - (left * shrink) @ projected) / free[:, None]
        best = min(best, (float((missed**2).sum() / len(y)), float(penalty)))
    error, penalty = best
    map_DE = right.T @ ((single / (single**2 + penalty))[:, None] * projected)
    offset_E = mean_y - mean_x @ map_DE
    return Translation(
        kind=RIDGE, map_DE=map_DE, offset_E=offset_E, penalty=penalty, pairs=len(x), error=float(np.sqrt(error))
    )


def fit_rotation(source_ND: Vectors, target_NE: Vectors, *, centred: bool = False) -> Translation:
    """The orthogonal map U V' with U S V' = svd(X'Y), of least squares (Schönemann, Psychometrika 31, 1966).

    It keeps all angles between translated embeddings, and needs fewer pairs than a ridge map. For different widths its
    rows or its columns are orthonormal: it is then the map of that kind with the largest trace(W'X'Y), which is not the
    one of least squares where the source is the wider one. Where models put all faces to one side, `centred` turns the
    embeddings about their means instead of about the origin.

    Raises
    ------
    ValueError
        If the two do not hold the same number of finite rows.
    CapacityError
        If there are fewer pairs than components of the narrower space.
    """
    x, y = _paired(source_ND, target_NE)
    narrow = min(x.shape[1], y.shape[1])
    if len(x) < narrow:
        raise CapacityError(
            f"{len(x):,} paired faces do not determine a rotation of {narrow} components: {narrow:,} are needed. Embed "
            f"more faces outside the audited sets with both models."
        )
    mean_x, mean_y = _means(x, y, centred)
    left, _, right = np.linalg.svd((x - mean_x).T @ (y - mean_y), full_matrices=False)
    map_DE = left @ right
    offset_E = mean_y - mean_x @ map_DE
    error = float(np.sqrt(((y - x @ map_DE - offset_E) ** 2).sum() / len(y)))
    return Translation(kind=ROTATION, map_DE=map_DE, offset_E=offset_E, penalty=0.0, pairs=len(x), error=error)


def translate(translation: Translation, source_ND: Vectors) -> NDArray[np.float16]:
    """Stored vectors (N, E) in the target's space: translated, brought to length 1 and rounded to fp16.

    Give all arms of an audit through the same map.

    Raises
    ------
    ValueError
        If the width is not the map's, or a translated vector is not finite or zero.
    """
    stored_NE, _, usable_N = normalise(_mapped(translation, source_ND))
    if not usable_N.all():
        raise ValueError(f"{int((~usable_N).sum())} translated vectors are not finite or are zero. Leave them out.")
    return stored_NE


def cosines(translation: Translation, source_ND: Vectors, target_NE: Vectors) -> NDArray[np.float64]:
    """Cosine of each translated embedding with the target model's own, shape (N,); 0 where one of them is zero.

    Raises
    ------
    ValueError
        If the two do not hold the same number of finite rows, or a width is not the map's.
    """
    x, y = _paired(source_ND, target_NE)
    mapped = _mapped(translation, x)
    if mapped.shape != y.shape:
        raise ValueError(f"target_NE must have {mapped.shape[1]} components. Got {y.shape[1]}.")
    lengths = np.linalg.norm(mapped, axis=1) * np.linalg.norm(y, axis=1)
    inner = np.einsum("ne,ne->n", mapped, y)
    return np.asarray(np.divide(inner, lengths, out=np.zeros(len(y)), where=lengths > 0))


def disagreement(
    image_cosine_N: NDArray[np.float64], control_cosine_N: NDArray[np.float64], level: float = LEVEL
) -> Disagreement:
    """Flag images whose translated cosine is lower than almost every control image's.

    The level is conformal: an image that is like the control images is flagged with a chance of at most `cut.level`,
    which is `level`, or the finest that so few control images can measure (`cut.finest`).

    Parameters
    ----------
    image_cosine_N, control_cosine_N
        `cosines` of the images looked at and of control images, through the same map.
    level
        Share of control images that may be flagged.

    Raises
    ------
    CapacityError
        If there are no control images.
    """
    if not len(control_cosine_N):
        raise CapacityError(
            "no control image tells how far two models usually differ. Give embeddings of a control set."
        )
    low = cut(-np.asarray(control_cosine_N, np.float64), level)
    low = low._replace(value=-low.value)
    return Disagreement(image_cosine_N, image_cosine_N <= low.value, low)


def _paired(source_ND: Vectors, target_NE: Vectors) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = (np.asarray(vectors, np.float64) for vectors in (source_ND, target_NE))
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(
            f"source_ND and target_NE must hold one finite row per face each. Got {x.shape} and {y.shape}."
        )
    return x, y


def _means(
    x: NDArray[np.float64], y: NDArray[np.float64], centred: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return x.mean(axis=0) * centred, y.mean(axis=0) * centred


def _mapped(translation: Translation, source_ND: Vectors) -> NDArray[np.float64]:
    x = np.asarray(source_ND, np.float64)
    if x.ndim != 2 or x.shape[1] != len(translation.map_DE):
        raise ValueError(f"source_ND must have {len(translation.map_DE)} components. Got shape {x.shape}.")
    return np.asarray(x @ translation.map_DE + translation.offset_E)
