"""A search gives what plain NumPy gives, from whatever tiles; new units and lost tiles cost only what they are in."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.faults import IncompleteTable
from operators import histogram
from operators.errors import CapacityError, ConfigError
from operators.tables import (
    CLOSEST,
    NEIGHBOURS,
    PAIRS,
    REJECTS,
    SCORES,
    UNITS,
    WITHIN_NEIGHBOURS,
    WITHIN_PAIRS,
    Table,
)
from pipeline.calibrate import calibrate, set_columns
from pipeline.coverage import COVERAGE
from pipeline.embed import closing_key, unit_store
from pipeline.search import SearchConfig, finished, results, search
from pipeline.stage import Run

pytestmark = pytest.mark.ray
Plant = Callable[..., Run]
Tiled = Callable[[Run], Run]
Hits = list[tuple[int, int, float]]
ARMS = ("training", "control", "anchor")
KEPT = ("search.k=4", "search.columns=2")
SMALL = (*KEPT, "search.block_images=30", "search.shard_images=34")
UNIT_BY_UNIT = ("search.block_images=1", "search.shard_images=1")


def found(run: Run, contract: Table, arm: str) -> Hits:
    table = pa.concat_tables(results(run, contract))
    table = table.filter(pa.compute.equal(table["arm"], arm))
    return list(zip(*(table[c].to_pylist() for c in ("release_row", "gallery_row", "cosine")), strict=True))


def parts_of(run: Run, title: str = "coverage") -> dict[str, bytes]:
    """The bytes of every part that belongs to the finished search, and of its score counts."""
    comparison, wanted = finished(run, title)
    names = [*(name for name, _ in wanted.names(comparison)), f"scores-{title}"]
    return {name: (run.folder / "search" / f"{name}.parquet").read_bytes() for name in names}


def agrees(run: Run, planted: Any, k: int, columns: int, floor: float) -> None:
    """Assert that all results of a search are those of brute force, in their order."""
    for arm in ARMS:
        assert found(run, NEIGHBOURS, arm) == planted.nearest("release", arm, k)
        assert found(run, CLOSEST, arm) == planted.closest(arm, columns)
        assert found(run, PAIRS, arm) == planted.above("release", arm, floor)
    for contract, own in ((NEIGHBOURS, "release_row"), (CLOSEST, "gallery_row")):
        for part in results(run, contract):
            lists: dict[tuple[str, int], list[int]] = {}
            for row in part.to_pylist():
                lists.setdefault((row["arm"], row[own]), []).append(row["rank"])
            assert all(ranks == list(range(1, len(ranks) + 1)) for ranks in lists.values())


def now(run: Run) -> tuple[int, int]:
    """Tiles and comparisons that the last search made."""
    facts = run.ledger.record["stages"]["search"]
    return facts["tiles_now"], facts["comparisons_now"]


def fresh(plant: Plant, tiled: Tiled, *options: str, sets: Any, name: str) -> dict[str, bytes]:
    """The parts of a search of `sets` in a folder of its own."""
    run = tiled(plant(*options, sets=sets, name=name))
    search(run)
    return parts_of(run)


def tiles_between(run: Run, blocks: int, shards: int) -> int:
    """Tiles with a new block or a new shard, in a search of one tile for each pair of units."""
    release = len(run.table("scan", "release", UNITS))
    gallery = sum(len(run.table("scan", arm, UNITS)) for arm in ARMS)
    return blocks * gallery + (release - blocks) * shards


def test_every_layout_gives_what_brute_force_gives_and_the_same_bytes(
    session: None, plant: Plant, planted: Any, tiled: Tiled
) -> None:
    layouts = {
        "one shard a set": (),
        "unit by unit": (*UNIT_BY_UNIT, "search.in_flight=1", "search.shards.workers=2"),
        "mixed": (
            *("search.block_images=29", "search.shard_images=37", "search.engine=mixed", "search.in_flight=7"),
            "search.shards.workers=1",
        ),
        "ragged": ("search.block_images=40", "search.shard_images=20", "search.engine=faiss"),
    }
    made, tiles = {}, set()
    for at, (name, layout) in enumerate(layouts.items()):
        run = plant(*KEPT, *layout, name=name)
        search(run if at in (1, 2) else tiled(run))
        made[name] = parts_of(run)
        facts = run.commit("search", "coverage").facts
        tiles.add(facts["tiles"])
        assert facts["comparisons"] == {arm: planted.audited("release") * planted.audited(arm) for arm in ARMS}
        kinds = [path.name.split("-")[0] for path in (run.folder / "search").glob("*.parquet")]
        assert len(made[name]) == sum(kinds.count(kind) for kind in ("neighbours", "closest", "pairs", "scores"))
        if at == 0:
            agrees(run, planted, 4, 2, 0.4)
        if at in (1, 2):
            assert now(run) == (facts["tiles"], sum(facts["comparisons"].values()))
    assert len(tiles) == len(layouts)
    for name, own in made.items():
        assert own == made["one shard a set"], name


def test_lists_longer_than_a_set_and_pairs_from_the_lowest_floor(
    session: None, plant: Plant, planted: Any, tiled: Tiled
) -> None:
    run = tiled(plant("search.k=1000", "search.columns=1000", "search.floor=-1", "search.shard_images=34"))
    search(run)
    agrees(run, planted, 1000, 1000, -1.0)


def test_new_units_cost_only_the_tiles_that_they_are_in(
    session: None, plant: Plant, planted: Any, tiled: Tiled
) -> None:
    """The missing units stand in the middle and at the end, so that row numbers shift."""
    old = planted.without(release=1, training=4, control=0)
    gone = {"release": 1, "training": 4, "control": 0}
    fresh_size = {role: planted.audited(role) - old.audited(role) for role in gone}
    assert all(fresh_size.values())
    run = tiled(plant(*SMALL, sets=old))
    search(run)
    before = {path.name for path in (run.folder / "search").glob("tile-*.parquet")}
    run = plant(*SMALL)
    search(run)
    gallery = sum(planted.audited(arm) for arm in ARMS)
    grown = fresh_size["training"] + fresh_size["control"]
    made = {path.name for path in (run.folder / "search").glob("tile-*.parquet")} - before
    assert now(run) == (len(made), fresh_size["release"] * gallery + old.audited("release") * grown)
    agrees(run, planted, 4, 2, 0.4)
    assert parts_of(run) == fresh(plant, tiled, *SMALL, sets=planted, name="fresh")
    assert run.commit("search", "coverage").facts["tiles"] == len(run.table("search", "coverage", COVERAGE))


def test_a_removed_unit_costs_nothing_and_a_replaced_one_its_own_tiles(
    session: None, plant: Plant, planted: Any, tiled: Tiled
) -> None:
    options = (*KEPT, *UNIT_BY_UNIT)
    search(tiled(plant(*options)))
    states = [  # what a state lacks of the one before has its tiles already
        (planted.without(release=2, training=1), 0, 0),
        (planted.replaced("training", 0).without(control=1), 0, 1),
        (planted.replaced("release", 0).replaced("control", 2), 1, 1),
    ]
    for at, (sets, blocks, shards) in enumerate(states):
        run = plant(*options, sets=sets)
        tiles = set((run.folder / "search").glob("tile-*.parquet"))
        tiled(run)
        new = set((run.folder / "search").glob("tile-*.parquet")) - tiles
        assert len(new) == tiles_between(run, blocks, shards)
        search(run)
        assert now(run) == (0, 0)
        assert parts_of(run) == fresh(plant, tiled, *KEPT, sets=sets, name=f"fresh {at}")


def test_a_replaced_unit_is_searched_again_without_being_asked_for(
    searched: Plant, plant: Plant, planted: Any, tiled: Tiled
) -> None:
    """The search itself finds what is new, also where only stored vectors changed and no name did."""
    searched(*SMALL)
    run = plant(*SMALL, sets=planted.replaced("training", 2))
    unit = planted.units["training"][2]
    search(run)
    assert now(run) == (3, planted.audited("release") * int((~unit.failed).sum()))
    row = run.table("scan", "training", UNITS)["unit"][2].as_py()
    made, stored = unit_store(run).find(row), unit_store(run).read(row)
    valid = np.flatnonzero(np.asarray(stored["vector"].is_valid()))
    order = np.arange(len(stored))
    order[valid] = valid[::-1]
    column = stored["vector"].take(pa.array(order))
    other = stored.set_column(stored.schema.get_field_index("vector"), "vector", column)
    before = found(run, NEIGHBOURS, "training")
    unit_store(run).commit(row, other, contract=made.contract, key=made.key, facts=made.facts)
    search(tiled(run))
    again = found(run, NEIGHBOURS, "training")
    assert again != before and len(again) == len(before)


def test_another_floor_or_length_of_lists_is_another_search_in_the_same_folder(
    session: None, plant: Plant, planted: Any, tiled: Tiled
) -> None:
    for options in (("search.k=4",), ("search.k=3",), ("search.k=3", "search.floor=0.5")):
        run = plant(*SMALL, *options)
        tiles = set((run.folder / "search").glob("tile-*.parquet"))
        search(tiled(run))
        assert len(set((run.folder / "search").glob("tile-*.parquet")) - tiles) == 18
    agrees(run, planted, 3, 2, 0.5)
    agrees(plant(*SMALL, *options), planted, 3, 2, 0.5)


def test_a_second_search_does_nothing_and_lost_tiles_alone_are_searched_again(
    session: None, plant: Plant, planted: Any, caplog: pytest.LogCaptureFixture, tiled: Tiled
) -> None:
    caplog.set_level("INFO")
    run = tiled(plant(*SMALL))
    search(run)
    folder = run.folder / "search"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "search: nothing to do" not in caplog.text
    search(run)
    assert "search: nothing to do" in caplog.text and now(run) == (0, 0)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert run.ledger.record["stages"]["search"]["comparisons"] == run.commit("search", "coverage").facts["comparisons"]
    coverage = run.table("search", "coverage", COVERAGE)
    lost = coverage.take(pa.array([0, 8, 17]))
    for tile in lost["tile"].to_pylist():
        (folder / f"tile-{tile}.commit.json").unlink()
    for kind in ("neighbours", "pairs", "closest"):
        sorted(folder.glob(f"{kind}-*.commit.json"))[0].unlink()
    (folder / "coverage.commit.json").unlink()
    search(run)
    assert now(run) == (3, sum(lost["comparisons"].to_pylist()))
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    checked = {"sample.parquet", "sample.commit.json", "coverage.commit.json"}  # of a sample with a new tile in it
    assert {name for name in before if after[name] != before[name]} <= checked and set(after) == set(before)


def test_a_lost_part_is_made_again_from_the_tiles(searched: Plant) -> None:
    run = searched(*SMALL)
    before = parts_of(run)
    for kind in ("neighbours", "pairs", "closest"):
        sorted((run.folder / "search").glob(f"{kind}-*.commit.json"))[-1].unlink()
    with pytest.raises(IncompleteTable, match="no search/"):
        list(results(run, CLOSEST))
    search(run)
    assert now(run) == (0, 0) and parts_of(run) == before


@pytest.mark.parametrize("name", ["scores-coverage", "sample"])
def test_lost_score_counts_are_made_again(searched: Plant, name: str) -> None:
    run = searched(*SMALL)
    before = run.table("search", name, SCORES)
    (run.folder / "search" / f"{name}.commit.json").unlink()
    search(run)
    assert run.table("search", name, SCORES).equals(before)


def test_score_counts_that_a_killed_search_of_other_options_left_are_not_taken_for_those_of_this_one(
    searched: Plant,
) -> None:
    """Counts are committed before the list of tiles; a kill in between leaves the new counts with the old list."""
    run, other = searched(*SMALL), searched(*SMALL, "search.counts=all", name="other")
    before = run.table("search", "scores-coverage", SCORES)
    for path in (other.folder / "search").glob("scores-coverage.*"):
        shutil.copyfile(path, run.folder / "search" / path.name)
    assert not run.table("search", "scores-coverage", SCORES).equals(before)
    search(run)
    assert run.table("search", "scores-coverage", SCORES).equals(before)


def within(run: Run, contract: Table, role: str) -> Hits:
    table = pa.concat_tables(results(run, contract, f"within-{role}"))
    assert set(table["set"].to_pylist()) == {role}
    return list(zip(*(table[c].to_pylist() for c in ("row", "other_row", "cosine")), strict=True))


@pytest.mark.parametrize("options", [("search.counts=tail", "search.floor=0.405"), ("search.counts=all",)])
def test_a_set_is_searched_against_itself_without_its_images_finding_themselves(
    session: None, plant: Plant, planted: Any, tiled: Tiled, options: tuple[str, ...]
) -> None:
    """With more copies of a vector than neighbours are kept, and with failed images."""
    run = tiled(plant("search.k=3", *SMALL[2:], *options, "search.within=[training,release]"))
    floor = run.config.search.floor
    search(run)
    for role in ("training", "release"):
        scores = planted.cosines(role, role)
        assert ((scores > 0.999).sum(axis=1) > 4).any()
        near, pairs = within(run, WITHIN_NEIGHBOURS, role), within(run, WITHIN_PAIRS, role)
        assert near == planted.nearest(role, role, 3)
        assert pairs == [hit for hit in planted.above(role, role, floor) if hit[0] < hit[1]]
        for part in results(run, WITHIN_NEIGHBOURS, f"within-{role}"):
            starts = np.flatnonzero(np.diff(part["row"].to_numpy(), prepend=-1))
            ranks = np.concatenate([np.arange(1, n + 1) for n in np.diff([*starts, len(part)])] or [[]])
            assert part["rank"].to_pylist() == ranks.tolist()
        table = run.table("search", f"scores-within-{role}", SCORES)
        seen = scores[np.triu(np.isfinite(scores))]
        lowest = floor if "search.counts=tail" in options else -1.01
        edges = [edge for edge in histogram.EDGES.tolist() if edge >= lowest]
        assert table["cosine"].to_pylist() == edges
        assert table["pairs"].to_pylist() == [int((seen >= edge).sum()) for edge in edges]
        count = planted.audited(role)
        assert set(table["comparisons"].to_pylist()) == {count * (count - 1) // 2}
        assert set(table["basis"].to_pylist()) == {"all"} and set(table["arm"].to_pylist()) == {role}
        facts = run.ledger.record["stages"]["search"][f"within-{role}"]
        assert facts["comparisons"] == {role: count * count} and facts["certificate"]["outcome"] == "equal"


def test_a_set_asked_for_later_is_searched_alone_and_leaves_no_empty_parts(
    searched: Plant, plant: Plant, planted: Any
) -> None:
    searched(*SMALL)
    run = plant(*SMALL, "search.within=[anchor,anchor]")
    before = {path.name for path in (run.folder / "search").glob("*.parquet")}
    search(run)
    assert now(run) == (0, 0)
    facts = run.ledger.record["stages"]["search"]["within-anchor"]
    assert (facts["tiles_now"], facts["comparisons_now"]) == (1, planted.audited("anchor") ** 2)
    assert within(run, WITHIN_NEIGHBOURS, "anchor") == planted.nearest("anchor", "anchor", 4)
    made = {path.name.split("-")[0] for path in (run.folder / "search").glob("*.parquet") if path.name not in before}
    assert made == {"tile", "layout", "scores", "within_neighbours", "within_pairs", "within"}
    agrees(run, planted, 4, 2, 0.4)


def test_a_set_against_itself_does_not_depend_on_the_layout(session: None, plant: Plant, tiled: Tiled) -> None:
    made = []
    for name, layout in {"one": (), "two": UNIT_BY_UNIT, "three": (*SMALL[2:], "search.engine=mixed")}.items():
        run = tiled(plant("search.k=3", *layout, "search.within=[training]", name=name))
        search(run)
        made.append(parts_of(run, "within-training"))
    assert made[0] == made[1] == made[2] and len(made[0]) > 10


def test_an_unknown_set_to_search_within_is_named(plant: Plant) -> None:
    with pytest.raises(ConfigError, match=r"search\.within names 'galery'; the sets of this audit are release, train"):
        search(plant("search.within=[training,galery]"))


def test_results_within_a_set_that_was_not_searched_are_refused(session: None, plant: Plant, tiled: Tiled) -> None:
    search(tiled(plant(*SMALL, "search.within=[anchor]")))
    with pytest.raises(IncompleteTable, match="no search/within-training table yet"):
        next(results(plant(*SMALL, "search.within=[training]"), WITHIN_PAIRS, "within-training"))
    with pytest.raises(IncompleteTable, match="Run `unveil search` again"):
        next(results(plant(*SMALL), WITHIN_PAIRS, "within-anchor"))


def test_the_floor_is_a_little_below_the_threshold_of_the_training_set(
    session: None, plant: Plant, tiled: Tiled
) -> None:
    options = (*SMALL, "assess.fmr=0.1")
    run = plant(*options)
    threshold, _ = calibrate(run, set_columns(run, "training"))
    floor = np.floor((threshold.cosine - 0.05) * 100) / 100
    tiled(plant(*options, f"search.floor={floor}"))
    run = plant(*options, "search.floor=null")
    search(run)
    assert now(run) == (0, 0) and run.commit("search", "coverage").facts["floor"] == floor
    assert floor < threshold.cosine and min(hit[2] for hit in found(run, PAIRS, "training")) >= floor


def test_a_measured_floor_that_moves_a_little_needs_no_new_tiles_and_gives_the_bytes_of_a_new_search(
    session: None, plant: Plant, tiled: Tiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*SMALL, "search.floor=null")
    monkeypatch.setattr("pipeline.search._floor", lambda run: 0.41)
    search(plant(*options))
    for floor in (0.43, 0.39):
        monkeypatch.setattr("pipeline.search._floor", lambda run, floor=floor: floor)
        run = plant(*options)
        search(run)
        assert now(run) == (0, 0)
        monkeypatch.setattr("pipeline.search._floor", lambda run: run.config.search.floor)
        fresh = tiled(plant(*SMALL, f"search.floor={floor}", name=f"fresh{floor}"))
        search(fresh)
        monkeypatch.setattr("pipeline.search._floor", lambda run, floor=floor: floor)
        assert parts_of(run) == parts_of(fresh)
    monkeypatch.setattr("pipeline.search._floor", lambda run: 0.3)
    run = plant(*options)
    search(run)
    assert now(run)[0] > 0


def test_more_pairs_than_allowed_are_refused_not_cut(session: None, plant: Plant) -> None:
    run = plant("search.floor=-1", "search.max_pairs=50")
    with pytest.raises(CapacityError, match=r"search\.max_pairs is 50"):
        search(run)
    assert run.store.child("search").find("coverage") is None


def test_damaged_embeddings_are_refused_by_name(session: None, plant: Plant) -> None:
    run = plant()
    name = run.table("scan", "training", UNITS)["unit"][0].as_py()
    path = unit_store(run).root / f"{name}.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IncompleteTable, match=name):
        search(run)


def test_search_before_embed_says_what_to_run(configured: Callable[..., Any]) -> None:
    with Run(configured()) as run, pytest.raises(IncompleteTable, match="Run `unveil scan` first"):
        search(run)


def test_results_of_an_earlier_search_are_not_used_for_changed_sets(searched: Plant) -> None:
    """Row numbers of the old search would name other images of the new set."""
    run = searched(*SMALL)
    units = run.table("scan", "training", UNITS)
    run.save("scan", "training", UNITS, units.slice(1), key="changed")
    with pytest.raises(IncompleteTable, match=r"training set or its options have changed\. Run `unveil embed` again"):
        next(results(run, PAIRS))
    facts = run.commit("embed", "training").facts
    run.save(
        "embed", "training", REJECTS, REJECTS.from_rows([]), key=closing_key(run, units.slice(1)), **facts
    )  # fmt: skip
    with pytest.raises(IncompleteTable, match="Run `unveil search` again"):
        next(results(run, PAIRS))


def test_the_manifest_says_what_the_search_made(session: None, plant: Plant, tiled: Tiled) -> None:
    run = tiled(plant(*SMALL, "search.within=[anchor]"))
    search(run)
    facts = json.loads((run.folder / "run.json").read_text())["stages"]["search"]
    made = dict(run.commit("search", "coverage").facts)
    assert {name: facts[name] for name in made} == made
    assert facts["tiles_now"] == facts["within-anchor"]["tiles_now"] == 0 and facts["seconds"] >= 0


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("k", 0, "k must be at least 1"),
        ("block_images", 0, "block_images must be at least 1"),
        ("engine", "cuda?", "engine must be auto"),
        ("counts", "none", "counts must be tail or all"),
        ("columns", -1, "columns must not be negative"),
        ("floor", 1.0, "floor must be a cosine below 1"),
    ],
)
def test_options_that_make_no_search_are_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SearchConfig(**{name: value})
