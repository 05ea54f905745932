"""What a search actor does, in this process: each tile is what NumPy finds in a block against a shard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.storage import Store
from operators import histogram
from operators.engines import Wanted
from operators.errors import CapacityError
from operators.results import tile_of
from operators.tables import TILES
from pipeline.embed import unit_store
from pipeline.layout import units_of
from pipeline.pieces import Piece, pieces
from pipeline.stage import Run
from pipeline.tiles import ShardActor, read_piece

Plant = Callable[..., Run]
WANTED = Wanted(4, 2, 0.4)


def piece_of(run: Run, role: str, *chosen: int) -> Piece:
    return Piece(role=role, units=tuple(units_of(run, role)[at] for at in chosen))


def actor(run: Run, target: Path, engine: str = "faiss") -> ShardActor:
    return ShardActor(str(unit_store(run).root), str(target), engine, WANTED, 2)


def cosines(planted: Any, block: tuple[int, ...], shard: tuple[int, ...]) -> np.ndarray:
    """All cosines of a block of the release with a shard of the training set, by places in the pieces."""
    scores = planted.cosines("release", "training")
    rows, columns = (
        np.concatenate([np.array(planted.rows(role)[at]) for at in chosen])
        for role, chosen in (("release", block), ("training", shard))
    )
    return scores[np.ix_(rows, columns)]


def lists(scores: np.ndarray, k: int) -> list[tuple[int, int, float]]:
    found = []
    for row, own in enumerate(scores):
        usable = np.flatnonzero(np.isfinite(own))
        order = usable[np.argsort(-own[usable], kind="stable")][:k]
        found += [(row, other, own[other]) for other in order.tolist()]
    return found


def test_a_piece_is_read_with_the_places_of_its_audited_images(plant: Plant, planted: Any) -> None:
    run = plant()
    places, stored = read_piece(str(unit_store(run).root), piece_of(run, "training", 3, 0, 4))
    own = [planted.units["training"][at] for at in (3, 0, 4)]
    good = ~np.concatenate([unit.failed for unit in own])
    assert places.tolist() == np.flatnonzero(good).tolist() and 0 < len(places) < len(good)
    assert np.array_equal(stored, np.concatenate([unit.vectors for unit in own])[good])


@pytest.mark.parametrize("engine", ["faiss", "mixed"])
@pytest.mark.parametrize("counts", ["tail", "all"])
def test_a_tile_holds_what_numpy_finds_and_says_what_it_saw(
    plant: Plant, planted: Any, tmp_path: Path, engine: str, counts: str
) -> None:
    run, store = plant(), Store(tmp_path / "tiles")
    block, shard = piece_of(run, "release", 4, 1), piece_of(run, "training", 1, 2)
    root = str(unit_store(run).root)
    made = actor(run, store.root, engine).tile("key", shard, read_piece(root, block), 10_000, counts)
    scores = cosines(planted, (4, 1), (1, 2))
    tile, marker = tile_of(store.read("tile-key")), store.find("tile-key")
    assert list(zip(*(part.tolist() for part in tile.nearest), strict=True)) == lists(scores, 4)
    back = [(row, place, cosine) for place, row, cosine in lists(scores.T, 2)]
    assert list(zip(*(part.tolist() for part in tile.closest), strict=True)) == back
    with np.errstate(invalid="ignore"):
        over = np.argwhere(scores >= 0.4)
    pairs = sorted(((r, g, scores[r, g]) for r, g in over.tolist()), key=lambda pair: (-pair[2], *pair[:2]))
    assert list(zip(*(part.tolist() for part in tile.pairs), strict=True)) == pairs
    assert marker.contract == TILES.contract and marker.key == "key"
    assert (marker.facts["queries"], marker.facts["gallery"]) == (block.audited, shard.audited)
    assert made == block.audited * shard.audited == np.isfinite(scores).sum()
    seen = scores[np.isfinite(scores)]
    counted = seen if counts == "all" else seen[seen >= 0.4]
    assert marker.facts["counts"] == np.histogram(counted, histogram.EDGES)[0].tolist()
    assert marker.facts["engine"]["engine"] == engine


def test_a_tile_has_the_same_bytes_whatever_engine_made_it_and_whatever_was_searched_before(
    plant: Plant, tmp_path: Path
) -> None:
    run = plant()
    root = str(unit_store(run).root)
    block, shard, other = piece_of(run, "release", 0), piece_of(run, "training", 2), piece_of(run, "control", 0)
    for engine in ("faiss", "mixed"):
        actor(run, tmp_path / engine, engine).tile("key", shard, read_piece(root, block), 10_000, "tail")
    busy = actor(run, tmp_path / "busy")
    for key, own in (("one", other), ("two", shard), ("three", other), ("key", shard)):
        busy.tile(key, own, read_piece(root, block), 10_000, "tail")
    made = {(tmp_path / folder / "tile-key.parquet").read_bytes() for folder in ("faiss", "mixed", "busy")}
    assert len(made) == 1


@pytest.mark.parametrize("counts", ["tail", "all"])
@pytest.mark.parametrize("empty", ["release", "training"])
def test_a_piece_without_any_vector_gives_an_empty_tile(plant: Plant, tmp_path: Path, empty: str, counts: str) -> None:
    run, store = plant(), Store(tmp_path / "tiles")
    block = piece_of(run, "release", 3 if empty == "release" else 0)
    shard = piece_of(run, "control", 1 if empty == "training" else 0)
    made = actor(run, store.root).tile("key", shard, read_piece(str(unit_store(run).root), block), 10_000, counts)
    marker = store.find("tile-key")
    assert made == 0 and len(store.read("tile-key")) == 0 and sum(marker.facts["counts"]) == 0
    assert (marker.facts["queries"] == 0, marker.facts["gallery"] == 0) == (empty == "release", empty == "training")
    assert marker.facts["engine"]["engine"] == ("faiss" if empty == "release" else "none")


def test_a_tile_with_too_many_pairs_is_not_committed(plant: Plant, tmp_path: Path) -> None:
    run, store = plant(), Store(tmp_path / "tiles")
    block = read_piece(str(unit_store(run).root), piece_of(run, "release", 0))
    shard = piece_of(run, "training", 2)
    with pytest.raises(CapacityError, match=r"search\.max_pairs is 3"):
        actor(run, store.root).tile("key", shard, block, 3, "tail")
    assert store.find("tile-key") is None


def test_units_of_a_set_are_cut_as_they_are_listed(plant: Plant) -> None:
    run = plant()
    made = pieces("training", units_of(run, "training"), 34)
    assert [[unit.images for unit in piece.units] for piece in made] == [[18, 16], [30], [11, 15]]
