"""The short summary at the end of a run."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.storage import MARKER
from pipeline.config import ARMS, AuditConfig
from pipeline.page_evidence import terminal_lines
from pipeline.spreadsheet import visible


def closing(config: AuditConfig) -> tuple[str, bool]:
    """What was audited and found, in a few lines, and whether more persons were found than `assess.limit` allows."""
    folder = Path(config.out)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_bytes())
    sets = summary["sets"]
    images = sum(one["images"] for one in sets.values())
    audited = sum(one["audited"] for one in sets.values())
    seen = [one["faces"] for one in sets.values() if one.get("faces")]
    more, left = sum(one["audited"] - one["images"] for one in seen), sum(one["passed_over"] for one in seen)
    comparisons = sum(arm["comparisons"] for arm in summary["arms"].values())
    calibration = summary["calibration"]
    lines = [
        f"images        {images:,} in {len(sets)} sets",
        f"faces         {audited:,} audited, {images - audited:,} not (the report says why)",
        *([f"further faces {more:,} audited, {left:,} not (faces.several)"] if more or left else []),
        f"comparisons   {comparisons:,}",
        f"threshold     cosine {calibration['threshold']:.4f}, false match rate {calibration['fmr']:.2g} per pair",
    ]
    for arm in [role for role in ARMS if role in summary["arms"]]:
        found = summary["arms"][arm]
        lines.append(
            f"{arm:<13} {found['candidates']:,} candidate pairs, {found['persons']:,} persons; "
            f"{found['expected_false']:.1f} pairs expected by chance"
        )
    if (evidence := summary.get("evidence")) is not None:
        lines += [f"{name:<13} {visible(text)}" for name, text in terminal_lines(evidence)]
    limit = summary["limit"]
    over = limit is not None and summary["findings"] > limit
    if limit is not None:
        lines.append(f"limit         {limit:,} persons: {'exceeded' if over else 'kept'}")
    lines += [f"changes       {text}" for text in _changes(folder)]
    lines.append(f"report        {folder / 'report.html'}")
    if config.report.audience == "public":
        lines.append(f"to publish    {folder / 'public'}")
    return "\n".join(lines), over


def _changes(folder: Path) -> Iterator[str]:
    """How many findings changed since the audit before; nothing for a first one, or if these are not reported yet."""
    path = folder / "changes.parquet"
    markers = [folder / stage / f"{name}{MARKER}" for stage, name in (("assess", "findings"), ("report", "latest"))]
    if not all(one.exists() for one in (path, *markers)):
        return
    if len({json.loads(one.read_bytes())["sha256"] for one in markers}) == 1:
        kinds = Counter(pq.read_table(path, columns=["change"])["change"].to_pylist())
        counts = ", ".join(f"{kinds[kind]:,} {kind}" for kind in ("new", "gone", "moved", "unchanged"))
        yield f"{counts} since the audit before; the report says whether the two are comparable"
