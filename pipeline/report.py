"""report: what was found, as one self-contained page, tables and figures; and once more for the public, if asked for.

report.html  findings.csv  findings.parquet  changes.csv  changes.parquet  figures/     private, all names in clear
public/      report.html  findings.csv  findings.parquet  summary.json  figures/        `pipeline.audience`
"""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.faults import IncompleteTable, StorageError
from cluster.storage import ASIDE, to_json, write_private
from operators.formats import reader
from operators.images import ImageFault, decode
from operators.pictures import picture
from operators.tables import CANDIDATES, FINDINGS, IMAGE_UNITS, PAIR_EVIDENCE, REJECTS
from pipeline.assess import assess_key
from pipeline.calibrate import set_columns
from pipeline.drawings import Drawings, drawings, save
from pipeline.face_units import face_units
from pipeline.previous import Audit, about, compare, keep, previous, told
from pipeline.review_results import reviewed
from pipeline.stage import Run

if TYPE_CHECKING:
    from pipeline.page import Page, Shown

log = logging.getLogger(__name__)

PUBLIC = "public"
"""Folder of what anybody may read, in the run folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What the report shows."""

    faces: str = "covered"
    """`covered`: an opaque box over every face. `clear`: faces are shown; the page is then biometric data."""
    pairs: int = 48
    """Candidate pairs shown with pictures, best first; the full list is in the tables."""
    audience: str = "private"
    """`private`: a report for those who may see the sets. `public`: also `public/`, a copy without pictures and paths,
    in which names of images and identities are keyed hashes."""
    previous: str = ""
    """Run folder of the audit to compare with. Empty: what this run folder reported before, if anything."""

    def __post_init__(self) -> None:
        if self.faces not in ("covered", "clear"):
            raise ValueError(f"faces must be 'covered' or 'clear'. Got {self.faces!r}.")
        if self.pairs < 0:
            raise ValueError(f"pairs must not be negative. Got {self.pairs}.")
        if self.audience not in ("private", "public"):
            raise ValueError(f"audience must be 'private' or 'public'. Got {self.audience!r}.")
        if self.audience == "public" and self.faces == "clear":
            raise ValueError(
                f"faces must be 'covered' with audience=public: what is published shows no face. Got {self.faces!r}."
            )


def report(run: Run) -> None:
    """Write `report.html`, the findings, the figures and what changed, from what assess committed; for the public too.

    Raises
    ------
    IncompleteTable
        If assess is not finished, or is of another search.
    ConfigError
        If `report.previous` names no audit, or the key of the public report is not safe.
    """
    from pipeline.page import render

    with run.timed("report") as facts:
        listed = run.table("assess", "candidates", CANDIDATES)
        summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_bytes())
        key = assess_key(run, summary["calibration"]["threshold"])
        if run.commit("assess", "candidates").key != key:
            raise IncompleteTable(f"{run.folder}/assess is of another search. Run `unveil assess` again.")
        training = listed.filter(pc.equal(listed["arm"], "training"))
        findings = run.table("assess", "findings", FINDINGS)
        changes = _compared(run, key, Audit(findings, about(run.ledger.record, summary)))
        made = drawings(run, summary)
        page = _page(run, summary, training, findings, made, changes)
        write_private(run.folder / "report.html", render(page).encode())
        _write_tables(run.folder, "findings", findings)
        save(run.folder, made)
        facts |= {"pairs_shown": len(page.shown), "faces": page.faces, "audience": run.config.report.audience}
        log.info("report: %s", run.folder / "report.html")
        if run.config.report.audience == "public":
            publish(run, page, training)
        elif (run.folder / PUBLIC).exists():
            log.warning("report: %s is of an earlier report; give report.audience=public to renew it", PUBLIC)


def _page(
    run: Run,
    summary: dict[str, Any],
    training: pa.Table,
    findings: pa.Table,
    made: Drawings,
    changes: Mapping[str, Any] | None,
) -> "Page":
    """What the private report is made of; `training` are the candidates against the training set."""
    from pipeline.page import Page
    from pipeline.page_clusters import clusters, mutual
    from pipeline.page_review import outcomes

    evidence = summary.get("evidence")
    review = None if evidence is None else reviewed(run)
    units = {} if review is None else unit_of(run, findings["training_key"].combine_chunks())
    return Page(
        summary=summary,
        manifest=run.ledger.record,
        shown=shown(run, training.slice(0, run.config.report.pairs), findings, evidence),
        rejects=run.table("assess", "rejects", REJECTS),
        figures=made.scores,
        faces=run.config.report.faces,
        findings=findings,
        pixels=None if evidence is None else run.table("assess", "pair_evidence", PAIR_EVIDENCE),
        roc=made.roc,
        changes=changes,
        clusters=clusters(findings, training),
        mutual=mutual(findings, training),
        reviewed=None if review is None else outcomes(findings, review, units),
        candidates=training,
    )


def _compared(run: Run, key: str, now: Audit) -> dict[str, Any] | None:
    """What changed since the audit before, also written to `changes.csv` and `.parquet`; None for a first one."""
    keep(run, key, now)
    then = previous(run)
    if then is None:
        for suffix in ("csv", "parquet"):
            (run.folder / f"changes.{suffix}").unlink(missing_ok=True)
        return None
    changes = compare(then.findings, now.findings)
    _write_tables(run.folder, "changes", changes)
    return told(changes, then.about, now.about)


def publish(run: Run, page: "Page", training: pa.Table) -> None:
    """Write `public/`: report, findings, summary and figures for anybody, and beside it what the ids in them mean.

    Files are put together aside, so that a kill leaves no folder that is public in part only.

    Parameters
    ----------
    run
        The audit.
    page
        Of its private report.
    training
        Candidates against the training set.
    """
    from pipeline.audience import COSINE_DIGITS, IDS, KEY, Names, public_candidates, public_page, run_key
    from pipeline.page import render
    from pipeline.page_clusters import clusters

    names, folder = Names(run_key(run.folder)), run.folder / PUBLIC
    made = drawings(run, page.summary, COSINE_DIGITS)
    shown_to_all = public_page(page, names, made.scores, made.roc)
    if shown_to_all.findings is not None:
        seen = public_candidates(training, CANDIDATES, names)
        shown_to_all = replace(shown_to_all, clusters=clusters(shown_to_all.findings, seen), candidates=seen)
    aside = run.folder / f"{ASIDE}{PUBLIC}"
    rmtree(aside, ignore_errors=True)
    write_private(aside / "report.html", render(shown_to_all).encode())
    write_private(aside / "summary.json", to_json(shown_to_all.summary))
    if shown_to_all.findings is not None:
        _write_tables(aside, "findings", shown_to_all.findings)
    save(aside, made)
    write_private(run.folder / IDS, parquet(names.table()))
    try:
        if folder.exists():
            rmtree(folder)
        aside.rename(folder)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be replaced ({error.strerror}). Remove it and report again.") from error
    log.info("report: %s is for anybody; keep %s and %s to yourself", folder, KEY, IDS)


def _write_tables(folder: Path, name: str, table: pa.Table) -> None:
    """The table for spreadsheets and for programs."""
    from pipeline.spreadsheet import safe_csv

    write_private(folder / f"{name}.csv", safe_csv(table))
    write_private(folder / f"{name}.parquet", parquet(table))


def parquet(table: pa.Table) -> bytes:
    """The table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


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
        units = face_units(run, role)
        members = pa.Table.from_struct_array(units["members"].combine_chunks().flatten())
        chosen = members.filter(pc.is_in(members["key"], keys)).select(["key", "place", "version"])
        self.places = {row["key"]: (row["place"] or row["key"], row["version"]) for row in chosen.to_pylist()}
        about = run.readable(units).select(["format", "uri", "anonymous"]).slice(0, 1).to_pylist()[0]
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
