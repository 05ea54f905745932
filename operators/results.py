"""What a tile gives as a table, and back; and the results of many tiles put together in the row numbers of the sets."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators.neighbors import EMPTY, Scored, Tile, best, merged, ordered, ranks
from operators.tables import TILES, WITHIN_NEIGHBOURS, WITHIN_PAIRS


def tile_table(tile: Tile) -> pa.Table:
    """A tile under the TILES contract."""
    part = np.repeat(np.arange(len(tile), dtype=np.int8), [len(scored.cosine) for scored in tile])
    whole = merged(tile)
    columns = [part, whole.release.astype(np.int32), whole.gallery.astype(np.int32), whole.cosine]
    return pa.table(columns, schema=TILES.schema)


def tile_of(table: pa.Table) -> Tile:
    """The tile that `tile_table` made a table of."""
    part, query, gallery, cosine = (table[name].to_numpy() for name in TILES.schema.names)
    ends = np.searchsorted(part, range(4))
    return Tile(
        *(Scored(query[a:b].astype(np.int64), gallery[a:b].astype(np.int64), cosine[a:b]) for a, b in pairwise(ends))
    )


class Places(NamedTuple):
    """Where the units of a piece begin in the piece, and in their set; ascending."""

    offsets: NDArray[np.int64]
    first_rows: NDArray[np.int64]

    def rows(self, places_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers in the set of places in the piece, shape (N,)."""
        unit = np.searchsorted(self.offsets, places_N, side="right") - 1
        return places_N + (self.first_rows - self.offsets)[unit]


def placed(scored: Scored, block: Places, shard: Places) -> Scored:
    """The results of one tile in row numbers of the sets."""
    return Scored(block.rows(scored.release), shard.rows(scored.gallery), scored.cosine)


class Lists:
    """The best `k` of every release row, put together tile by tile in any order."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.held = EMPTY

    def add(self, scored: Scored) -> None:
        """Take the results of one more tile; the same tile twice changes nothing."""
        self.held = best(merged([self.held, scored]), self.k) if len(scored.cosine) else self.held


def split(scored: Scored, first_rows: Sequence[int], sizes: Sequence[int]) -> Iterator[Scored]:
    """The results of each unit, given as its first row and its number of rows; `scored` is sorted by release row."""
    for first, size in zip(first_rows, sizes, strict=True):
        low, high = np.searchsorted(scored.release, [first, first + size])
        yield Scored(scored.release[low:high], scored.gallery[low:high], scored.cosine[low:high])


def by_release(scored: Scored) -> Scored:
    """The pairs sorted by release row, then cosine descending, then gallery row."""
    return scored.take(np.lexsort((scored.gallery, -scored.cosine, scored.release)))


def without_self(scored: Scored, k: int) -> Scored:
    """The `k` best of lists of a set against itself that were `k + 1` long, without the images themselves."""
    return best(scored.take(np.flatnonzero(scored.release != scored.gallery)), k)


def each_once(scored: Scored) -> Scored:
    """The pairs of a set against itself with the lower row first, each once, in the total order."""
    return ordered(scored.take(np.flatnonzero(scored.release < scored.gallery)))


def within_neighbours_table(name: str, scored: Scored) -> pa.Table:
    """`best` results of the set `name` against itself under the WITHIN_NEIGHBOURS contract."""
    places = pa.array(ranks(scored.release), pa.int32())
    columns = [pa.repeat(pa.scalar(name), len(scored.release)), scored.release, scored.gallery, places, scored.cosine]
    return pa.table(columns, schema=WITHIN_NEIGHBOURS.schema)


def within_pairs_table(name: str, scored: Scored) -> pa.Table:
    """`each_once` results of the set `name` under the WITHIN_PAIRS contract."""
    columns = [pa.repeat(pa.scalar(name), len(scored.release)), scored.release, scored.gallery, scored.cosine]
    return pa.table(columns, schema=WITHIN_PAIRS.schema)
