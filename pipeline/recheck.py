"""What verify does to a search: all comparisons of some images again, in plain fp64, against what is committed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators import vectors
from operators.neighbors import closest_table
from operators.oracle import Oracle
from operators.tables import CLOSEST, NEIGHBOURS, PAIRS, Table
from pipeline.certificate import check_tile, sampled
from pipeline.embed import unit_store
from pipeline.layout import Comparison, lay_out, units_of
from pipeline.pieces import Unit
from pipeline.search import finished, results
from pipeline.stage import Run

GROUP = 256
"""Images whose comparisons are held at once, which bounds memory."""

Stored = tuple[NDArray[np.int64], NDArray[np.float16]]
"""Row numbers (N,) and vectors (N, D)."""


class Difference(NamedTuple):
    """One thing that a run says and its verification does not. Rows are named by number: logs hold no names."""

    what: str
    remedy: str


@dataclass(kw_only=True, slots=True)
class Again:
    """What was searched again, and what was different."""

    release_images: int = 0
    gallery_images: int = 0
    comparisons: int = 0
    differences: list[Difference] = field(default_factory=list)


def recheck(run: Run, rows: int, seed: int) -> Again:
    """Search `rows` random images of the release, and of each gallery set, again; and a sample of the tiles."""
    comparison, _ = finished(run)
    units = {role: units_of(run, role) for role in (comparison.queries, *comparison.gallery)}
    again, different = Again(), list(_comparisons(run, comparison, units))
    rng = np.random.default_rng([seed, 0])
    queries = _sample(run, units[comparison.queries], rows, rng)
    again.release_images = len(queries[0])
    for arm in comparison.gallery:
        checks: list[tuple[Table, Stored, Sequence[Unit], int, float]] = [
            (NEIGHBOURS, queries, units[arm], comparison.k, comparison.floor)
        ]
        if comparison.columns:
            gallery = _sample(run, units[arm], rows, rng)
            again.gallery_images += len(gallery[0])
            checks.append((CLOSEST, gallery, units[comparison.queries], comparison.columns, 2.0))
        for contract, mine, others, k, floor in checks:
            kinds = (CLOSEST,) if contract is CLOSEST else (NEIGHBOURS, PAIRS)
            committed = {kind: _committed(run, kind, arm, mine[0]) for kind in kinds}
            for oracle in _oracles(run, mine, others, k, floor):
                again.comparisons += oracle.comparisons
                for kind, expected in _expected(contract, arm, oracle):
                    different += _unequal(kind, arm, oracle.rows_Q, committed[kind], expected)
    different += _tiles(run, comparison, seed)
    remedy = f"Delete {run.folder / 'search'} and run `unveil run` again."
    again.differences = [Difference(what, remedy) for what in different]
    return again


def _comparisons(run: Run, comparison: Comparison, units: dict[str, list[Unit]]) -> Iterator[str]:
    """Where the recorded number of comparisons is not that of the stored vectors."""
    said = run.commit("search", "coverage").facts["comparisons"]
    count = {role: sum(len(rows) for rows, _ in _audited(run, own)) for role, own in units.items()}
    for arm in comparison.gallery:
        due = count[comparison.queries] * count[arm]
        if said.get(arm) != due:
            yield f"search/coverage, {arm}: {said.get(arm)} comparisons are recorded, {due} counted"


def _audited(run: Run, units: Sequence[Unit]) -> Iterator[Stored]:
    """Row numbers and stored vectors of the audited images of each unit, row numbers ascending."""
    for unit in units:
        column = unit_store(run).read(unit.name, ["vector"])["vector"].combine_chunks()
        yield unit.first_row + np.flatnonzero(np.asarray(column.is_valid())), vectors.from_arrow(column.drop_null())


def _sample(run: Run, units: Sequence[Unit], count: int, rng: np.random.Generator) -> Stored:
    """Random audited images of a set, in row order."""
    rows_N = np.concatenate([rows for rows, _ in _audited(run, units)])
    chosen = np.sort(rng.choice(rows_N, min(count, len(rows_N)), replace=False))
    parts = [stored[np.isin(rows, chosen)] for rows, stored in _audited(run, units)]
    return chosen, np.concatenate(parts)


def _oracles(run: Run, mine: Stored, others: Sequence[Unit], k: int, floor: float) -> Iterator[Oracle]:
    """All comparisons of some images with all audited images of the `others`, some images at a time."""
    for at in range(0, len(mine[0]), GROUP):
        oracle = Oracle(mine[0][at : at + GROUP], mine[1][at : at + GROUP], k, floor)
        for rows, stored in _audited(run, others):
            oracle.add(rows, stored)
        yield oracle


def _expected(contract: Table, arm: str, oracle: Oracle) -> Iterator[tuple[Table, pa.Table]]:
    """What must be committed for the oracle's images."""
    if contract is CLOSEST:
        yield CLOSEST, closest_table([(arm, oracle.best().turned())])
    else:
        yield NEIGHBOURS, oracle.neighbours(arm)
        yield PAIRS, oracle.pairs(arm)


def _side(kind: Table) -> str:
    """The column that says whose list a row belongs to."""
    return "gallery_row" if kind is CLOSEST else "release_row"


def _committed(run: Run, kind: Table, arm: str, rows_Q: NDArray[np.int64]) -> pa.Table:
    """What search committed for some images in one arm, by image, then in the order in which it is stored."""
    parts = [kind.schema.empty_table()]
    for part in results(run, kind):
        parts.append(part.filter(pc.and_(pc.equal(part["arm"], arm), pc.is_in(part[_side(kind)], pa.array(rows_Q)))))
    return pa.concat_tables(parts).sort_by(_side(kind))  # stable


def _unequal(
    kind: Table, arm: str, rows_Q: NDArray[np.int64], committed: pa.Table, expected: pa.Table
) -> Iterator[str]:
    """Where the rows of some images in one arm are not the expected ones, which are ordered by these images' rows."""
    side = _side(kind)
    found = committed.filter(pc.is_in(committed[side], pa.array(rows_Q)))
    if found.equals(expected):
        return
    for row in rows_Q.tolist():
        left, right = (table.filter(pc.equal(table[side], row)) for table in (found, expected))
        place = f"search/{kind.name}: {side.replace('_', ' ')} {row}, {arm}"
        if len(left) != len(right):
            yield f"{place}: {len(left)} rows are committed, {len(right)} recomputed"
        elif not left.equals(right):
            rows = zip(left.to_pylist(), right.to_pylist(), strict=True)
            at, old, new = next((at, old, new) for at, (old, new) in enumerate(rows, 1) if old != new)
            column = next(column for column in new if old[column] != new[column])
            yield f"{place}, place {at}: {column} {old[column]!r} is committed, {new[column]!r} recomputed"


def _tiles(run: Run, comparison: Comparison, seed: int) -> Iterator[str]:
    """Where a sample of the committed tiles is not what the oracle says; another seed, another sample."""
    grid, options = lay_out(run, comparison), run.config.search.certify
    store = run.store.child("search")
    roots = unit_store(run), store
    for at, (key, block, shard) in enumerate(sampled(grid, options, seed)):
        if store.find(f"tile-{key}") is not None:
            done = check_tile(*roots, grid.comparison, key, block, shard, options.rows, [seed, at])
            yield from (f"search/tile-{key}, {shard.role}: {what}" for what in done.different)
