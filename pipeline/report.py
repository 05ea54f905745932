"""report: what was found, as one self-contained page, and as a table for a spreadsheet."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.faults import IncompleteTable
from cluster.storage import write_private
from operators.formats import form
from operators.images import ImageFault, decode
from operators.pictures import picture
from operators.tables import CANDIDATES, FINDINGS, NEIGHBOURS, REJECTS
from pipeline.assess import assess_key
from pipeline.calibrate import set_columns
from pipeline.search import results
from pipeline.stage import Run

if TYPE_CHECKING:
    from pipeline.page import Shown

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What the report shows."""

    faces: str = "covered"
    """`covered`: an opaque box over every face. `clear`: faces are shown; the page is then biometric data."""
    pairs: int = 48
    """Candidate pairs shown with pictures, best first; the full list is in the tables."""

    def __post_init__(self) -> None:
        if self.faces not in ("covered", "clear"):
            raise ValueError(f"faces must be 'covered' or 'clear'. Got {self.faces!r}.")
        if self.pairs < 0:
            raise ValueError(f"pairs must not be negative. Got {self.pairs}.")


def report(run: Run) -> None:
    """Write `report.html` and `findings.csv` from what assess committed."""
    from pipeline.figures import best_match_figure, exceedance_figure
    from pipeline.page import Page, render
    from pipeline.spreadsheet import safe_csv

    with run.timed("report") as facts:
        listed = run.table("assess", "candidates", CANDIDATES)
        summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_bytes())
        if run.commit("assess", "candidates").key != assess_key(run, summary["calibration"]["threshold"]):
            raise IncompleteTable(f"{run.folder}/assess is of another search. Run `unveil assess` again.")
        training = listed.filter(pc.equal(listed["arm"], "training"))
        best, threshold = best_matches(run), summary["calibration"]["threshold"]
        page = Page(
            summary=summary,
            manifest=run.ledger.record,
            shown=shown(run, training.slice(0, run.config.report.pairs)),
            rejects=run.table("assess", "rejects", REJECTS),
            figures=[
                ("Best match of every release image", best_match_figure(best, threshold)),
                ("Share of release images whose best match reaches a score", exceedance_figure(best, threshold)),
            ],
            faces=run.config.report.faces,
        )
        write_private(run.folder / "report.html", render(page).encode())
        write_private(run.folder / "findings.csv", safe_csv(run.table("assess", "findings", FINDINGS)))
        facts |= {"pairs_shown": len(page.shown), "faces": page.faces}
        log.info("report: %s", run.folder / "report.html")


def best_matches(run: Run) -> dict[str, NDArray[np.float64]]:
    """The best cosine of every audited release image in each gallery set, in release row order."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    for block in results(run, NEIGHBOURS):
        first = block.filter(pc.equal(block["rank"], 1))
        for arm in pc.unique(first["arm"]).to_pylist():
            found.setdefault(arm, []).append(first.filter(pc.equal(first["arm"], arm))["cosine"].to_numpy())
    return {arm: np.concatenate(parts) for arm, parts in found.items()}


def shown(run: Run, candidates: pa.Table) -> "Sequence[Shown]":
    """Candidates with the pictures of both sides."""
    from pipeline.page import Shown

    boxes = {role: _boxes(run, role, candidates[column]) for role, column in SIDES.items()}
    return [
        Shown(
            **{name: row[name] for name in row if name != "arm"},
            release_picture=_picture(run, "release", row["release_key"], boxes["release"]),
            gallery_picture=_picture(run, "training", row["gallery_key"], boxes["training"]),
        )
        for row in candidates.to_pylist()
    ]


SIDES = {"release": "release_key", "training": "gallery_key"}


def _boxes(run: Run, role: str, keys: pa.ChunkedArray) -> dict[str, list[float] | None]:
    """Where the face is in each of the images `keys`; None for sets that came aligned."""
    columns = set_columns(run, role)
    wanted = columns.filter(pc.is_in(columns["key"], keys.combine_chunks()))
    return dict(zip(wanted["key"].to_pylist(), wanted["box"].to_pylist(), strict=True))


def _picture(run: Run, role: str, key: str, boxes: Mapping[str, list[float] | None]) -> bytes | None:
    """The face in its surroundings; None if the image is no longer there."""
    chosen = run.config.sets.given()[role]
    try:
        with form(chosen.format).open_image(chosen.uri, key) as file:
            image = decode(file.read(), run.config.faces.limits)
    except (OSError, ImageFault) as fault:
        log.warning("report: one image of the %s set can no longer be read (%s)", role, type(fault).__name__)
        return None
    return picture(image, boxes[key], covered=run.config.report.faces == "covered")
