"""What verify does to a search, on made-up vectors: all is equal as committed, and any change of a part is seen."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.faults import IncompleteTable
from operators.tables import CLOSEST, NEIGHBOURS, PAIRS, Table
from pipeline.coverage import COVERAGE
from pipeline.layout import units_of
from pipeline.recheck import Again, _sample, recheck
from pipeline.search import finished
from pipeline.stage import Run

pytestmark = pytest.mark.ray
Plant = Callable[..., Run]
Searched = Callable[..., Run]
Altered = Callable[[pa.Table], pa.Table]
ARMS = ("training", "control", "anchor")
SMALL = ("search.k=4", "search.columns=2", "search.block_images=30", "search.shard_images=34")


@pytest.fixture
def searched(searched: Searched) -> Searched:
    """A finished search; overrides are `key=value` texts."""
    return partial(searched, *SMALL)


def alter(run: Run, kind: Table, altered: Altered) -> str:
    """Commit a part of `kind` again, altered, with a marker that fits it."""
    comparison, wanted = finished(run)
    name = [name for name, of in wanted.names(comparison) if of is kind][1]
    made = run.commit("search", name)
    run.save("search", name, kind, altered(run.table("search", name, kind)), key=made.key, **made.facts)
    return name


def nudged(table: pa.Table) -> pa.Table:
    values = table["cosine"].to_numpy().copy()
    values[len(values) // 2] = np.nextafter(values[len(values) // 2], 2)
    return table.set_column(table.schema.get_field_index("cosine"), table.schema.field("cosine"), pa.array(values))


def swapped(table: pa.Table) -> pa.Table:
    """The first two rows in the other order, each with the other's rank."""
    moved = table.take(pa.array([1, 0, *range(2, len(table))]))
    return moved.set_column(table.schema.get_field_index("rank"), table.schema.field("rank"), table["rank"])


def told(again: Again) -> list[str]:
    return [difference.what for difference in again.differences]


@pytest.mark.parametrize("group", [256, 7])
def test_a_good_search_has_no_differences_and_every_comparison_is_made_from_both_sides(
    searched: Searched, planted: Any, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    monkeypatch.setattr("pipeline.recheck.GROUP", group)
    again = recheck(searched(), 1000, 0)
    gallery = sum(planted.audited(arm) for arm in ARMS)
    assert told(again) == []
    assert (again.release_images, again.gallery_images) == (planted.audited("release"), gallery)
    assert again.comparisons == 2 * planted.audited("release") * gallery


def test_a_sample_has_so_many_images_of_the_release_and_of_each_gallery_set(searched: Searched, planted: Any) -> None:
    again = recheck(searched(), 7, 0)
    counts = [min(7, planted.audited(arm)) for arm in ARMS]
    assert (again.release_images, again.gallery_images) == (7, sum(counts))
    due = 7 * sum(planted.audited(arm) for arm in ARMS) + sum(counts) * planted.audited("release")
    assert told(again) == [] and again.comparisons == due


def test_a_search_that_kept_nothing_for_gallery_images_is_checked_from_one_side(
    searched: Searched, planted: Any
) -> None:
    again = recheck(searched("search.columns=0"), 1000, 0)
    assert told(again) == [] and again.gallery_images == 0
    assert again.comparisons == planted.audited("release") * sum(planted.audited(arm) for arm in ARMS)


@pytest.mark.parametrize(
    ("kind", "altered", "said"),
    [
        (CLOSEST, nudged, r"search/closest: gallery row \d+, training, place \d: cosine \S+ is committed, \S+ recomp"),
        (CLOSEST, lambda table: table.slice(1), r"search/closest: gallery row \d+, training: 1 rows are .*, 2 recomp"),
        (CLOSEST, lambda table: table.slice(0, 0), r"search/closest: gallery row \d+, training: 0 rows are committed"),
        (CLOSEST, swapped, r"search/closest: gallery row \d+, training, place 1: release_row \d+ is committed"),
        (NEIGHBOURS, nudged, r"search/neighbours: release row \d+, \w+, place \d: cosine \S+ is committed"),
        (NEIGHBOURS, lambda table: table.slice(1), r"search/neighbours: release row \d+, training: 3 rows .*, 4 recom"),
        (
            PAIRS,
            lambda table: table.slice(1),
            r"search/pairs: release row \d+, training: \d+ rows are committed, \d+ r",
        ),
        (PAIRS, nudged, r"search/pairs: release row \d+, \w+, place \d+: cosine \S+ is committed"),
    ],
)
def test_an_altered_part_is_seen(searched: Searched, kind: Table, altered: Altered, said: str) -> None:
    run = searched()
    alter(run, kind, altered)
    different = recheck(run, 1000, 0).differences
    assert different and all(
        one.remedy == f"Delete {run.folder / 'search'} and run `unveil run` again." for one in different
    )

    assert re.match(said, different[0].what), different[0].what


def test_an_altered_tile_is_seen_though_no_part_was_made_of_it(searched: Searched) -> None:
    run = searched("search.certify.tiles=1000", "search.certify.rows=1000")
    store = run.store.child("search")
    key = run.table("search", "coverage", COVERAGE)["tile"][1].as_py()
    made, table = store.find(f"tile-{key}"), store.read(f"tile-{key}")
    store.commit(made.name, table.slice(1), contract=made.contract, key=made.key, facts=made.facts)
    assert [what.split(":")[0] for what in told(recheck(run, 1, 0))] == [f"search/tile-{key}, training"]


def test_tiles_that_were_deleted_after_the_search_are_not_asked_for(searched: Searched) -> None:
    run = searched()
    for path in (run.folder / "search").glob("tile-*"):
        path.unlink()
    assert told(recheck(run, 1000, 0)) == []


def test_a_wrong_number_of_comparisons_is_seen(searched: Searched, planted: Any) -> None:
    run = searched()
    made = run.commit("search", "coverage")
    facts = {**made.facts, "comparisons": {**made.facts["comparisons"], "control": 3}}
    run.save("search", "coverage", COVERAGE, run.table("search", "coverage", COVERAGE), key=made.key, **facts)
    due = planted.audited("release") * planted.audited("control")
    assert told(recheck(run, 1, 0)) == [f"search/coverage, control: 3 comparisons are recorded, {due} counted"]


def test_samples_are_of_audited_images_and_differ_by_seed(plant: Plant, planted: Any) -> None:
    run = plant()
    units = units_of(run, "training")
    drawn = [_sample(run, units, 9, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    rows = [own.tolist() for own, _ in drawn]
    assert rows[0] == rows[1] != rows[2]
    vectors = np.concatenate([unit.vectors for unit in planted.units["training"]])
    failed = np.concatenate([unit.failed for unit in planted.units["training"]])
    for own, stored in drawn:
        assert len(set(own.tolist())) == 9 and own.tolist() == sorted(own.tolist())
        assert np.array_equal(stored, vectors[own]) and not failed[own].any()


def test_a_search_of_other_options_is_refused(searched: Searched, plant: Plant) -> None:
    searched()
    with pytest.raises(IncompleteTable, match="Run `unveil search` again"):
        recheck(plant(*SMALL, "search.k=5"), 1, 0)
