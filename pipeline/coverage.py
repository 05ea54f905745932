"""The end of a search: the list of its tiles with the certificate, and how its scores are spread.

The list is committed last. Whoever finds it under the digest of the sets, vectors and options as they are knows that
every comparison was made, and that the parts are there.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.faults import IncompleteTable
from cluster.storage import Commit
from operators import histogram, vectors
from operators.tables import SCORES, Table
from pipeline.certificate import Checked, sampled_counts, tile_facts
from pipeline.embed import unit_store
from pipeline.layout import Comparison, Grid, units_of
from pipeline.merge import Parts
from pipeline.stage import Run, fingerprint

log = logging.getLogger(__name__)

Counts = NDArray[np.int64]
"""Comparisons by bins of `operators.histogram.EDGES`."""

COVERAGE = Table(
    name="coverage",
    version=1,
    schema=pa.schema(
        [
            pa.field("tile", pa.string()),  # digest of everything that the tile depends on
            pa.field("arm", pa.string()),
            pa.field("queries", pa.int64()),  # images that took part
            pa.field("gallery", pa.int64()),
            pa.field("comparisons", pa.int64()),
        ]
    ),
)


def coverage_key(run: Run, wanted: Parts) -> str:
    """Digest of a whole search: the names of all its parts, what is counted, and what is searched again."""
    options = run.config.search
    certify = [options.certify.tiles, options.certify.rows, options.certify.seed]
    gallery = {role: dict(own) for role, own in wanted.gallery.items()}
    return fingerprint(COVERAGE.contract, dict(wanted.queries), gallery, options.counts, certify)


def counted(run: Run, comparison: Comparison, key: str) -> bool:
    """Whether the committed score counts are those of the search `key`."""
    store = run.store.child("search")
    names = [f"scores-{comparison.title}", *(("sample",) if comparison.main else ())]
    return all((made := store.find(name)) is not None and made.key == key for name in names)


def close(run: Run, grid: Grid, wanted: Parts, checked: Sequence[Checked]) -> Commit:
    """Commit the score counts, and then the list of tiles with the certificate.

    Raises
    ------
    IncompleteTable
        If a tile is missing, or the comparisons made are not all those of the audited images.
    """
    rows, engines = [], []
    counts: dict[str, Counts] = {}
    for (key, _, shard), (_, _, facts) in zip(grid.tiles(), tile_facts(run, grid), strict=True):
        seen = {"queries": facts["queries"], "gallery": facts["gallery"]}
        rows.append({"tile": key, "arm": shard.role, **seen, "comparisons": seen["queries"] * seen["gallery"]})
        own = np.array(facts["counts"], np.int64)
        counts[shard.role] = counts[shard.role] + own if shard.role in counts else own
        engines.append(facts["engine"])
    done = {arm: sum(row["comparisons"] for row in rows if row["arm"] == arm) for arm in grid.comparison.gallery}
    _refuse_uncovered(run, grid.comparison, done)
    key = coverage_key(run, wanted)
    _save_scores(run, grid, counts, checked, key)
    log.info("search: %s comparisons in %d tiles", f"{sum(done.values()):,}", len(rows))
    certificate = {
        "tiles_searched_again": len(checked),
        "comparisons_searched_again": sum(one.comparisons for one in checked),
        "outcome": "equal",
    }
    facts = {"floor": grid.comparison.floor, "tiles": len(rows), "comparisons": done, "certificate": certificate}
    facts["engines"] = engines_of(engines)
    return run.save("search", grid.comparison.title, COVERAGE, COVERAGE.from_rows(rows), key=key, **facts)


def engines_of(tiles: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The different engines that made tiles, as they describe themselves, and how many tiles each made."""
    found: dict[str, dict[str, Any]] = {}
    for about in tiles:
        known = found.setdefault("/".join(str(about[part]) for part in ("engine", "device", "dtype")), {**about})
        known["tiles"] = known.get("tiles", 0) + 1
        known["margin"] = max(known["margin"], about["margin"])
        known["residual"] = max(known["residual"], about["residual"])
    return list(found.values())


def _refuse_uncovered(run: Run, comparison: Comparison, done: Mapping[str, int]) -> None:
    """Raise unless every audited image of the queries was compared with every audited image of the gallery."""
    audited = {role: run.commit("embed", role).facts["status"].get("ok", 0) for role in run.config.sets.given()}
    for arm, made in done.items():
        due = audited[comparison.queries] * audited[arm]
        if made != due:
            raise IncompleteTable(
                f"the search made {made:,} of {due:,} comparisons of {comparison.queries} with {arm}. Delete "
                f"{run.folder / 'search'}, and run `unveil search` again."
            )


def _save_scores(run: Run, grid: Grid, counts: Mapping[str, Counts], checked: Sequence[Checked], key: str) -> None:
    """Commit how many pairs have each cosine or more: `scores` of all comparisons, `sample` of the certificate's."""
    comparison = grid.comparison
    audited = {role: run.commit("embed", role).facts["status"].get("ok", 0) for role in run.config.sets.given()}
    lowest = -2.0 if grid.counts == "all" else comparison.floor
    rows: list[dict[str, Any]] = []
    for arm, own in counts.items():
        total = audited[comparison.queries] * audited[arm]
        if comparison.within:  # every pair was seen twice, and every image with itself
            own, total = (own - _self_counts(run, arm, lowest)) // 2, (total - audited[arm]) // 2
        rows += _score_rows(arm, own, total, "all", lowest)
    run.save("search", f"scores-{comparison.title}", SCORES, SCORES.from_rows(rows), key=key)
    if comparison.main:
        sample = sampled_counts(checked)
        rows = [row for arm, own in sample.items() for row in _score_rows(arm, own, int(own.sum()), "sample", -2.0)]
        run.save("search", "sample", SCORES, SCORES.from_rows(rows), key=key)


def _score_rows(arm: str, counts: Counts, total: int, basis: str, lowest: float) -> list[dict[str, Any]]:
    edges, above = histogram.EDGES, histogram.above(counts)
    return [
        {"arm": arm, "cosine": edge, "pairs": pairs, "comparisons": total, "basis": basis}
        for edge, pairs in zip(edges.tolist(), above.tolist(), strict=True)
        if edge >= lowest
    ]


def _self_counts(run: Run, role: str, lowest: float) -> Counts:
    """The cosines of the images of a set with themselves, which are near 1."""
    counts = np.zeros(len(histogram.EDGES) - 1, np.int64)
    for unit in units_of(run, role):
        column = unit_store(run).read(unit.name, ["vector"])["vector"].combine_chunks().drop_null()
        stored = vectors.from_arrow(column)
        cosine = vectors.exact_cosines(stored, stored)
        counts += histogram.counts_of(cosine[cosine >= lowest])
    return counts
