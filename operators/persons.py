"""Units of inference: which images show one person, over the training set and the control set together.

Nodes are the labels of each set, and images without a label. Two nodes are joined where an image of the one and an
image of the other have a cosine of `tau_dup` or more: the same person under two labels. A unit is a connected
component. A single wrong image can join two crowds, so a component of more than `span` labels is cut and joined again
by the centroids of its nodes, which one image hardly moves. A unit that has images of both sets (a straddler) leaves
both: removing it from the control set only would make the controls less like the training set than they are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators.vectors import exact_matrix, normalise

MEMBER, CONTROL = 0, 1
"""Arms: images of the training set, and of the control set."""
BLOCK = 2048

Vectors = NDArray[np.float16] | Callable[[NDArray[np.int64]], NDArray[np.float16]]
"""Stored vectors (N, D), or a function from row numbers (M,) to their stored vectors (M, D)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonsConfig:
    """How images are joined to persons."""

    tau_dup: float = 0.70
    """Cosine from which two images with different labels show the same person. Must lie above the cosine at which one
    false pair is expected among all pairs of the two sets (docs/method.md)."""
    span: int = 10
    """A component of more labels than this is cut, and joined again by the centroids of its labels."""

    def __post_init__(self) -> None:
        if not 0 < self.tau_dup <= 1:
            raise ValueError(f"tau_dup must lie in (0, 1]. Got {self.tau_dup}.")
        if self.span < 1:
            raise ValueError(f"span must be 1 or more. Got {self.span}.")


class Duplicates(NamedTuple):
    """Pairs of images with a high cosine; each pair of rows once, in either order."""

    left_P: NDArray[np.int64]
    right_P: NDArray[np.int64]
    cosine_P: NDArray[np.float64]

    @classmethod
    def none(cls) -> "Duplicates":
        """No pair at all."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


class Persons(NamedTuple):
    """The units of both arms; numbers follow the lowest row of each, so they do not depend on the order of pairs."""

    unit_N: NDArray[np.int64]
    """Unit of each image, 0 to U - 1; -1 for an image of a straddler."""
    arm_U: NDArray[np.int8]
    """`MEMBER` or `CONTROL`."""
    images_U: NDArray[np.int64]
    labels_U: NDArray[np.int64]
    """Distinct labels of each unit; an image without a label counts as one."""
    straddler_N: NDArray[np.int64]
    """Number of the straddler that each image belongs to, 0 to S - 1; -1 for an image of a unit."""
    straddlers: int
    broken: int
    """Components of more than `span` labels that were cut and joined again by centroids."""

    @property
    def several_labels(self) -> int:
        """Units that hold more than one label: label noise, twins, or the same photo twice."""
        return int((self.labels_U > 1).sum())

    @property
    def largest(self) -> int:
        """Images of the largest unit."""
        return int(self.images_U.max(initial=0))


def label_codes(labels: Sequence[str | None] | pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """A number for each distinct label, in order of first occurrence, shape (N,); -1 where there is no label."""
    column = labels if isinstance(labels, pa.Array | pa.ChunkedArray) else pa.array(labels, pa.string())
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    indices = pc.fill_null(whole.dictionary_encode().indices, -1)
    return np.asarray(indices.to_numpy(zero_copy_only=False), np.int64)


def persons(
    label_N: NDArray[np.int64],
    arm_N: NDArray[np.int8],
    pairs: Duplicates,
    config: PersonsConfig,
    vectors: Vectors | None = None,
) -> Persons:
    """Units over the images of both arms.

    Parameters
    ----------
    label_N
        Label of each image, -1 for none (`label_codes`). The same number in both arms is not the same label.
    arm_N
        `MEMBER` or `CONTROL`.
    pairs
        Pairs of rows with their cosine; those under `tau_dup` are left aside, so one list serves several thresholds.
    config
        Threshold and guard.
    vectors
        Asked for only where a component has more than `span` labels.

    Raises
    ------
    ValueError
        If lengths differ, a row number or an arm does not exist, or a component must be cut and `vectors` is None.
    """
    _check(label_N, arm_N, pairs)
    node_N, labelled, nodes = _nodes(label_N, arm_N)
    joined = pairs.cosine_P >= config.tau_dup
    left, right = node_N[pairs.left_P[joined]], node_N[pairs.right_P[joined]]
    part_V = _components(nodes, left, right)
    chained = np.flatnonzero(np.bincount(part_V[:labelled], minlength=1) > config.span)
    if len(chained):
        if vectors is None:
            raise ValueError(f"vectors must be given: {len(chained)} components span more than {config.span} labels.")
        kept = ~np.isin(part_V[left], chained)
        again = [_centroid_pairs(rows, node_N, vectors, config.tau_dup) for rows in _rows_of(chained, part_V, node_N)]
        left = np.concatenate([left[kept], *(pair[0] for pair in again)])
        right = np.concatenate([right[kept], *(pair[1] for pair in again)])
        part_V = _components(nodes, left, right)
    return _numbered(node_N, part_V, arm_N, len(chained))


def _check(label_N: NDArray[np.int64], arm_N: NDArray[np.int8], pairs: Duplicates) -> None:
    """ValueError where the inputs do not fit each other."""
    if len(label_N) != len(arm_N):
        raise ValueError(f"arm_N must have one entry per label. Got {len(arm_N)} for {len(label_N)}.")
    if not np.isin(arm_N, (MEMBER, CONTROL)).all():
        raise ValueError(f"arm_N must be {MEMBER} or {CONTROL}. Got {np.setdiff1d(arm_N, (MEMBER, CONTROL))}.")
    if len({len(column) for column in pairs}) > 1:
        raise ValueError(f"pairs must have columns of one length. Got {[len(column) for column in pairs]}.")
    for rows in pairs[:2]:
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(label_N)):
            raise ValueError(f"pairs must name rows 0 to {len(label_N) - 1}. Got {rows.min()} to {rows.max()}.")


def _nodes(label_N: NDArray[np.int64], arm_N: NDArray[np.int8]) -> tuple[NDArray[np.int64], int, int]:
    """Node of each image, how many of the nodes are labels, and how many there are.

    One node per (arm, label), these first, then one per image without a label.
    """
    labels = int(label_N.max(initial=-1)) + 1
    alone = label_N < 0
    key_N = arm_N.astype(np.int64) * labels + label_N
    key_N[alone] = 2 * labels + np.arange(int(alone.sum()))
    distinct, node_N = np.unique(key_N, return_inverse=True)
    return node_N.astype(np.int64), int((distinct < 2 * labels).sum()), len(distinct)


def _components(nodes: int, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """Connected component of each node, shape (V,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(left):
        return np.arange(nodes)
    graph = coo_array((np.ones(len(left), np.bool_), (left, right)), shape=(nodes, nodes)).tocsr()
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _rows_of(
    parts: NDArray[np.int64], part_V: NDArray[np.int64], node_N: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    """The images of each of `parts`, ordered by node."""
    rows = np.flatnonzero(np.isin(part_V[node_N], parts))
    rows = rows[np.lexsort((node_N[rows], part_V[node_N[rows]]))]
    yield from np.split(rows, np.flatnonzero(np.diff(part_V[node_N[rows]])) + 1)


def _centroid_pairs(
    row_M: NDArray[np.int64], node_N: NDArray[np.int64], vectors: Vectors, tau: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of nodes whose centroids have a cosine of `tau` or more; `row_M` are the nodes' images, ordered by node.

    A centroid is the mean of the node's stored vectors, made a stored vector itself: its sum is exact in fp64, so the
    cosine is the same in any order of images.
    """
    node_C, first = np.unique(node_N[row_M], return_index=True)
    end = np.append(first[1:], len(row_M))
    centres, left, right = [], [], []
    for at in range(0, len(node_C), BLOCK):  # not all at once: in fp64 a large component would not fit in memory
        row_B = row_M[first[at] : end[at : at + BLOCK][-1]]
        stored = vectors(row_B) if callable(vectors) else vectors[row_B]
        sums = np.add.reduceat(stored.astype(np.float64), first[at : at + BLOCK] - first[at], axis=0)
        centres.append(normalise(sums)[0])
    centre_CD = np.concatenate(centres)
    for at in range(0, len(node_C), BLOCK):
        near, far = np.nonzero(exact_matrix(centre_CD[at : at + BLOCK], centre_CD[at:]) >= tau)
        later = far > near
        left.append(node_C[at + near[later]])
        right.append(node_C[at + far[later]])
    return np.concatenate(left), np.concatenate(right)


def _numbered(node_N: NDArray[np.int64], part_V: NDArray[np.int64], arm_N: NDArray[np.int8], broken: int) -> Persons:
    """Components as units in order of their lowest row, straddlers apart."""
    _, first, part_N = np.unique(part_V[node_N], return_index=True, return_inverse=True)
    parts = len(first)
    images = np.bincount(part_N, minlength=parts)
    controls = np.bincount(part_N, weights=arm_N == CONTROL, minlength=parts).astype(np.int64)
    labels = np.bincount(part_N[np.unique(node_N, return_index=True)[1]], minlength=parts)
    straddles = (controls > 0) & (controls < images)
    order = np.argsort(first)
    number = np.empty(parts, np.int64)
    number[order] = np.where(straddles[order], np.cumsum(straddles[order]), np.cumsum(~straddles[order])) - 1
    unit = order[~straddles[order]]
    return Persons(
        unit_N=np.where(straddles[part_N], -1, number[part_N]),
        arm_U=np.where(controls[unit] > 0, CONTROL, MEMBER).astype(np.int8),
        images_U=images[unit],
        labels_U=labels[unit],
        straddler_N=np.where(straddles[part_N], number[part_N], -1),
        straddlers=int(straddles.sum()),
        broken=broken,
    )
