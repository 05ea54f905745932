"""From tiles to the tables of a search: one part for each unit, in the row numbers of the sets.

A part is named by all that it depends on, and that is not how the sets were cut into tiles: whatever tiles there were,
in whatever order they came, the same vectors give the same bytes under the same names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.pool import bounded
from cluster.storage import Place, Store
from operators import neighbors, results
from operators.neighbors import EMPTY, Scored
from operators.results import Lists
from operators.tables import CLOSEST, NEIGHBOURS, PAIRS, WITHIN_NEIGHBOURS, WITHIN_PAIRS, Table
from pipeline.layout import Comparison, Grid, units_of
from pipeline.pieces import Piece, Unit
from pipeline.progress import Progress
from pipeline.stage import Run, fingerprint

Tables = Mapping[tuple[str, str], Scored]
"""What a tile row or column gives: for each arm and each of its lists (`nearest`, `closest` or `pairs`)."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The names of the parts of a comparison, by kind, in row order."""

    queries: Mapping[str, str]
    """Digest of the parts of each unit of queries, by the unit's content."""
    gallery: Mapping[str, Mapping[str, str]]
    """Digest of the part of each unit of each gallery set."""

    def names(self, comparison: Comparison) -> Iterator[tuple[str, Table]]:
        """Name and contract of every part."""
        per_query = (WITHIN_NEIGHBOURS, WITHIN_PAIRS) if comparison.within else (NEIGHBOURS, PAIRS)
        for contract in per_query:
            for digest in self.queries.values():
                yield f"{contract.name}-{digest}", contract
        if comparison.columns:
            for own in self.gallery.values():
                for digest in own.values():
                    yield f"{CLOSEST.name}-{digest}", CLOSEST


def parts(run: Run, comparison: Comparison) -> Parts:
    """The parts that belong to the sets, vectors and options as they are."""
    queries = units_of(run, comparison.queries)
    gallery = {role: units_of(run, role) for role in comparison.gallery}
    kept = (comparison.k, comparison.columns, comparison.floor, comparison.within)
    contracts = [one.contract for one in (NEIGHBOURS, PAIRS, CLOSEST, WITHIN_NEIGHBOURS, WITHIN_PAIRS)]
    against = fingerprint(contracts, kept, {role: _places(own) for role, own in gallery.items()})
    back = fingerprint(contracts, kept, comparison.queries, _places(queries))
    return Parts(
        queries={unit.content: fingerprint(against, comparison.queries, _places([unit])) for unit in queries},
        gallery={
            role: {unit.content: fingerprint(back, role, _places([unit])) for unit in own}
            for role, own in gallery.items()
        } if comparison.columns else {},
    )  # fmt: skip


def _places(units: Sequence[Unit]) -> list[tuple[str, int]]:
    return [(unit.content, unit.first_row) for unit in units]


def missing(run: Run, comparison: Comparison, wanted: Parts) -> bool:
    """Whether any part is not committed."""
    store = run.store.child("search")
    return any(store.find(name) is None for name, _ in wanted.names(comparison))


def merge(run: Run, grid: Grid, wanted: Parts) -> None:
    """Put the committed tiles of a grid together, and commit every part that is missing."""
    import ray

    root = run.store.child("search")
    task = ray.remote(num_cpus=0.5)(_merge)
    calls: list[Callable[[], Any]] = []
    for units, blocks in _groups(units_of(run, grid.comparison.queries), grid.blocks):
        names = [wanted.queries[unit.content] for unit in units]
        tiles = [(grid.key(block, shard), block, shard) for block in blocks for shard in grid.shards]
        calls.append(partial(task.remote, root, grid.comparison, units, names, tiles, over_rows=True))
    for role in grid.comparison.gallery if grid.comparison.columns else ():
        for units, shards in _groups(units_of(run, role), [one for one in grid.shards if one.role == role]):
            names = [wanted.gallery[role][unit.content] for unit in units]
            tiles = [(grid.key(block, shard), block, shard) for shard in shards for block in grid.blocks]
            calls.append(partial(task.remote, root, grid.comparison, units, names, tiles, over_rows=False))
    progress = Progress("merge", len(calls), "pieces")
    for _ in bounded(calls, run.config.search.in_flight):
        progress.add(1)
    progress.end()


def _groups(units: Sequence[Unit], pieces: Sequence[Piece]) -> Iterator[tuple[list[Unit], list[Piece]]]:
    """The units of a set by the piece that holds most of their images, and for each such group all pieces it is in."""
    owner_N = np.full(sum(unit.images for unit in units), -1)
    for at, piece in enumerate(pieces):
        for first, end in (span for unit in piece.units for span in unit.spans):
            owner_N[first:end] = at
    inside = [np.unique(owner_N[first:end], return_counts=True) for unit in units for first, end in unit.spans]
    most = [int(at[counts.argmax()]) for at, counts in inside]
    for own in dict.fromkeys(most):
        group = [place for place, other in enumerate(most) if other == own]
        needed = np.unique(np.concatenate([inside[place][0] for place in group]))
        yield [units[place] for place in group], [pieces[at] for at in needed.tolist() if at >= 0]


def _merge(
    root: Place,
    comparison: Comparison,
    units: Sequence[Unit],
    names: Sequence[str],
    tiles: Sequence[tuple[str, Piece, Piece]],
    *,
    over_rows: bool,
) -> None:
    """Commit the parts of some units of queries, or of one gallery set, from all tiles that they are in."""
    _, block, shard = tiles[0]
    store, role = Store(root), (block if over_rows else shard).role
    kinds = (NEIGHBOURS, PAIRS) if over_rows else (CLOSEST,)
    if over_rows and comparison.within:
        kinds = (WITHIN_NEIGHBOURS, WITHIN_PAIRS)
    if all(store.find(f"{kind.name}-{name}") is not None for kind in kinds for name in names):
        return
    firsts, sizes = [unit.first_row for unit in units], [unit.images for unit in units]
    rows = np.array([firsts, [first + size for first, size in zip(firsts, sizes, strict=True)]], np.int64)
    made = (_over_rows if over_rows else _over_columns)(store, comparison, rows, tiles)
    split = {of: list(results.split(scored, firsts, sizes)) for of, scored in made.items()}
    for at, name in enumerate(names):
        own = {of: per_unit[at] for of, per_unit in split.items()}
        for kind in kinds:
            table = _table(kind, comparison, role, own)
            store.commit(f"{kind.name}-{name}", kind.check(table), contract=kind.contract, key=name)


def _within(scored: Scored, rows: NDArray[np.int64]) -> Scored:
    """Results of the release rows that lie in one of the ranges `rows`, shape (2, N), ascending."""
    at = np.searchsorted(rows[0], scored.release, side="right") - 1
    inside = (at >= 0) & (scored.release < rows[1][at])
    return scored if inside.all() else scored.take(np.flatnonzero(inside))


def _over_rows(
    store: Store, comparison: Comparison, rows: NDArray[np.int64], tiles: Sequence[tuple[str, Piece, Piece]]
) -> Tables:
    """The best of every query, and all pairs over the floor, in each gallery set; both sorted by query."""
    nearest = {arm: Lists(comparison.kept[0]) for arm in comparison.gallery}
    pairs = dict.fromkeys(comparison.gallery, EMPTY)
    for key, block, shard in tiles:
        tile, places = _read(store, key), (block.places, shard.places)
        nearest[shard.role].add(_within(results.placed(tile.nearest, *places), rows))
        over = tile.pairs.take(np.flatnonzero(tile.pairs.cosine >= comparison.floor))
        own = _within(results.placed(over, *places), rows)
        pairs[shard.role] = neighbors.merged([pairs[shard.role], own])
    lists = {("nearest", arm): own.held for arm, own in nearest.items()}
    return lists | {("pairs", arm): results.by_release(own) for arm, own in pairs.items()}


def _over_columns(
    store: Store, comparison: Comparison, rows: NDArray[np.int64], tiles: Sequence[tuple[str, Piece, Piece]]
) -> Tables:
    """The best queries of every image of one gallery set; sides exchanged, so that they are sorted by gallery row."""
    lists = Lists(comparison.columns)
    for key, block, shard in tiles:
        turned = results.placed(_read(store, key).closest, block.places, shard.places).turned()
        lists.add(_within(turned, rows))
    return {("closest", tiles[0][2].role): lists.held}


def _read(store: Store, key: str) -> neighbors.Tile:
    return results.tile_of(store.read(f"tile-{key}"))


def _table(kind: Table, comparison: Comparison, role: str, own: Tables) -> pa.Table:
    """One part under its contract."""
    if kind is CLOSEST:
        return neighbors.closest_table([(role, own["closest", role].turned())])
    if kind is WITHIN_NEIGHBOURS:
        return results.within_neighbours_table(role, results.without_self(own["nearest", role], comparison.k))
    if kind is WITHIN_PAIRS:
        return results.within_pairs_table(role, results.each_once(own["pairs", role]))
    if kind is NEIGHBOURS:
        return neighbors.neighbours_table([(arm, own["nearest", arm]) for arm in comparison.gallery])
    return neighbors.pairs_table([(arm, neighbors.ordered(own["pairs", arm])) for arm in comparison.gallery])
