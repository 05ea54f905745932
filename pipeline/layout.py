"""How a comparison of two sets is cut into tiles: a block of queries against a shard of the gallery.

The cut of the last search is kept wherever its images are still there with the vectors that they had, even if they are
listed in other units now (`pipeline.carried`), so that what is new forms pieces of its own and only tiles with these
are new. No result depends on the cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.faults import IncompleteTable
from operators.tables import TILES, UNITS, Table
from pipeline.carried import Carrier
from pipeline.embed import closed, unit_store
from pipeline.face_units import face_units
from pipeline.pieces import Piece, Segment, Unit, pieces
from pipeline.stage import Run, fingerprint

_WHOLE = [
    pa.field("side", pa.string()),  # queries or gallery
    pa.field("set", pa.string()),
    pa.field("piece", pa.int64()),
    pa.field("content", pa.string()),  # of one unit, in row order
]
LAYOUT = Table(
    name="layout",
    version=2,
    schema=pa.schema(
        [
            *_WHOLE,
            pa.field("unit", pa.string()),
            pa.field("taken", pa.list_(pa.list_(pa.int64()))),  # ranges of the unit's images; null for all of them
        ]
    ),
)
LAYOUT_1 = Table(name="layout", version=1, schema=pa.schema(_WHOLE))
"""What earlier versions wrote, and this one reads: whole units without their names."""

ROOM = 0.02
"""How far the floor of tiles lies below that of results, and how far it may be off: the measured threshold moves a
little when the training set grows, and old tiles shall serve then too."""

Cut = Mapping[tuple[str, str], Sequence[tuple[Segment, ...]]]
"""For each (side, set) the segments of every piece."""


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
    closed(run, role, run.table("scan", role, UNITS))
    table = face_units(run, role)
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
    earlier: float = made.facts["floor"] if made is not None and made.contract.startswith("layout") else 2.0
    if comparison.floor - 2 * ROOM - 1e-9 <= earlier <= comparison.floor:
        return earlier
    return round(comparison.floor - ROOM, 2)


def _cut(run: Run, role: str, side: str, images: int, earlier: Cut) -> list[Piece]:
    units, kept = units_of(run, role), earlier.get((side, role), ())
    return pieces(role, units, images, kept, Carrier(run, units, kept))


def _sizes(run: Run) -> list[int]:
    return [run.config.search.block_images, run.config.search.shard_images]


def _earlier(run: Run, comparison: Comparison) -> Cut:
    """The cut of the last search of this comparison, if it was made for pieces of the same sizes."""
    name = f"layout-{comparison.title}"
    made = run.store.child("search").find(name)
    if made is None or made.contract not in (LAYOUT.contract, LAYOUT_1.contract) or made.facts["images"] != _sizes(run):
        return {}
    cut: dict[tuple[str, str], dict[int, list[Segment]]] = {}
    for row in run.table("search", name, LAYOUT if made.contract == LAYOUT.contract else LAYOUT_1).to_pylist():
        taken = tuple((first, end) for first, end in row.get("taken") or ())
        held = Segment(row["content"], row.get("unit", ""), taken)
        cut.setdefault((row["side"], row["set"]), {}).setdefault(row["piece"], []).append(held)
    return {of: [tuple(segments) for segments in own.values()] for of, own in cut.items()}


def keep_layout(run: Run, grid: Grid) -> None:
    """Commit the cut, for this search to be resumed and for the next one to build on."""
    rows: list[dict[str, Any]] = [
        {"side": side, "set": piece.role, "piece": at, "content": unit.content, "unit": unit.name}
        | {"taken": [list(one) for one in unit.taken] or None}
        for side, own in (("queries", grid.blocks), ("gallery", grid.shards))
        for at, piece in enumerate(own)
        for unit in piece.units
    ]
    facts = {"images": _sizes(run), "floor": grid.comparison.kept[2]}
    key = fingerprint(LAYOUT.contract, rows, facts)
    name = f"layout-{grid.comparison.title}"
    made = run.store.child("search").find(name)
    if made is None or made.key != key:
        run.save("search", name, LAYOUT, LAYOUT.from_rows(rows), key=key, **facts)
