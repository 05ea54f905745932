"""An audit on one screen: five stages, each reading what the one before it committed.

scan    sets            -> units          list every image, in units named by their content
embed   units           -> embeddings     decode, detect, align, embed; a failed image is a row
search  embeddings      -> neighbours     all release x gallery pairs, exactly
assess  neighbours      -> findings       threshold, candidates, persons, summary.json
report  findings        -> report.html    what was found, and what is not claimed

The extras are no stages: when asked for, `plant` measures what they would have found, `verify` checks a sample of what
they committed by another path, `clean` takes findings out of the release, `export` and `seal` hand results on.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pipeline.assess import assess
from pipeline.clean import clean
from pipeline.embed import embed
from pipeline.export import export
from pipeline.plant import plant_copies
from pipeline.report import report
from pipeline.scan import scan
from pipeline.sealing import seal_run
from pipeline.search import search
from pipeline.stage import Run
from pipeline.verify import verify

if TYPE_CHECKING:
    from pipeline.config import AuditConfig

STAGES: Mapping[str, Callable[[Run], None]] = {
    "scan": scan,
    "embed": embed,
    "search": search,
    "assess": assess,
    "report": report,
}

EXTRAS: Mapping[str, Callable[[Run], None]] = {
    "plant": plant_copies,
    "verify": verify,
    "clean": clean,
    "export": export,
    "seal": seal_run,
}
"""What works on a run but is not part of an audit."""


def audit(config: "AuditConfig", *names: str) -> None:
    """Run the named stages and extras in order, or all stages."""
    known = {**STAGES, **EXTRAS}
    with Run(config) as run:
        for name in names or STAGES:
            known[name](run)
