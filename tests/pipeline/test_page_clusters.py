"""Clusters and mutual ranks against brute force, and drawings of names that are hostile."""

import html.parser
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from operators.tables import CANDIDATES, FINDINGS
from pipeline.page_clusters import DRAWN_NODES, clusters, drawings, mutual


def tables(pairs: list[tuple[str | None, str, str | None, str, float]]) -> tuple[pa.Table, pa.Table]:
    """Candidates (training label and key, release label and key, cosine), and a finding for each label or image."""
    pairs = sorted(pairs, key=lambda one: -one[4])
    names = ("gallery_identity", "gallery_key", "release_identity", "release_key", "cosine")
    rows = [{"rank": rank, **dict(zip(names, one, strict=True))} for rank, one in enumerate(pairs, 1)]
    best: dict[Any, dict[str, Any]] = {}
    for row in rows:
        best.setdefault(row["gallery_identity"] or ("image", row["gallery_key"]), row)
    findings = [
        {"rank": rank, "training_identity": row["gallery_identity"], "training_key": row["gallery_key"]}
        | {name: row[name] for name in ("release_identity", "release_key", "cosine")}
        for rank, row in enumerate(best.values(), 1)
    ]
    return FINDINGS.from_rows(findings), CANDIDATES.from_rows(rows)


def test_people_and_synthetic_identities_hang_together_by_their_pairs() -> None:
    findings, candidates = tables(
        [
            ("a", "a/1", "s1", "s1/1", 0.9), ("a", "a/2", "s2", "s2/1", 0.8), ("b", "b/1", "s2", "s2/2", 0.7),
            ("c", "c/1", "s3", "s3/1", 0.85), ("d", "d/1", "s4", "s4/1", 0.6), ("e", "e/1", "s4", "s4/1", 0.65),
        ]
    )  # fmt: skip
    found = clusters(findings, candidates)  # ranks: a 1, c 2, b 3, e 4, d 5; c has one pair only
    assert [(one["name"], one["people"]) for one in found] == [(1, [1, 3]), (2, [4, 5])]
    assert found[0]["release_identities"] == ["s1", "s2"] and found[0]["release_images"] == 3
    assert found[1]["release_images"] == 1 and [one["best"] for one in found] == [0.9, 0.65]
    assert sorted(found[0]["links"]) == [(1, 0, 0.9), (1, 1, 0.8), (3, 1, 0.7)]


def test_without_labels_images_are_people_and_keys_are_identities() -> None:
    findings, candidates = tables(
        [(None, "x", None, "r1", 0.9), (None, "y", None, "r1", 0.8), (None, "z", None, "q", 0.7)]
    )
    assert [(one["people"], one["release_identities"]) for one in clusters(findings, candidates)] == [([1, 2], ["r1"])]
    assert clusters(FINDINGS.from_rows([]), CANDIDATES.from_rows([])) == []


def random_pairs(seed: int) -> list[tuple[str | None, str, str | None, str, float]]:
    rng = np.random.default_rng(seed)
    cosines = rng.integers(0, 12, (14, 16)) / 20 + 0.2  # many are equal
    return [
        (f"p{g // 2}", f"p{g // 2}/{g}", f"s{r // 3}", f"s{r // 3}/{r}", float(cosines[r, g]))
        for r, g in np.argwhere(cosines >= 0.65)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_those_of_a_search_step_by_step(seed: int) -> None:
    pairs = random_pairs(seed)
    findings, candidates = tables(pairs)
    rank_of = dict(zip(findings["training_identity"].to_pylist(), findings["rank"].to_pylist(), strict=True))
    groups: list[set[str]] = []
    for one in pairs:
        own = {str(one[0]), str(one[2])}
        joined = [group for group in groups if group & own]
        groups = [group for group in groups if not group & own] + [own.union(*joined)]
    wanted = [
        (sorted(rank_of[name] for name in group if name[0] == "p"), sorted(name for name in group if name[0] == "s"))
        for group in groups
        if len(group) > 2
    ]
    found = clusters(findings, candidates)
    assert sorted((one["people"], sorted(one["release_identities"])) for one in found) == sorted(wanted)
    sizes = [len(one["people"]) + len(one["release_identities"]) for one in found]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_places_count_the_pairs_that_are_closer(seed: int) -> None:
    pairs = random_pairs(seed)
    findings, candidates = tables(pairs)
    wanted = {
        row["rank"]: (
            1 + sum(one[3] == row["release_key"] and one[4] > row["cosine"] for one in pairs),
            1 + sum(one[1] == row["training_key"] and one[4] > row["cosine"] for one in pairs),
        )
        for row in findings.to_pylist()
    }
    assert mutual(findings, candidates) == wanted


def test_a_finding_below_the_threshold_has_no_places() -> None:
    findings, candidates = tables([("a", "a/1", "s", "s/1", 0.9), ("b", "b/1", "s", "s/1", 0.8)])
    assert mutual(findings, candidates) == {1: (1, 1), 2: (2, 1)}
    assert mutual(findings, candidates.slice(0, 1)) == {1: (1, 1)}
    assert mutual(findings, candidates.slice(0, 0)) == {}


def test_drawings_escape_names_and_have_room_for_so_many_nodes() -> None:
    hostile = "</title><script>alert(1)</script>\u202e"
    star = [(f"p{n:03d}", f"p{n:03d}/1", hostile, "s/1", 0.9 - n / 1000) for n in range(100)]
    pairs: list[tuple[str | None, str, str | None, str, float]] = [
        *star,
        *[(name, f"{name}/1", "t", "t/1", 0.5) for name in ("q", "r")],
    ]
    findings, candidates = tables(pairs)
    made = drawings(clusters(findings, candidates), {1: hostile, 2: '" onload="x'})
    assert [name for name, _ in made] == ["Cluster 1"]
    assert made[0][1].count("<circle") == DRAWN_NODES and f"{DRAWN_NODES} of 101 nodes" in made[0][1]
    tags: set[str] = set()
    reader = html.parser.HTMLParser()
    reader.handle_starttag = lambda tag, attrs: tags.update({tag, *(name for name, _ in attrs)})  # type: ignore[method-assign]
    reader.feed(made[0][1])
    assert tags.isdisjoint({"script", "onload"}) and "\u202e" not in made[0][1]
    assert re.search(r"&lt;/title&gt;&lt;script&gt;", made[0][1])
