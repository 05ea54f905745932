"""How a comparison of two sets is cut into tiles: a block of queries against a shard of the gallery.

A piece (block or shard) is a list of units in row order, named by the stored vectors of its units, not by where they
stand in the set. The cut of the last search is kept wherever its units are still there, so that new units form new
pieces and only tiles with them are new. No result depends on the cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.faults import IncompleteTable
from operators.results import Places
from operators.tables import TILES, UNITS, Table
from pipeline.embed import closed, unit_store
from pipeline.stage import Run, fingerprint

LAYOUT = Table(
    name="layout",
    version=1,
    schema=pa.schema(
        [
            pa.field("side", pa.string()),  # queries or gallery
            pa.field("set", pa.string()),
            pa.field("piece", pa.int64()),
            pa.field("content", pa.string()),  # of one unit, in row order
        ]
    ),
)

ROOM = 0.02
"""How far the floor of tiles lies below that of results, and how far it may be off: the measured threshold moves a
little when the training set grows, and old tiles shall serve then too."""

Cut = Mapping[tuple[str, str], Sequence[tuple[str, ...]]]
"""For each (side, set) the contents of the units of every piece."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One embedded unit of a set."""

    name: str
    content: str
    """SHA-256 of its embeddings as stored."""
    first_row: int
    images: int
    audited: int
    """Images with a vector."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Units of one set in row order: a shard of the gallery or a block of queries."""

    role: str
    units: tuple[Unit, ...]

    @cached_property
    def name(self) -> str:
        """Digest of the stored vectors and of the place of each."""
        return fingerprint([(unit.content, unit.images) for unit in self.units])

    @property
    def content(self) -> tuple[str, ...]:
        """What the units hold."""
        return tuple(unit.content for unit in self.units)

    @property
    def audited(self) -> int:
        """Images that take part."""
        return sum(unit.audited for unit in self.units)

    @property
    def places(self) -> Places:
        """Where its units begin in the piece, and in the set."""
        sizes = [unit.images for unit in self.units]
        offsets = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
        return Places(offsets, np.array([unit.first_row for unit in self.units], np.int64))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A set of queries against gallery sets: release against all arms, a set against itself, or another pair."""

    queries: str
    gallery: tuple[str, ...]
    k: int
    columns: int
    floor: float
    """All pairs from this cosine up are results."""
    tile_floor: float | None = None
    """All pairs from this cosine up are in tiles; not above `floor`. None: from `floor` up."""
    fixed: bool = False
    """Whether the floor is set beforehand, so that tiles need no room below a floor that is measured."""

    @property
    def main(self) -> bool:
        """The release against all arms."""
        return self.queries == "release" and not self.within

    @property
    def within(self) -> bool:
        """A set against itself."""
        return self.gallery == (self.queries,)

    @property
    def title(self) -> str:
        """How this comparison's coverage is called."""
        if self.main:
            return "coverage"
        return f"within-{self.queries}" if self.within else f"{self.queries}-{'-'.join(self.gallery)}"

    @property
    def kept(self) -> tuple[int, int, float]:
        """`k`, `columns` and floor of its tiles. A set against itself needs one more: an image finds itself."""
        floor = self.floor if self.tile_floor is None else self.tile_floor
        return (self.k + 1, 0, floor) if self.within else (self.k, self.columns, floor)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All tiles of a comparison."""

    comparison: Comparison
    blocks: Sequence[Piece]
    shards: Sequence[Piece]
    counts: str
    """Whether tiles count the scores of `all` comparisons or of the `tail` only."""

    def key(self, block: Piece, shard: Piece) -> str:
        """Name of a tile: every stored vector and all that is kept of it, and not the sets that it belongs to."""
        return fingerprint(TILES.contract, block.name, shard.name, self.comparison.kept, self.counts)

    def tiles(self) -> Iterator[tuple[str, Piece, Piece]]:
        """Name, block and shard of every tile, block by block."""
        for block in self.blocks:
            for shard in self.shards:
                yield self.key(block, shard), block, shard


def units_of(run: Run, role: str) -> list[Unit]:
    """The embedded units of a set in row order.

    Raises
    ------
    IncompleteTable
        If the set is not embedded as it is now listed and configured.
    """
    table = run.table("scan", role, UNITS)
    closed(run, role, table)
    store = unit_store(run)
    found = []
    sizes = pc.list_value_length(table["members"]).to_pylist()
    for name, first, size in zip(table["unit"].to_pylist(), table["first_row"].to_pylist(), sizes, strict=True):
        made = store.find(name)
        if made is None:
            raise IncompleteTable(f"{store.address}: unit {name} is not embedded. Run `unveil embed` again.")
        audited = made.facts["status"].get("ok", 0)
        found.append(Unit(name=name, content=made.sha256, first_row=first, images=size, audited=audited))
    return sorted(found, key=lambda unit: unit.first_row)


def pieces(role: str, units: Sequence[Unit], images: int, earlier: Sequence[tuple[str, ...]] = ()) -> list[Piece]:
    """Cut a set into pieces of at most `images` images, unless one unit alone is larger; each unit is in one piece.

    Pieces of an `earlier` cut are kept if their units are all there in the same order; the rest is cut anew.
    """
    left = {unit.content: unit for unit in units}
    kept = []
    for contents in earlier:
        own = tuple(left[content] for content in contents if content in left)
        rows = [unit.first_row for unit in own]
        if len(own) == len(contents) and rows == sorted(rows):
            kept.append(Piece(role=role, units=own))
            for content in contents:
                del left[content]
    held: list[Unit] = []
    for unit in left.values():
        if held and sum(one.images for one in held) + unit.images > images:
            kept.append(Piece(role=role, units=tuple(held)))
            held = []
        held.append(unit)
    if held:
        kept.append(Piece(role=role, units=tuple(held)))
    return sorted(kept, key=lambda piece: piece.units[0].first_row)


def lay_out(run: Run, comparison: Comparison) -> Grid:
    """The tiles of a comparison, with the cut of the last search where it still fits."""
    options = run.config.search
    comparison = replace(comparison, tile_floor=_tile_floor(run, comparison))
    earlier = _earlier(run, comparison)
    blocks = _cut(run, comparison.queries, "queries", options.block_images, earlier)
    shards = [
        piece for role in comparison.gallery for piece in _cut(run, role, "gallery", options.shard_images, earlier)
    ]
    return Grid(comparison=comparison, blocks=blocks, shards=shards, counts=options.counts)


def _tile_floor(run: Run, comparison: Comparison) -> float:
    """The floor that is asked for; where it is measured, that of the last tiles if they still serve, or a lower one."""
    if comparison.fixed or run.config.search.floor is not None:
        return comparison.floor
    made = run.store.child("search").find(f"layout-{comparison.title}")
    earlier: float = made.facts["floor"] if made is not None and made.contract == LAYOUT.contract else 2.0
    if comparison.floor - 2 * ROOM - 1e-9 <= earlier <= comparison.floor:
        return earlier
    return round(comparison.floor - ROOM, 2)


def _cut(run: Run, role: str, side: str, images: int, earlier: Cut) -> list[Piece]:
    return pieces(role, units_of(run, role), images, earlier.get((side, role), ()))


def _sizes(run: Run) -> list[int]:
    return [run.config.search.block_images, run.config.search.shard_images]


def _earlier(run: Run, comparison: Comparison) -> Cut:
    """The cut of the last search of this comparison, if it was made for pieces of the same sizes."""
    name = f"layout-{comparison.title}"
    made = run.store.child("search").find(name)
    if made is None or made.contract != LAYOUT.contract or made.facts["images"] != _sizes(run):
        return {}
    cut: dict[tuple[str, str], dict[int, list[str]]] = {}
    for row in run.table("search", name, LAYOUT).to_pylist():
        cut.setdefault((row["side"], row["set"]), {}).setdefault(row["piece"], []).append(row["content"])
    return {of: [tuple(contents) for contents in own.values()] for of, own in cut.items()}


def keep_layout(run: Run, grid: Grid) -> None:
    """Commit the cut, for this search to be resumed and for the next one to build on."""
    rows = [
        {"side": side, "set": piece.role, "piece": at, "content": content}
        for side, own in (("queries", grid.blocks), ("gallery", grid.shards))
        for at, piece in enumerate(own)
        for content in piece.content
    ]
    facts = {"images": _sizes(run), "floor": grid.comparison.kept[2]}
    key = fingerprint(LAYOUT.contract, rows, facts)
    name = f"layout-{grid.comparison.title}"
    made = run.store.child("search").find(name)
    if made is None or made.key != key:
        run.save("search", name, LAYOUT, LAYOUT.from_rows(rows), key=key, **facts)
