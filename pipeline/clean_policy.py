"""Which release images a policy takes out, as functions of arrays: links to training persons in, steps and causes out.

Suffixes: N release images in row order, L links, P pairs within the release.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

POLICIES = ("image", "identity", "cluster")


class Step(IntEnum):
    """Why an image goes; the first reason that holds."""

    KEPT = 0
    LINK = 1
    """It comes close to a training person that the policy selects."""
    SAME_BYTES = 2
    """Its file is byte for byte that of an image that goes."""
    IDENTITY = 3
    """An image of its synthetic identity goes."""
    CLUSTER = 4
    """It is connected with an image that goes, through training persons and near copies within the release."""
    NOT_AUDITED = 5
    """It could not be audited, and the policy does not keep such images."""


class Links(NamedTuple):
    """Release images that come close to training persons, each pair of the two once, the strongest first."""

    row_L: NDArray[np.int64]
    person_L: NDArray[np.int64]
    """Number of the training person."""
    selected_L: NDArray[np.bool_]
    """Whether the finding of this person is to be removed by this image."""


class Near(NamedTuple):
    """Pairs of release images that are near copies of one another."""

    left_P: NDArray[np.int64]
    right_P: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What a policy needs to know of the release images."""

    identity_N: NDArray[np.int64]
    """Number of the identity; -1 for none."""
    content_N: NDArray[np.int64]
    """Number of the file's digest; -1 for a file that could not be read."""
    audited_N: NDArray[np.bool_]


class Removal(NamedTuple):
    """What goes and why."""

    step_N: NDArray[np.int8]
    """`Step` of each image."""
    link_N: NDArray[np.int64]
    """The strongest selected link behind the removal: of the image itself, or of the image in `cause_N`; else -1."""
    cause_N: NDArray[np.int64]
    """The image that takes this one along; -1 where a link of its own does, or nothing."""


def removal(release: Release, links: Links, near: Near | None, policy: str, unaudited: str) -> Removal:
    """The images that go.

    Images with a selected link go, and files of the same bytes. `identity` takes their identities along, `cluster`
    everything that is connected with them: two images are connected that have a link to one person, or are a pair of
    `near`, or have the same bytes. Files with the same bytes as anything that went so far go too.

    Parameters
    ----------
    release
        All images of the release.
    links
        Their links, the strongest first.
    near
        Near copies within the release, for `cluster`; None where the release was not searched against itself.
    policy
        One of `POLICIES`.
    unaudited
        `keep` or `remove` images that were not audited.
    """
    made = _begun(release, links)
    _spread(made, release.content_N, Step.SAME_BYTES)
    if policy == "identity":
        _spread(made, release.identity_N, Step.IDENTITY)
        _spread(made, release.content_N, Step.SAME_BYTES)
    elif policy == "cluster":
        _spread(made, _components(release, links, near), Step.CLUSTER)
    if unaudited == "remove":
        made.step_N[~release.audited_N & (made.step_N == Step.KEPT)] = Step.NOT_AUDITED
    return made


def _begun(release: Release, links: Links) -> Removal:
    """Images that have a selected link of their own, with the strongest."""
    rows = len(release.identity_N)
    step_N = np.zeros(rows, np.int8)
    link_N, cause_N = np.full(rows, -1, np.int64), np.full(rows, -1, np.int64)
    chosen = np.flatnonzero(links.selected_L)
    own, first = np.unique(links.row_L[chosen], return_index=True)
    step_N[own], link_N[own] = Step.LINK, chosen[first]
    return Removal(step_N, link_N, cause_N)


def _spread(made: Removal, group_N: NDArray[np.int64], step: Step) -> None:
    """Let images go whose group (a number, or -1 for none) has one that goes; its image with the best link is cause."""
    gone = np.flatnonzero((made.step_N > Step.KEPT) & (group_N >= 0))
    if not len(gone):
        return
    ordered = gone[np.lexsort((gone, made.link_N[gone]))]
    groups, first = np.unique(group_N[ordered], return_index=True)
    place_N = np.minimum(np.searchsorted(groups, group_N), len(groups) - 1)
    taken = np.flatnonzero((groups[place_N] == group_N) & (made.step_N == Step.KEPT))
    cause = ordered[first][place_N[taken]]
    made.step_N[taken], made.link_N[taken] = step, made.link_N[cause]
    made.cause_N[taken] = cause


def _components(release: Release, links: Links, near: Near | None) -> NDArray[np.int64]:
    """Number of the connected group of each image."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = len(release.identity_N)
    _, person_L = np.unique(links.person_L, return_inverse=True)
    known = np.flatnonzero(release.content_N >= 0)
    _, first, copy = np.unique(release.content_N[known], return_index=True, return_inverse=True)
    left = [links.row_L, known]
    right = [rows + person_L.reshape(-1), known[first][copy.reshape(-1)]]
    if near is not None:
        left, right = [*left, near.left_P], [*right, near.right_P]
    ends = np.concatenate(left), np.concatenate(right)
    nodes = rows + int(person_L.max(initial=-1)) + 1
    graph = coo_array((np.ones(len(ends[0]), np.int32), ends), shape=(nodes, nodes))
    _, group_N = connected_components(graph.tocsr(), directed=False)
    return np.asarray(group_N[:rows], np.int64)
