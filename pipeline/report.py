"""report: what was found, as one self-contained page, and as a table for a spreadsheet."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.faults import IncompleteTable
from cluster.storage import write_private
from operators.formats import reader
from operators.images import ImageFault, decode
from operators.pictures import picture
from operators.tables import CANDIDATES, FINDINGS, IMAGE_UNITS, NEIGHBOURS, PAIR_EVIDENCE, REJECTS, UNITS
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
        findings, evidence = run.table("assess", "findings", FINDINGS), summary.get("evidence")
        page = Page(
            summary=summary,
            manifest=run.ledger.record,
            shown=shown(run, training.slice(0, run.config.report.pairs), findings, evidence),
            rejects=run.table("assess", "rejects", REJECTS),
            figures=[
                ("Best match of every release image", best_match_figure(best, threshold)),
                ("Share of release images whose best match reaches a score", exceedance_figure(best, threshold)),
            ],
            faces=run.config.report.faces,
            findings=findings,
            pixels=None if evidence is None else run.table("assess", "pair_evidence", PAIR_EVIDENCE),
            roc=_roc(evidence),
        )
        write_private(run.folder / "report.html", render(page).encode())
        write_private(run.folder / "findings.csv", safe_csv(findings))
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


def _roc(evidence: Mapping[str, Any] | None) -> str | None:
    """The ROC curve, where the audit may state rates."""
    from pipeline.roc import roc_figure

    if evidence is None or not evidence["claim"]:
        return None
    tested = evidence["persons"]["tested"]
    return roc_figure(evidence["roc"], tested["training"], tested["control"], evidence["operating"])


def unit_of(run: Run, keys: pa.Array) -> dict[str, int]:
    """The unit of the controlled audit behind each of these training images; none for people in both sets."""
    units = run.table("assess", "image_units", IMAGE_UNITS)
    own = units.filter(pc.equal(units["arm"], "training"))["unit"]
    names = set_columns(run, "training", ("key",))["key"]
    chosen = pc.and_(pc.is_in(names, keys), pc.greater_equal(own, 0))
    return dict(zip(names.filter(chosen).to_pylist(), own.filter(chosen).to_pylist(), strict=True))


def shown(run: Run, candidates: pa.Table, findings: pa.Table, evidence: Mapping[str, Any] | None) -> "Sequence[Shown]":
    """Candidates with the pictures of both sides, and what is known of the training person."""
    from pipeline.page import Shown
    from pipeline.page_people import judgements

    keys = pa.concat_arrays([candidates["gallery_key"].combine_chunks(), findings["training_key"].combine_chunks()])
    units = {} if evidence is None else unit_of(run, keys)
    known = judgements(findings, units, evidence)
    with ExitStack() as held:
        pictures = {
            role: held.enter_context(Pictures(run, role, candidates[column].combine_chunks()))
            for role, column in SIDES.items()
        }
        return [
            Shown(
                **{name: row[name] for name in row if name != "arm"},
                release_picture=pictures["release"](row["release_key"]),
                gallery_picture=pictures["training"](row["gallery_key"]),
                **known(row),
            )
            for row in candidates.to_pylist()
        ]


SIDES = {"release": "release_key", "training": "gallery_key"}


class Pictures:
    """The faces of some images of one set in their surroundings."""

    def __init__(self, run: Run, role: str, keys: pa.Array) -> None:
        self.run, self.role = run, role
        columns = set_columns(run, role)
        wanted = columns.filter(pc.is_in(columns["key"], keys))
        self.boxes = dict(zip(wanted["key"].to_pylist(), wanted["box"].to_pylist(), strict=True))
        units = run.table("scan", role, UNITS)
        members = pa.Table.from_struct_array(units["members"].combine_chunks().flatten())
        chosen = members.filter(pc.is_in(members["key"], keys)).select(["key", "place", "version"])
        self.places = {row["key"]: (row["place"] or row["key"], row["version"]) for row in chosen.to_pylist()}
        about = units.select(["format", "uri", "anonymous"]).slice(0, 1).to_pylist()[0]
        self.reader = reader(about["format"], about["uri"], about["anonymous"])

    def __call__(self, key: str) -> bytes | None:
        """The picture of one image; None if it is no longer there, or if there never was one (ready vectors)."""
        limits = self.run.config.faces.limits
        try:
            with self.reader.open(*self.places[key]) as file:
                image = decode(file.read(limits.max_bytes + 1), limits)
        except (OSError, ImageFault) as fault:
            log.warning("report: one image of the %s set can no longer be read (%s)", self.role, type(fault).__name__)
            return None
        return picture(image, self.boxes[key], covered=self.run.config.report.faces == "covered")

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, *error: object) -> None:
        self.reader.close()
