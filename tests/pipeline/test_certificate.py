"""The certificate sees a tile that is missing, of other images, or not what a plain product gives."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.faults import IncompleteTable
from operators import histogram
from operators.neighbors import Scored, Tile
from operators.results import tile_of, tile_table
from operators.tables import TILES
from pipeline.certificate import CertifyConfig, Checked, check_tile, sampled, sampled_counts, tile_facts
from pipeline.embed import unit_store
from pipeline.layout import Comparison, Grid, lay_out
from pipeline.pieces import Piece
from pipeline.search import search
from pipeline.stage import Run

Plant = Callable[..., Run]
Tiled = Callable[[Run], Run]
ARMS = ("training", "control", "anchor")
COMPARISON = Comparison(queries="release", gallery=ARMS, k=4, columns=2, floor=0.4)
SMALL = ("search.k=4", "search.columns=2", "search.block_images=30", "search.shard_images=34")
ALL = ("search.certify.tiles=1000", "search.certify.rows=1000")


def tampered(run: Run, key: str, change: Callable[[Tile], Tile], **facts: int) -> None:
    """Commit a tile again with other content, under a marker that fits it."""
    store = run.store.child("search")
    made = store.find(f"tile-{key}")
    table = tile_table(change(tile_of(store.read(f"tile-{key}"))))
    store.commit(f"tile-{key}", table, contract=TILES.contract, key=made.key, facts={**made.facts, **facts})


def checked(run: Run, tile: tuple[str, Piece, Piece], rows: int = 1000, seed: tuple[int, ...] = (0,)) -> Checked:
    return check_tile(str(unit_store(run).root), str(run.folder / "search"), COMPARISON, *tile, rows, seed)


def dropped(scored: Scored, at: int) -> Scored:
    return scored.take(np.delete(np.arange(len(scored.cosine)), at))


def nudged(scored: Scored, at: int) -> Scored:
    cosine = scored.cosine.copy()
    cosine[at] = np.nextafter(cosine[at], -2)
    return scored._replace(cosine=cosine)


def elsewhere(scored: Scored, at: int) -> Scored:
    """Another gallery image, or release image, in one place."""
    gallery = scored.gallery.copy()
    gallery[at] += 1
    return scored._replace(gallery=gallery)


def doubled(scored: Scored, at: int) -> Scored:
    return scored.take(np.insert(np.arange(len(scored.cosine)), at, at))


def middle(scored: Scored) -> int:
    return len(scored.cosine) // 2


CHANGES: dict[str, tuple[str, Callable[[Tile], Tile]]] = {
    "a cosine in the last place": ("nearest", lambda t: t._replace(nearest=nudged(t.nearest, middle(t.nearest)))),
    "a lost neighbour": ("nearest", lambda t: t._replace(nearest=dropped(t.nearest, -1))),
    "a neighbour twice": ("nearest", lambda t: t._replace(nearest=doubled(t.nearest, 0))),
    "another neighbour": ("nearest", lambda t: t._replace(nearest=elsewhere(t.nearest, 0))),
    "no neighbours": ("nearest", lambda t: t._replace(nearest=t.nearest.take(np.zeros(0, np.int64)))),
    "a lost closest image": ("closest", lambda t: t._replace(closest=dropped(t.closest, 0))),
    "another closest image": ("closest", lambda t: t._replace(closest=nudged(t.closest, -1))),
    "a lost pair": ("pairs", lambda t: t._replace(pairs=dropped(t.pairs, middle(t.pairs)))),
    "a pair's cosine": ("pairs", lambda t: t._replace(pairs=nudged(t.pairs, 0))),
    "a pair twice": ("pairs", lambda t: t._replace(pairs=doubled(t.pairs, -1))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tile_with_other_content_under_a_fitting_marker_is_seen(plant: Plant, tiled: Tiled, name: str) -> None:
    run = tiled(plant(*SMALL))
    tile = next(iter(lay_out(run, COMPARISON).tiles()))
    assert checked(run, tile).different == []
    part, change = CHANGES[name]
    tampered(run, tile[0], change)
    (different,) = checked(run, tile).different
    assert different.startswith(f"{part}: ")


def test_good_tiles_pass_and_their_comparisons_are_counted(plant: Plant, planted: Any, tiled: Tiled) -> None:
    run = tiled(plant(*SMALL))
    done = [checked(run, tile) for tile in lay_out(run, COMPARISON).tiles()]
    assert [what for one in done for what in one.different] == []
    assert len(done) == 3 * 6
    counts = sampled_counts(done)
    for arm in ARMS:
        scores = planted.cosines("release", arm)
        seen = scores[np.isfinite(scores)]
        assert sum(one.comparisons for one in done if one.arm == arm) == 2 * len(seen)
        assert np.array_equal(counts[arm], np.histogram(seen, histogram.EDGES)[0])


def test_a_sample_of_rows_is_checked_and_another_seed_takes_another(plant: Plant, tiled: Tiled) -> None:
    run = tiled(plant(*SMALL))
    tile = next(iter(lay_out(run, COMPARISON).tiles()))
    _, block, shard = tile
    few = checked(run, tile, rows=3)
    assert few.different == [] and few.comparisons == 3 * (block.audited + shard.audited)
    assert sum(few.counts) == 3 * shard.audited
    assert checked(run, tile, rows=3) == few
    assert len({tuple(checked(run, tile, 3, (seed,)).counts) for seed in range(8)}) > 1
    tampered(run, tile[0], lambda t: t._replace(nearest=dropped(t.nearest, 0)))
    found = [bool(checked(run, tile, 3, (seed,)).different) for seed in range(30)]
    assert any(found) and not all(found)


def test_the_oracle_takes_the_shard_in_chunks(plant: Plant, tiled: Tiled, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiled(plant(*SMALL))
    tile = next(iter(lay_out(run, COMPARISON).tiles()))
    whole = checked(run, tile)
    monkeypatch.setattr("pipeline.certificate.CHUNK", 7)
    assert checked(run, tile) == whole


def test_a_damaged_tile_is_refused_by_name_when_it_is_sampled(plant: Plant, tiled: Tiled) -> None:
    run = tiled(plant(*SMALL))
    tile = next(iter(lay_out(run, COMPARISON).tiles()))
    path = run.folder / "search" / f"tile-{tile[0]}.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(IncompleteTable, match=f"tile-{tile[0]}.parquet: bytes differ"):
        checked(run, tile)


@pytest.mark.ray
def test_a_search_with_a_wrong_tile_is_not_closed_and_the_tile_is_named(
    session: None, plant: Plant, tiled: Tiled
) -> None:
    run = tiled(plant(*SMALL, *ALL))
    key, _, shard = list(lay_out(run, COMPARISON).tiles())[4]
    tampered(run, key, CHANGES["a lost neighbour"][1])
    with pytest.raises(IncompleteTable) as caught:
        search(run)
    assert f"search/tile-{key}, {shard.role}: nearest" in str(caught.value)
    assert f"delete {run.folder / 'search'}, and run `unveil search` again" in str(caught.value)
    left = {path.name.split("-")[0] for path in (run.folder / "search").iterdir()}
    assert left == {"tile", "layout"}


@pytest.mark.ray
@pytest.mark.parametrize("side", ["queries", "gallery"])
def test_a_tile_of_other_images_is_refused_by_name_and_leaves_no_part_behind(
    session: None, plant: Plant, tiled: Tiled, side: str
) -> None:
    """A tile made before some of its images were there: its lists are good for what it saw."""
    run, fresh = tiled(plant(*SMALL)), tiled(plant(*SMALL, name="fresh"))
    grid = lay_out(run, COMPARISON)
    sample = {key for key, _, _ in sampled(grid, run.config.search.certify, run.config.search.certify.seed)}
    key, block, shard = next(tile for tile in grid.tiles() if tile[0] not in sample and tile[2].role == "training")
    seen = {"queries": block.audited, "gallery": shard.audited}
    seen[side] -= 1
    tampered(run, key, CHANGES["no neighbours"][1], **seen)
    with pytest.raises(IncompleteTable) as caught:
        search(run)
    wrong = (seen["queries"], seen["gallery"])
    assert f"tile-{key} saw {wrong} of {block.audited} x {shard.audited} audited images. Delete it" in str(caught.value)
    assert run.store.child("search").find("coverage") is None
    (run.folder / "search" / f"tile-{key}.commit.json").unlink()
    tiled(run)
    search(run)
    search(fresh)
    assert {path.name: path.read_bytes() for path in (run.folder / "search").glob("*.parquet")} == {
        path.name: path.read_bytes() for path in (fresh.folder / "search").glob("*.parquet")
    }


def test_a_lost_tile_is_refused_by_name(plant: Plant, tiled: Tiled) -> None:
    run = tiled(plant(*SMALL))
    grid = lay_out(run, COMPARISON)
    assert len(list(tile_facts(run, grid))) == 18
    key = list(grid.tiles())[7][0]
    (run.folder / "search" / f"tile-{key}.commit.json").unlink()
    with pytest.raises(IncompleteTable, match=f"tile-{key} saw None of"):
        list(tile_facts(run, grid))


def test_a_unit_in_two_pieces_is_refused(plant: Plant) -> None:
    grid = lay_out(plant(*SMALL), COMPARISON)
    twice = replace(grid.shards[1], units=(*grid.shards[1].units, grid.shards[0].units[0]))
    bad = replace(grid, shards=[grid.shards[0], twice, *grid.shards[2:]])
    with pytest.raises(IncompleteTable, match=f"unit {grid.shards[0].units[0].name} of the training set is in several"):
        list(tile_facts(plant(*SMALL), bad))


@pytest.mark.parametrize(("tiles", "taken"), [(1, 3), (3, 3), (5, 5), (1000, 18)])
def test_sampled_tiles_are_different_ones_and_of_every_set(plant: Plant, tiles: int, taken: int) -> None:
    grid: Grid = lay_out(plant(*SMALL), COMPARISON)
    for seed in range(10):
        chosen = sampled(grid, CertifyConfig(tiles=tiles), seed)
        assert {shard.role for _, _, shard in chosen} == set(ARMS)
        assert len({key for key, _, _ in chosen}) == len(chosen) == taken
        assert chosen == sampled(grid, CertifyConfig(tiles=tiles), seed)


def test_every_tile_can_be_sampled(plant: Plant) -> None:
    grid = lay_out(plant(*SMALL), COMPARISON)
    seen = Counter(key for seed in range(200) for key, _, _ in sampled(grid, CertifyConfig(tiles=4), seed))
    assert set(seen) == {key for key, _, _ in grid.tiles()}


@pytest.mark.parametrize(("name", "value"), [("tiles", 0), ("rows", 0), ("seed", -1)])
def test_a_certificate_of_nothing_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at least \d\. Got {value}\."):
        CertifyConfig(**{name: value})
