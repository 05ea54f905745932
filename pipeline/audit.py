"""An audit on one screen: five stages, each reading what the one before it committed.

scan    sets            -> units          list every image, in units named by their content
embed   units           -> embeddings     decode, detect, align, embed; a failed image is a row
search  embeddings      -> neighbours     all release x gallery pairs, exactly
assess  neighbours      -> findings       threshold, candidates, persons, summary.json
report  findings        -> report.html    what was found, and what is not claimed
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pipeline.assess import assess
from pipeline.embed import embed
from pipeline.report import report
from pipeline.scan import scan
from pipeline.search import search
from pipeline.stage import Run

if TYPE_CHECKING:
    from pipeline.config import AuditConfig

STAGES: Mapping[str, Callable[[Run], None]] = {
    "scan": scan,
    "embed": embed,
    "search": search,
    "assess": assess,
    "report": report,
}


def audit(config: "AuditConfig", *stages: str) -> None:
    """Run the named stages in order, or all of them."""
    with Run(config) as run:
        for name in stages or STAGES:
            STAGES[name](run)
