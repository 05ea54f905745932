"""Images added anywhere in a set leave the tiles of all others as they are, and change no byte of the results."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from pipeline.embed import unit_store
from pipeline.layout import Comparison, keep_layout, lay_out, units_of
from pipeline.pieces import Piece, Segment, Unit, pieces
from pipeline.search import finished, search
from pipeline.stage import Run
from pipeline.tiles import read_piece

Plant = Callable[..., Run]
ARMS = ("training", "control", "anchor")
COMPARISON = Comparison(queries="release", gallery=ARMS, k=4, columns=2, floor=0.4)
SMALL = ("search.k=4", "search.columns=2", "search.block_images=30", "search.shard_images=34")


def thinned(planted: Any, seed: int, **share: float) -> Any:
    """The sets without some images of each unit, chosen at random by set."""
    rng, made = np.random.default_rng(seed), {}
    for role, own in planted.units.items():
        made[role] = tuple(without(unit, rng.random(len(unit.keys)) < share.get(role, 0)) for unit in own)
    return replace(planted, units=made)


def without(unit: Any, gone: np.ndarray) -> Any:
    keys = tuple(key for key, left in zip(unit.keys, ~gone, strict=True) if left)
    return replace(unit, keys=keys, vectors=unit.vectors[~gone], failed=unit.failed[~gone])


def rows(pieces_: list[Piece]) -> list[int]:
    return sorted(row for one in pieces_ for unit in one.units for span in unit.spans for row in range(*span))


def cut(run: Run) -> tuple[list[Piece], list[Piece]]:
    made = lay_out(run, COMPARISON)
    keep_layout(run, made)
    return list(made.blocks), list(made.shards)


def test_scattered_new_images_form_pieces_of_their_own_over_several_rounds(plant: Plant, planted: Any) -> None:
    share = {"release": 0.2, "training": 0.3}
    first, second = thinned(thinned(planted, 1, **share), 2, **share), thinned(planted, 1, **share)
    was = cut(plant(*SMALL, sets=first, name="kept"))
    for sets in (second, planted):
        run = plant(*SMALL, sets=sets, name="kept")
        now = cut(run)
        for old, new in zip(was, now, strict=True):
            assert {piece.name for piece in old} < {piece.name for piece in new}
        for role, own in (("release", now[0]), *((arm, [p for p in now[1] if p.role == arm]) for arm in ARMS)):
            assert rows(own) == list(range(sum(unit.images for unit in units_of(run, role))))
            assert sum(piece.audited for piece in own) == sets.audited(role)
            stored = np.concatenate([unit.vectors for unit in sets.units[role]])
            for piece in own:
                places, vectors = read_piece(unit_store(run), piece)
                at = piece.places.rows(places)
                assert len(at) == piece.audited and (np.diff(at) > 0).all()
                assert np.array_equal(vectors, stored[at])
        was = now


def test_a_piece_with_a_removed_or_changed_image_is_cut_anew(plant: Plant, planted: Any) -> None:
    blocks, _ = cut(plant(*SMALL, sets=planted, name="kept"))
    gone = np.zeros(len(planted.units["release"][2].keys), bool)
    gone[5] = True
    own = list(planted.units["release"])
    own[2] = without(own[2], gone)
    fewer, _ = cut(plant(*SMALL, sets=replace(planted, units={**planted.units, "release": tuple(own)}), name="kept"))
    kept = {piece.name for piece in blocks} & {piece.name for piece in fewer}
    assert kept == {piece.name for piece in blocks if own[2].keys[0] not in keys_of(piece, planted)}
    changed, _ = cut(plant(*SMALL, sets=planted.replaced("release", 4), name="kept"))
    assert {p.name for p in blocks if 4 in units_in(p, planted)} & {p.name for p in changed} == set()


def units_in(piece: Piece, planted: Any) -> set[int]:
    firsts = [own.start for own in planted.rows("release")]
    return {firsts.index(unit.first_row) for unit in piece.units}


def keys_of(piece: Piece, planted: Any) -> list[str]:
    return [key for at in units_in(piece, planted) for key in planted.units["release"][at].keys]


def test_a_unit_that_left_the_store_is_not_carried(plant: Plant, planted: Any) -> None:
    few = thinned(planted, 1, release=0.3)
    run = plant(*SMALL, sets=few, name="kept")
    blocks, _ = cut(run)
    unit_store(run).forget(f"{blocks[0].units[0].name}.commit.json")
    now, _ = cut(plant(*SMALL, sets=planted, name="kept"))
    assert blocks[0].name not in {piece.name for piece in now}
    assert {piece.name for piece in blocks[1:]} <= {piece.name for piece in now}


def test_what_is_named_twice_by_an_earlier_cut_is_kept_once() -> None:
    own = [Unit(name=name, content=name, first_row=row, images=3, audited=3) for row, name in ((0, "a"), (3, "b"))]
    made = pieces("training", own, 9, [(Segment("a"),), (Segment("a"), Segment("b"))])
    assert [piece.content for piece in made] == [("a",), ("b",)]


@pytest.mark.ray
def test_scattered_new_images_cost_their_own_comparisons_and_change_no_byte(
    session: None, plant: Plant, planted: Any, tiled: Callable[[Run], Run]
) -> None:
    share = {"release": 0.1, "training": 0.1, "control": 0.1}
    few = thinned(planted, 3, **share)
    within = "search.within=[training]"
    for sets in (thinned(few, 4, **share), few):
        tiled(plant(*SMALL, within, sets=sets, name="kept"))
    run = plant(*SMALL, within, sets=planted, name="kept")
    search(run)
    facts = run.ledger.record["stages"]["search"]
    old = sum(few.audited("release") * few.audited(arm) for arm in ARMS)
    assert facts["comparisons_now"] == sum(facts["comparisons"].values()) - old
    old = few.audited("training") ** 2
    assert facts["within-training"]["comparisons_now"] == planted.audited("training") ** 2 - old
    fresh = tiled(plant(*SMALL, within, sets=planted, name="fresh"))
    search(fresh)
    for title in ("coverage", "within-training"):
        comparison, wanted = finished(fresh, title)
        names = [*(name for name, _ in wanted.names(comparison)), f"scores-{title}"]
        one, two = ([(r.folder / "search" / f"{name}.parquet").read_bytes() for name in names] for r in (run, fresh))
        assert one == two
    tiles = run.commit("search", "coverage").facts["tiles"]
    assert tiles > fresh.commit("search", "coverage").facts["tiles"]
    assert all(first < second for first, second in pairwise(sorted(rows(list(lay_out(run, COMPARISON).blocks)))))
