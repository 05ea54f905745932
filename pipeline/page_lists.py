"""The report's tables of candidate pairs, rejected images and clusters."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from operators.tables import CANDIDATES, REJECTS
from pipeline.page_sensitivity import Grid
from pipeline.page_tables import Column, Filters, LongTable, Part, Row, text, who
from pipeline.spreadsheet import values
from pipeline.wording import cosine, count

PAIRS_HELD, REJECTS_HELD, CLUSTERS_HELD = 5_000, 5_000, 50
"""Rows that the page holds; all are in the run folder."""
NAMED = 6
"""Synthetic identities of a cluster that are named."""


def pairs_table(candidates: pa.Table | None) -> LongTable | None:
    """Candidate pairs, highest cosine first; None without any.

    Raises
    ------
    SchemaMismatch
        If the table does not follow the CANDIDATES contract.
    """
    if candidates is None or not CANDIDATES.check(candidates).num_rows:
        return None
    columns = [
        Column("#", "rank", number=True),
        Column("Release image", head=True),
        Column("Training image"),
        Column("Cosine", number=True, falls=True),
        Column("Pairs of the release image", number=True, falls=True),
        Column("Pairs of the training image", number=True, falls=True),
    ]
    rows = []
    for row in _dicts(candidates.slice(0, PAIRS_HELD)):
        same = [Part("small", "identical file bytes")] * row["same_bytes"]
        release, gallery = row["release_multiplicity"], row["gallery_multiplicity"]
        rows.append(
            Row(
                [
                    text(f"{row['rank']:,}"),
                    who(row["release_identity"], row["release_key"]),
                    who(row["gallery_identity"], row["gallery_key"]),
                    (*text(cosine(row["cosine"])), *same),
                    text(f"{release:,}"),
                    text(f"{gallery:,}"),
                ],
                [row["rank"], None, None, row["cosine"], release, gallery],
            )
        )
    return LongTable("pairs", "Candidate pairs", columns, rows, Filters((1, 2), "Search names", least=3))


def rejects_table(rejects: pa.Table, clean: Callable[[str], str]) -> LongTable | None:
    """Images that could not be audited; None without any. `clean` takes folders out of reasons."""
    if not REJECTS.check(rejects).num_rows:
        return None
    columns = [Column("Set"), Column("Image", head=True), Column("Status"), Column("Reason")]
    rows = [
        Row(
            [
                text(row["set"] or ""),
                (Part("key", row["key"] or ""),),
                text((row["status"] or "").replace("_", " ")),
                (Part("name", clean(row["error"] or "")),),
            ],
            [None] * len(columns),
        )
        for row in _dicts(rejects.slice(0, REJECTS_HELD))
    ]
    return LongTable("rejects", "Rejected images", columns, rows, Filters((0, 1, 3), "Search set, name, reason", 2))


def cluster_grid(clusters: Sequence[Mapping[str, Any]], listed: Collection[int] | None) -> Grid | None:
    """The largest clusters as a table; None without any.

    Parameters
    ----------
    clusters
        Of `pipeline.page_clusters.clusters`.
    listed
        Ranks of listed findings; None where nothing is listed because no rates are claimed.
    """
    if not clusters:
        return None
    names = ["Cluster", "People", *["Of them listed"] * (listed is not None), "Synthetic identities", "Release images"]
    rows = []
    for one in clusters[:CLUSTERS_HELD]:
        identities = one["release_identities"]
        more = f" and {len(identities) - NAMED:,} more" if len(identities) > NAMED else ""
        on_list = [] if listed is None else [f"{sum(rank in listed for rank in one['people']):,}"]
        rows.append(
            [
                f"{one['name']}",
                count(len(one["people"]), "person", "people"),
                *on_list,
                f"{len(identities):,}: {', '.join(identities[:NAMED])}{more}",
                f"{one['release_images']:,}",
                cosine(one["best"]),
            ]
        )
    return Grid((*names, "Highest cosine"), rows)


def _dicts(table: pa.Table) -> list[dict[str, Any]]:
    columns = [values(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]
