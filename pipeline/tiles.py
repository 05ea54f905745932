"""A block of the release against a shard of the gallery: what search actors hold, do and commit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.storage import Store
from operators import neighbors, vectors
from operators.engines import Wanted, use_threads
from operators.gallery import shard
from operators.tables import CLOSEST, NEIGHBOURS, PAIRS

Block = tuple[NDArray[np.int64], NDArray[np.float16]]
"""Row numbers (N,) and stored vectors (N, D) of the audited images of a piece."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Consecutive units of one set: a shard of an arm or a block of the release."""

    role: str
    units: tuple[str, ...]
    first_rows: tuple[int, ...]


class TileResult(NamedTuple):
    """The result of one block against one shard."""

    found: neighbors.Tile
    gallery: int
    """Gallery images that every query was compared with."""


def pieces(role: str, units: pa.Table, images: int) -> Iterator[Piece]:
    """Consecutive units of a set, together of at most `images` images unless one unit alone is larger."""
    held: list[tuple[str, int]] = []
    count = 0
    for row in units.to_pylist():
        size = len(row["members"])
        if held and count + size > images:
            yield _piece(role, held)
            held, count = [], 0
        held.append((row["unit"], row["first_row"]))
        count += size
    if held:
        yield _piece(role, held)


def _piece(role: str, held: Sequence[tuple[str, int]]) -> Piece:
    return Piece(role=role, units=tuple(name for name, _ in held), first_rows=tuple(row for _, row in held))


def read_piece(root: str, piece: Piece) -> Block:
    """The audited images of a piece, from the embeddings under `root`."""
    store = Store(root)
    rows, stored = [], []
    for name, first in zip(piece.units, piece.first_rows, strict=True):
        column = store.read(name, ["vector"])["vector"].combine_chunks()
        rows.append(first + np.flatnonzero(np.asarray(column.is_valid())))
        stored.append(vectors.from_arrow(column.drop_null()))
    return np.concatenate(rows), np.concatenate(stored)


class ShardActor:
    """Holds shards of the gallery and searches query blocks in them.

    A shard is loaded by the first call that needs it, not by the constructor: a fault in a constructor would reach the
    user as Ray's text about a dead actor instead of as itself.
    """

    def __init__(self, root: str, engine: str, wanted: Wanted, threads: int) -> None:
        self.root, self.engine, self.wanted = root, engine, wanted
        self.threads = threads
        self.held: dict[Piece, neighbors.ShardSearch] = {}

    def tile(self, piece: Piece, block: Block, max_pairs: int) -> TileResult:
        """What is wanted of the block against one shard."""
        if piece not in self.held:
            use_threads(self.threads)
            part = shard(*read_piece(self.root, piece))
            self.held[piece] = neighbors.ShardSearch(part, self.engine, self.wanted)
        search = self.held[piece]
        return TileResult(search.tile(*block, max_pairs), len(search.part.rows))


def commit_block(root: str, key: str, k: int, roles: Sequence[str], block: Block, *tiles: TileResult) -> str:
    """Merge a block's tiles over the shards of each arm and commit the tables; `pairs` last, as the block's mark.

    The markers say how many queries the block had and how many gallery images of each arm they were compared with.
    """
    by_arm: dict[str, list[TileResult]] = {}
    for role, tile in zip(roles, tiles, strict=True):
        by_arm.setdefault(role, []).append(tile)
    nearest, closest, pairs = [], [], []
    for arm, own in by_arm.items():
        nearest.append((arm, neighbors.best(neighbors.merged([one.found.nearest for one in own]), k)))
        closest.append((arm, neighbors.by_gallery(neighbors.merged([one.found.closest for one in own]))))
        pairs.append((arm, neighbors.ordered(neighbors.merged([one.found.pairs for one in own]))))
    gallery = {arm: sum(tile.gallery for tile in own) for arm, own in by_arm.items()}
    facts = {"queries": len(block[0]), "gallery": gallery}
    store = Store(root)
    for contract, table in (
        (NEIGHBOURS, neighbors.neighbours_table(nearest)),
        (CLOSEST, neighbors.closest_table(closest)),
        (PAIRS, neighbors.pairs_table(pairs)),
    ):
        store.commit(f"{contract.name}-{key}", table, contract=contract.contract, key=key, facts=facts)
    return key
