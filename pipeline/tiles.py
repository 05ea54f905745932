"""A block of queries against a shard of the gallery: what search actors hold, do and commit."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.storage import Place, Store
from operators import histogram, neighbors, vectors
from operators.engines import NO_ENGINE, Wanted, use_threads
from operators.gallery import shard
from operators.results import tile_table
from operators.tables import TILES
from pipeline.pieces import Piece, stored_rows

Block = tuple[NDArray[np.int64], NDArray[np.float16]]
"""Places in their piece (N,) and stored vectors (N, D) of the audited images of a piece."""


def read_piece(root: Place, piece: Piece) -> Block:
    """The audited images of a piece, from the embeddings under `root`."""
    store = Store(root)
    places, stored, offset = [], [], 0
    for unit in piece.units:
        column = store.read(unit.name, ["vector"])["vector"].combine_chunks()
        if unit.taken:
            column = column.take(pa.array(stored_rows(unit.taken, len(column))))
        places.append(offset + np.flatnonzero(np.asarray(column.is_valid())))
        stored.append(vectors.from_arrow(column.drop_null()))
        offset += unit.images
    return np.concatenate(places), np.concatenate(stored)


class ShardActor:
    """Holds shards of the gallery, searches query blocks in them, and commits each tile.

    A shard is loaded by the first call that needs it, not by the constructor: a fault in a constructor would reach the
    user as Ray's text about a dead actor instead of as itself. The actor has no other state, so it can be restarted at
    any point.
    """

    def __init__(
        self, root: Place, target: Place, engine: str, wanted: Wanted, threads: int, *, gpu: bool = False
    ) -> None:
        self.root, self.target = root, target
        self.engine, self.wanted, self.threads, self.gpu = engine, wanted, threads, gpu
        self.held: dict[Piece, neighbors.ShardSearch] = {}

    def tile(self, key: str, piece: Piece, block: Block, max_pairs: int, counts: str) -> int:
        """Search the block in one shard and commit what is wanted as the tile `key`; return the comparisons made."""
        made = Store(self.target).find(f"tile-{key}")
        if made is not None:  # by this very call, whose process was killed before it could answer
            return int(made.facts["queries"]) * int(made.facts["gallery"])
        search = self._search(piece)
        found = search.tile(*block, max_pairs)
        queries, gallery = len(block[0]), len(search.part.rows)
        facts = {
            "queries": queries,
            "gallery": gallery,
            "counts": self._counts(found, block, piece, counts),
            "engine": dict(search.engine.about if search.engine else NO_ENGINE),
        }
        Store(self.target).commit(f"tile-{key}", tile_table(found), contract=TILES.contract, key=key, facts=facts)
        return queries * gallery

    def _search(self, piece: Piece) -> neighbors.ShardSearch:
        if piece not in self.held:
            use_threads(self.threads, gpu=self.gpu)
            part = shard(*read_piece(self.root, piece))
            self.held[piece] = neighbors.ShardSearch(part, self.engine, self.wanted)
        return self.held[piece]

    def _counts(self, found: neighbors.Tile, block: Block, piece: Piece, counts: str) -> list[int]:
        """How many comparisons fall into each bin of `operators.histogram.EDGES`; `tail`: from the floor up only."""
        if counts == "tail":
            return [int(count) for count in histogram.counts_of(found.pairs.cosine)]
        part, queries = self.held[piece].part, shard(*block)
        sizes = np.diff(queries.starts), np.diff(part.starts)
        return [int(n) for n in histogram.exact_counts(queries.distinct_UD, part.distinct_UD, *sizes)]
