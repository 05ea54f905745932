"""The end of a search: the list of tiles, exact counts of scores, and the refusal of anything less than everything."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.faults import IncompleteTable
from operators import histogram
from operators.tables import REJECTS, SCORES
from pipeline.coverage import COVERAGE, coverage_key, engines_of
from pipeline.layout import Comparison
from pipeline.merge import parts
from pipeline.search import search
from pipeline.stage import Run

pytestmark = pytest.mark.ray
Plant = Callable[..., Run]
Tiled = Callable[[Run], Run]
ARMS = ("training", "control", "anchor")
SMALL = ("search.k=4", "search.columns=2", "search.block_images=30", "search.shard_images=34")
ALL = ("search.certify.tiles=1000", "search.certify.rows=1000")
EDGES = histogram.EDGES.tolist()


def counted(scores: np.ndarray, lowest: float) -> list[tuple[float, int, int]]:
    """Each edge from `lowest` up, how many comparisons reach it, and how many comparisons there are."""
    seen = scores[np.isfinite(scores)]
    return [(edge, int((seen >= edge).sum()), len(seen)) for edge in EDGES if edge >= lowest]


def listed(table: pa.Table, arm: str) -> list[tuple[float, int, int]]:
    own = table.filter(pa.compute.equal(table["arm"], arm))
    return list(zip(*(own[name].to_pylist() for name in ("cosine", "pairs", "comparisons")), strict=True))


@pytest.mark.parametrize(
    ("options", "lowest"),
    [
        (("search.counts=tail", "search.floor=0.4"), 0.4),
        (("search.counts=tail", "search.floor=0.405"), 0.41),
        (("search.counts=all", "search.floor=0.405"), -1.01),
    ],
    ids=["tail from an edge", "tail between edges", "all"],
)
def test_scores_are_counted_exactly(
    session: None, plant: Plant, planted: Any, tiled: Tiled, options: tuple[str, ...], lowest: float
) -> None:
    run = tiled(plant(*SMALL, *ALL, *options))
    search(run)
    scores, sample = (run.table("search", name, SCORES) for name in ("scores-coverage", "sample"))
    assert set(scores["basis"].to_pylist()) == {"all"} and set(sample["basis"].to_pylist()) == {"sample"}
    assert list(dict.fromkeys(scores["arm"].to_pylist())) == list(ARMS)
    for arm in ARMS:
        cosines = planted.cosines("release", arm)
        assert listed(scores, arm) == counted(cosines, lowest)
        assert listed(sample, arm) == counted(cosines, -1.01)  # here the sample is everything


def test_the_sample_is_consistent_with_itself_and_the_certificate_says_how_large_it_was(
    session: None, plant: Plant, planted: Any, tiled: Tiled
) -> None:
    run = tiled(plant(*SMALL, "search.certify.tiles=5", "search.certify.rows=6"))
    search(run)
    sample = run.table("search", "sample", SCORES)
    certificate = run.commit("search", "coverage").facts["certificate"]
    assert certificate["tiles_searched_again"] == 5 and certificate["outcome"] == "equal"
    total = 0
    for arm in ARMS:
        own = listed(sample, arm)
        assert [edge for edge, _, _ in own] == EDGES
        (comparisons,) = {made for _, _, made in own}
        reaching = [pairs for _, pairs, _ in own]
        assert reaching[0] == comparisons and reaching[-1] == 0 and reaching == sorted(reaching, reverse=True)
        assert 0 < comparisons < planted.audited("release") * planted.audited(arm)
        total += comparisons
    assert total < certificate["comparisons_searched_again"] < 2 * 5 * 6 * 60


def test_the_list_of_tiles_adds_up_to_all_comparisons(searched: Plant, planted: Any) -> None:
    run = searched(*SMALL)
    table, facts = run.table("search", "coverage", COVERAGE), run.commit("search", "coverage").facts
    assert len(set(table["tile"].to_pylist())) == len(table) == facts["tiles"] == 18
    for arm in ARMS:
        own = table.filter(pa.compute.equal(table["arm"], arm))
        due = planted.audited("release") * planted.audited(arm)
        assert sum(own["comparisons"].to_pylist()) == due == facts["comparisons"][arm]
        products = [q * g for q, g in zip(own["queries"].to_pylist(), own["gallery"].to_pylist(), strict=True)]
        assert own["comparisons"].to_pylist() == products
    assert facts["floor"] == 0.4
    assert [(one["engine"], one["tiles"]) for one in facts["engines"]] == [("faiss", 18)]


def test_fewer_comparisons_than_audited_images_ask_for_are_refused(
    session: None, plant: Plant, planted: Any, tiled: Tiled
) -> None:
    run = tiled(plant(*SMALL))
    made = run.commit("embed", "control")
    run.save("embed", "control", REJECTS, REJECTS.from_rows([]), key=made.key, status={"ok": 1000})
    release = planted.audited("release")
    said = f"made {release * planted.audited('control'):,} of {release * 1000:,} comparisons of release with control"
    with pytest.raises(IncompleteTable, match=said):
        search(run)
    assert run.store.child("search").find("coverage") is None


def test_the_key_of_a_search_depends_on_what_it_says_and_not_on_how_it_was_made(plant: Plant) -> None:
    comparison = Comparison(queries="release", gallery=ARMS, k=4, columns=2, floor=0.4)

    def key(*overrides: str) -> str:
        run = plant(*overrides)
        return coverage_key(run, parts(run, comparison))

    same = [key(), key(*SMALL, "search.engine=mixed", "search.in_flight=1", "search.max_pairs=7")]
    assert len(set(same)) == 1
    certify = [f"search.certify.{one}" for one in ("tiles=9", "rows=9", "seed=9")]
    assert len({*same, *(key(one) for one in (*certify, "search.counts=all"))}) == 5


def test_engines_are_told_once_each_with_the_largest_margin() -> None:
    one = {"engine": "mixed", "device": "cpu", "dtype": "bfloat16", "residual": 0.1, "margin": 0.2, "reason": "given"}
    two = {**one, "residual": 0.3, "margin": 0.1}
    other = {**one, "dtype": "float32", "residual": 0.0, "margin": 0.0}
    found = engines_of([one, other, two, one])
    assert [(about["dtype"], about["tiles"]) for about in found] == [("bfloat16", 3), ("float32", 1)]
    assert (found[0]["residual"], found[0]["margin"]) == (0.3, 0.2)
    assert "tiles" not in one and engines_of([]) == []
