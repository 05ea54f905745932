"""Findings that hang together: training people who share a synthetic identity, or release images, in their candidates.

One person in several guises, one generator input behind many images, or a crowd of look-alikes around one hub: the list
of people shows none of these, since it has one line for each person. A cluster is a connected component of the graph
with training people on one side and synthetic identities on the other, an edge for every candidate between them.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators.leakage import person
from operators.tables import CANDIDATES, FINDINGS
from pipeline.spreadsheet import values, visible

DRAWN, DRAWN_NODES = 12, 60
"""Clusters that are drawn at most, and nodes of all of them together."""
LINKS = 200
"""Edges that a cluster keeps for its drawing, highest cosine first."""

WIDTH, ROW, LABEL = 360, 22, 126
"""Units of a drawing: its width, the height of a node's row, and the width of the names at either side."""
NAME = 16
"""Characters of a name that a drawing has room for."""

Cluster = Mapping[str, Any]


class _Edges(NamedTuple):
    """Edges between people (left) and synthetic identities (right), as numbers of nodes; one row per candidate."""

    left_E: NDArray[np.int64]
    right_E: NDArray[np.int64]
    image_E: NDArray[np.int64]
    """Number of the release image."""
    cosine_E: NDArray[np.float64]
    right_names: Sequence[str]
    finding_left_F: NDArray[np.int64]
    """The person's node of each finding."""


def clusters(findings: pa.Table, candidates: pa.Table) -> list[Cluster]:
    """Groups of more than one training person or more than one synthetic identity, largest first.

    A person is a label of the training set, or an image where it has none; a synthetic identity likewise. Of a person
    under several labels only the label of the finding counts, the others join as people without a finding.

    Parameters
    ----------
    findings
        Rows of the FINDINGS contract.
    candidates
        Rows of the CANDIDATES contract of the training set.

    Returns
    -------
    list
        For each cluster `name` (1 for the largest), `people` (ranks of its findings, ascending),
        `release_identities` (or keys of release images, in the order of their highest cosine), `release_images`
        (their number), `best` (highest cosine) and `links` (rank, place in `release_identities`, cosine; the highest
        `LINKS`).
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not findings.num_rows:
        return []
    edges = _edges(FINDINGS.check(findings), CANDIDATES.check(candidates))
    lefts = int(max(edges.left_E.max(), edges.finding_left_F.max())) + 1
    size = lefts + len(edges.right_names)
    ones = np.ones(len(edges.left_E), np.int8)
    graph = coo_array((ones, (edges.left_E, edges.right_E + lefts)), shape=(size, size))
    _, part_V = connected_components(graph, directed=False)
    rank_F = findings["rank"].to_numpy()
    order_E = np.argsort(-edges.cosine_E, kind="stable")
    own_E = order_E[np.argsort(part_V[edges.left_E[order_E]], kind="stable")]
    part_E = part_V[edges.left_E[own_E]]
    begins = np.searchsorted(part_E, np.unique(part_E))
    people_of: dict[int, list[int]] = {}
    rank_of: dict[int, int] = {}
    for rank, left in zip(rank_F.tolist(), edges.finding_left_F.tolist(), strict=True):
        people_of.setdefault(int(part_V[left]), []).append(rank)
        rank_of.setdefault(left, rank)
    found = [
        _cluster(edges, rows, sorted(people_of[part]), rank_of)
        for rows in np.split(own_E, begins[1:])
        if (part := int(part_V[edges.left_E[rows[0]]])) in people_of
    ]
    found = [one for one in found if len(one["people"]) > 1 or len(one["release_identities"]) > 1]
    found.sort(key=lambda one: (-len(one["people"]) - len(one["release_identities"]), -one["best"], one["people"][0]))
    return [{"name": name, **one} for name, one in enumerate(found, 1)]


def _cluster(edges: _Edges, rows: NDArray[np.int64], people: list[int], rank_of: Mapping[int, int]) -> dict[str, Any]:
    """One cluster from its rows of `edges`, highest cosine first."""
    identities = list(dict.fromkeys(edges.right_E[rows].tolist()))
    place_of = {node: at for at, node in enumerate(identities)}
    links: dict[tuple[int, int], float] = {}
    for row in rows.tolist():
        left, right = int(edges.left_E[row]), int(edges.right_E[row])
        if left in rank_of and len(links) < LINKS:
            links.setdefault((rank_of[left], place_of[right]), float(edges.cosine_E[row]))
    return {
        "people": people,
        "release_identities": [edges.right_names[node] for node in identities],
        "release_images": len(np.unique(edges.image_E[rows])),
        "best": float(edges.cosine_E[rows[0]]),
        "links": [(rank, place, cosine) for (rank, place), cosine in links.items()],
    }


def _edges(findings: pa.Table, candidates: pa.Table) -> _Edges:
    """Edges of all candidates, and of each finding's own pair, which can stay below the threshold."""
    left_code, right_code, image_code = _Codes(), _Codes(), _Codes()
    finding_left = [
        left_code(person(*own))
        for own in zip(values(findings["training_identity"]), values(findings["training_key"]), strict=True)
    ]
    left, right, image, cosine = list(finding_left), [], [], [values(findings["cosine"])]
    for identity, key in zip(values(findings["release_identity"]), values(findings["release_key"]), strict=True):
        right.append(right_code(person(identity, key), identity or key))
        image.append(image_code(key))
    names = ("gallery_identity", "gallery_key", "release_identity", "release_key")
    for own in zip(*(values(candidates[name]) for name in names), strict=True):
        left.append(left_code(person(own[0], own[1])))
        right.append(right_code(person(own[2], own[3]), own[2] or own[3]))
        image.append(image_code(own[3]))
    cosine.append(values(candidates["cosine"]))
    return _Edges(
        np.array(left, np.int64),
        np.array(right, np.int64),
        np.array(image, np.int64),
        np.array([one for part in cosine for one in part], np.float64),
        right_code.names,
        np.array(finding_left, np.int64),
    )


class _Codes:
    """Numbers of texts in the order of their first sight, and how each is shown."""

    def __init__(self) -> None:
        self.number_of: dict[str, int] = {}
        self.names: list[str] = []

    def __call__(self, text: str, name: str | None = None) -> int:
        found = self.number_of.setdefault(text, len(self.names))
        if found == len(self.names):
            self.names.append(text if name is None else name)
        return found


def mutual(findings: pa.Table, candidates: pa.Table) -> dict[int, tuple[int, int]]:
    """By rank of a finding: the places of its two images in each other's lists; 1 and 1 are mutually closest.

    The first is the place of the training image among all training images by closeness to the release image, the
    second the place of the release image among all release images by closeness to the training image. Candidates are
    all pairs from the threshold up, so every pair that is closer than a candidate is one as well, and both places are
    exact. Equal cosines share the better place. A finding below the threshold is left out: its places are not known.

    Parameters as for `clusters`.
    """
    listed = CANDIDATES.check(candidates)
    cosine = listed["cosine"].to_numpy()
    sides = [_codes(listed[name]) for name in ("release_key", "gallery_key")]
    places = [_places(side, cosine) for side in sides]
    keys = zip(values(listed["release_key"]), values(listed["gallery_key"]), strict=True)
    at = {pair: row for row, pair in enumerate(keys)}
    own = zip(
        *(values(FINDINGS.check(findings)[name]) for name in ("rank", "release_key", "training_key")), strict=True
    )
    return {
        rank: (int(places[0][row]), int(places[1][row]))
        for rank, release, training in own
        if (row := at.get((release, training))) is not None
    }


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    encoded = pc.dictionary_encode(column.combine_chunks())
    return np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64)


def _places(side_E: NDArray[np.int64], cosine_E: NDArray[np.float64]) -> NDArray[np.int64]:
    """The place of each row among the rows of the same side by falling cosine; equal cosines share the better one."""
    order_E = np.lexsort((-cosine_E, side_E))
    side, cosine = side_E[order_E], cosine_E[order_E]
    first = np.append(True, side[1:] != side[:-1])[: len(side)]
    start = np.maximum.accumulate(np.where(first, np.arange(len(side)), 0))
    fresh = first | np.append(True, cosine[1:] != cosine[:-1])[: len(side)]
    better = np.maximum.accumulate(np.where(fresh, np.arange(len(side)), 0))
    places_E = np.empty(len(side), np.int64)
    places_E[order_E] = better - start + 1
    return places_E


def drawings(found: Sequence[Cluster], names: Mapping[int, str]) -> list[tuple[str, str]]:
    """Name and inline SVG of the largest clusters, as long as there is room for nodes.

    Parameters
    ----------
    found
        Of `clusters`, largest first.
    names
        How the person of a finding is called, by its rank.
    """
    made, left = [], DRAWN_NODES
    for one in found[:DRAWN]:
        if left < 2:
            break
        drawn, used = _drawing(one, names, left)
        made.append((f"Cluster {one['name']}", drawn))
        left -= used
    return made


def _drawing(one: Cluster, names: Mapping[int, str], room: int) -> tuple[str, int]:
    """The SVG of one cluster, and how many nodes it has; those of the highest cosines where not all have room."""
    people: dict[int, int] = {}
    identities: dict[int, int] = {}
    links = []
    for rank, place, cosine in one["links"]:
        fresh = (rank not in people) + (place not in identities)
        if len(people) + len(identities) + fresh > room:
            continue
        links.append((people.setdefault(rank, len(people)), identities.setdefault(place, len(identities)), cosine))
    height = ROW * max(len(people), len(identities))
    left, right = LABEL, WIDTH - LABEL
    offsets = [(height - ROW * len(side)) / 2 + ROW / 2 for side in (people, identities)]
    lines = [
        f'<line x1="{left}" y1="{offsets[0] + ROW * a:g}" x2="{right}" y2="{offsets[1] + ROW * b:g}">'
        f"<title>cosine {cosine:.4f}</title></line>"
        for a, b, cosine in links
    ]
    said = {rank: names.get(rank) or "" for rank in people}
    nodes = [_node(left, offsets[0] + ROW * at, f"{rank}. {said[rank]}", "end") for rank, at in people.items()]
    nodes += [
        _node(right, offsets[1] + ROW * at, one["release_identities"][place], "start")
        for place, at in identities.items()
    ]
    whole = len(one["people"]) + len(one["release_identities"])
    used = len(people) + len(identities)
    cut = f", {used} of {whole} nodes" if used < whole else ""
    title = f"Cluster {one['name']}: training people left, synthetic identities right{cut}"
    svg = (
        f'<svg class="graph" viewBox="0 0 {WIDTH} {max(height, ROW)}" role="img" aria-label="{title}">'
        f"<g>{''.join(lines)}</g>{''.join(nodes)}</svg>"
    )
    return svg, used


def _node(x: float, y: float, text: str, anchor: str) -> str:
    """A dot with its name beside it, cut to its room; the whole name is its title."""
    shown = visible(text)
    short = shown if len(shown) <= NAME else f"{shown[: NAME - 1]}…"
    side = "person" if anchor == "end" else "synthetic"
    return (
        f'<g class="{side}"><title>{html.escape(shown)}</title><circle cx="{x:g}" cy="{y:g}" r="5"/>'
        f'<text x="{x + (-10 if anchor == "end" else 10):g}" y="{y + 4:g}" text-anchor="{anchor}">'
        f"{html.escape(short)}</text></g>"
    )
