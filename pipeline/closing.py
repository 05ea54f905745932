"""The short summary at the end of a run."""

import json
from pathlib import Path
from typing import Any

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
    comparisons = sum(arm["comparisons"] for arm in summary["arms"].values())
    calibration = summary["calibration"]
    lines = [
        f"images        {images:,} in {len(sets)} sets",
        f"faces         {audited:,} audited, {images - audited:,} not (the report says why)",
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
    lines.append(f"report        {folder / 'report.html'}")
    return "\n".join(lines), over
