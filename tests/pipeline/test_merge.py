"""Parts are named by all that they depend on, and their bytes do not depend on the tiles they come from."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cluster.faults import IncompleteTable
from operators.tables import CLOSEST, NEIGHBOURS, PAIRS, WITHIN_NEIGHBOURS, WITHIN_PAIRS
from pipeline.layout import Comparison, Grid, lay_out
from pipeline.merge import Parts, merge, missing, parts
from pipeline.stage import Run

pytestmark = pytest.mark.ray
Plant = Callable[..., Run]
Tiled = Callable[[Run], Run]
ARMS = ("training", "control", "anchor")
COMPARISON = Comparison(queries="release", gallery=ARMS, k=4, columns=2, floor=0.4)
SMALL = ("search.k=4", "search.columns=2", "search.block_images=30", "search.shard_images=34")


def digests(own: Parts) -> set[str]:
    return {*own.queries.values(), *(one for of in own.gallery.values() for one in of.values())}


def committed(run: Run, comparison: Comparison, wanted: Parts) -> dict[str, bytes]:
    folder = run.folder / "search"
    return {name: (folder / f"{name}.parquet").read_bytes() for name, _ in wanted.names(comparison)}


def test_there_is_a_part_of_each_kind_for_each_unit(plant: Plant, planted: Any) -> None:
    names = [(kind, name) for name, kind in parts(plant(), COMPARISON).names(COMPARISON)]
    release = len(planted.units["release"])
    kinds = [NEIGHBOURS] * release + [PAIRS] * release + [CLOSEST] * sum(len(planted.units[arm]) for arm in ARMS)
    assert [kind for kind, _ in names] == kinds
    assert len({name for _, name in names}) == len(names)
    assert all(name.startswith(f"{kind.name}-") for kind, name in names)


def test_no_columns_are_no_closest_parts(plant: Plant) -> None:
    none = replace(COMPARISON, columns=0)
    assert {kind.name for _, kind in parts(plant(), none).names(none)} == {"neighbours", "pairs"}


def test_a_set_against_itself_has_parts_of_its_own_kinds(plant: Plant) -> None:
    within = Comparison(queries="training", gallery=("training",), k=4, columns=0, floor=0.4)
    kinds = {kind.name for _, kind in parts(plant(), within).names(within)}
    assert kinds == {WITHIN_NEIGHBOURS.name, WITHIN_PAIRS.name}


def test_names_of_parts_do_not_depend_on_the_layout_or_the_engine(plant: Plant) -> None:
    assert parts(plant(), COMPARISON) == parts(plant(*SMALL, "search.engine=mixed", name="other"), COMPARISON)


@pytest.mark.parametrize("change", [{"k": 5}, {"columns": 3}, {"floor": 0.5}, {"gallery": ("training", "control")}])
def test_other_options_are_other_parts(plant: Plant, change: dict[str, Any]) -> None:
    run = plant()
    one, other = digests(parts(run, COMPARISON)), digests(parts(run, replace(COMPARISON, **change)))
    shared = {digest for arm in ("training", "control") for digest in parts(run, COMPARISON).gallery[arm].values()}
    assert one & other == (shared if "gallery" in change else set())


def test_a_part_keeps_its_name_if_nothing_changed_that_it_depends_on(plant: Plant, planted: Any) -> None:
    """Lists of an image depend on its own row and on the other side, and not on the other images of its set."""
    before = parts(plant(), COMPARISON)
    after = parts(plant(sets=planted.replaced("training", 2)), COMPARISON)
    assert not set(before.queries.values()) & set(after.queries.values())
    assert before.gallery["control"] == after.gallery["control"]
    old, new = (list(one.gallery["training"].values()) for one in (before, after))
    assert [left == right for left, right in zip(old, new, strict=True)] == [True, True, False, True, True]
    moved = parts(plant(sets=planted.without(training=2)), COMPARISON)
    unmoved = set(old) & set(moved.gallery["training"].values())
    assert unmoved == set(old[:2])
    release = parts(plant(sets=planted.replaced("release", 0)), COMPARISON)
    assert list(before.queries.values())[1:] == list(release.queries.values())[1:]
    assert len(digests(before) & digests(release)) == len(planted.units["release"]) - 1


def test_merged_tiles_give_the_same_bytes_in_any_order_and_nothing_twice(
    session: None, plant: Plant, tiled: Tiled
) -> None:
    one, other = tiled(plant(*SMALL)), tiled(plant(*SMALL[:2], name="other"))
    grid, wanted = lay_out(one, COMPARISON), parts(one, COMPARISON)
    assert missing(one, COMPARISON, wanted)
    turned = Grid(comparison=COMPARISON, blocks=grid.blocks[::-1], shards=grid.shards[::-1], counts="tail")
    merge(one, turned, wanted)
    merge(other, lay_out(other, COMPARISON), wanted)
    assert not missing(one, COMPARISON, wanted)
    first = committed(one, COMPARISON, wanted)
    assert first == committed(other, COMPARISON, wanted)
    folder = one.folder / "search"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    lost = next(name for name, kind in wanted.names(COMPARISON) if kind is PAIRS)
    (folder / f"{lost}.commit.json").unlink()
    assert missing(one, COMPARISON, wanted)
    merge(one, grid, wanted)
    assert committed(one, COMPARISON, wanted) == first
    written = {name for name, at in times.items() if (folder / name).stat().st_mtime_ns != at}
    block = next(block for block in grid.blocks if f"pairs-{wanted.queries[block.content[0]]}" == lost)
    own = {f"{kind}-{wanted.queries[content]}" for kind in ("neighbours", "pairs") for content in block.content}
    assert written == {f"{name}{ending}" for name in own for ending in (".parquet", ".commit.json")}


def test_a_damaged_or_lost_tile_is_refused_by_name(session: None, plant: Plant, tiled: Tiled) -> None:
    run = tiled(plant(*SMALL))
    grid, wanted = lay_out(run, COMPARISON), parts(run, COMPARISON)
    key = [key for key, _, _ in grid.tiles()][3]
    path = run.folder / "search" / f"tile-{key}.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IncompleteTable, match=f"tile-{key}.parquet: bytes differ"):
        merge(run, grid, wanted)
    path.with_name(f"tile-{key}.commit.json").unlink()
    with pytest.raises(IncompleteTable, match=f"tile-{key}.parquet: not committed"):
        merge(run, grid, wanted)
