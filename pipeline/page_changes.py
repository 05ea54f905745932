"""The comparison with the previous audit of the same release, as rows of text."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.page_tables import Column, Filters, LongTable, Row, text, who
from pipeline.wording import cosine, count, known, p_value


class Changes(NamedTuple):
    """What is different from the previous audit."""

    says: Sequence[str]
    reasons: Sequence[str]
    """Why the two audits cannot be compared; empty where they can."""
    tables: Sequence[LongTable]


def changes(found: Mapping[str, Any] | None, claim: bool) -> Changes | None:
    """The comparison as it is shown; None without one. Without claim q-values are left out."""
    if found is None:
        return None
    before, counts = found["previous"], found["counts"]
    says = [
        f"Previous audit: {before['title']}, {before['created']}{', ' + before['look'] if before.get('look') else ''}."
    ]
    if not found["comparable"]:
        return Changes(says, list(found["reasons"]), [])
    says.append(
        f"{count(counts['new'], 'finding')} {'is' if counts['new'] == 1 else 'are'} new, {counts['gone']:,} gone, "
        f"{counts['unchanged']:,} unchanged"
        + (f", {found['moved']:,} with another tier, decision or place on the list." if found.get("moved") else ".")
    )
    says.append(
        "A finding that is gone was not refuted, and a new one need not be a new leak: another threshold, control set "
        "or model moves both."
    )
    tables = [
        _table(f"{name}-findings", f"{title} findings", found[name], counts[name], claim)
        for name, title in (("new", "New"), ("gone", "Gone"))
        if found[name]
    ]
    return Changes(says, list(found["reasons"]), tables)


def _table(name: str, title: str, rows: Sequence[Mapping[str, Any]], whole: int, claim: bool) -> LongTable:
    cut = f", the first {len(rows):,} of {whole:,}" if whole > len(rows) else ""
    columns = [
        Column("#", "rank", number=True),
        Column("Training person", head=True),
        Column("Closest in the release"),
        Column("Cosine", number=True, falls=True),
        *[Column("q", number=True)] * claim,
        Column("Tier", "tier"),
    ]
    made = [
        Row(
            [
                text(f"{row['rank']:,}"),
                who(row["training_identity"], row["training_key"]),
                who(row["release_identity"], row["release_key"]),
                text(cosine(row["cosine"])),
                *[text(p_value(row["q"]))] * claim,
                text(row.get("tier") or "not looked at"),
            ],
            [row["rank"], None, None, row["cosine"], *[row["q"] if known(row["q"]) else None] * claim, None],
        )
        for row in rows
    ]
    return LongTable(name, f"{title}{cut}", columns, made, Filters((1, 2), "Search names", len(columns) - 1, 3))
