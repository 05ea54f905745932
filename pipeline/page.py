"""The report as one self-contained HTML page: no request, every text from outside escaped.

`pipeline/templates/report.html.j2` says how the page looks; the sentences that depend on the result are made in the
`page_*` modules, where they can be tested. One own script sorts, filters and pages the long tables. The page's policy
(Content-Security-Policy) names it and the style sheet by their digests, so that nothing else is run, whatever a name
holds; without scripts the page shows the first rows.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from operators.tables import REJECTS
from pipeline.page_changes import changes
from pipeline.page_clusters import drawings
from pipeline.page_evidence import grade
from pipeline.page_first import checked, steps
from pipeline.page_lists import cluster_grid, pairs_table, rejects_table
from pipeline.page_people import HELD, Person, people_rows, people_table, tier_class
from pipeline.page_result import cautions, ratio, result
from pipeline.page_review import section as review_section
from pipeline.page_sections import sections
from pipeline.page_sensitivity import alignment
from pipeline.spreadsheet import visible
from pipeline.wording import cosine, number, p_value, power, without_folders

HUB = 10
"""Candidates with one image from which its badge asks whether it is a hub."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A candidate as it is shown: a row of CANDIDATES with a JPEG of each side, None where the image is gone."""

    rank: int
    cosine: float
    release_key: str
    release_identity: str | None
    gallery_key: str
    gallery_identity: str | None
    same_bytes: bool
    release_multiplicity: int
    gallery_multiplicity: int
    release_picture: bytes | None
    gallery_picture: bytes | None
    tier: str | None = None
    """Of the training person's finding."""
    judged: bool = True
    """Whether it was this pair whose images were compared; the person's tier can rest on another pair."""
    q: float | None = None
    """Of the training person; None where nothing was tested or claimed."""
    listed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What the report is made of."""

    summary: Mapping[str, Any]
    """`summary.json` of the assess stage."""
    manifest: Mapping[str, Any]
    """`run.json` of the run; shown as it is, whatever it holds."""
    shown: Sequence[Shown]
    """Candidates against the training set, best first."""
    rejects: pa.Table
    """Rows of the REJECTS contract of all sets."""
    figures: Sequence[tuple[str, str]]
    """Caption and inline SVG. The SVG is inserted unescaped, so it must come from `pipeline.figures`."""
    faces: str
    """`covered` or `clear`: what was done to the pictures."""
    findings: pa.Table | None = None
    """Rows of the FINDINGS contract, best first; None: no list of people is shown."""
    pixels: pa.Table | None = None
    """Rows of the PAIR_EVIDENCE contract; None where nothing was looked at."""
    roc: str | None = None
    """Inline SVG of `pipeline.roc`."""
    audience: str = "private"
    """`private`, or `public`: names of images and identities are keyed hashes already, and there is no picture."""
    changes: Mapping[str, Any] | None = None
    """Comparison with the previous audit; None where there is none."""
    clusters: Sequence[Mapping[str, Any]] = ()
    """Findings that hang together (`pipeline.page_clusters.clusters`), largest first."""
    mutual: Mapping[int, tuple[int, int]] | None = None
    """By rank of the finding: places of its two images in each other's lists (`pipeline.page_clusters.mutual`)."""
    reviewed: Mapping[int, str] | None = None
    """By rank of the finding: what reviewers said of its pair (`pipeline.page_review.outcomes`)."""
    candidates: pa.Table | None = None
    """Rows of the CANDIDATES contract of the training set for a table of pairs; None: only those of `shown`."""


def render(page: Page) -> str:
    """The page as HTML.

    A page with covered faces may be passed on, so folders of local paths are left out of it; the run folder keeps them.

    Raises
    ------
    ValueError
        If `page.faces` is neither `covered` nor `clear`, `page.audience` neither `private` nor `public`, or a public
        page has pictures.
    SchemaMismatch
        If one of the tables does not follow its contract.
    """
    _refuse(page)
    clean = without_folders if page.faces == "covered" else str
    told = page.summary.get("evidence")
    rejects = REJECTS.check(page.rejects)
    script, style = (_file(name) for name in ("report.js", "style.css"))
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            page=page,
            script=script,
            style=style,
            policy=_policy(script, style),
            summary=page.summary,
            sets={role: _set(one, clean) for role, one in page.summary["sets"].items()},
            grade=grade(told),
            told=None if told is None else sections(told),
            review=review_section(None if told is None else told.get("review")),
            classes=alignment(page.summary.get("classes")),
            checked=checked(page.summary, page.manifest),
            steps=[] if page.audience == "public" else steps(page.summary),
            arms=_arms(page.summary),
            result=result(page.summary),
            cautions=[clean(one) for one in cautions(page.summary)],
            rejects=rejects_table(rejects, clean),
            rejected_total=rejects.num_rows,
            manifest=[_part(name, value, clean) for name, value in page.manifest.items()],
            hub=HUB,
            **_findings(page),
        )
    )


def _refuse(page: Page) -> None:
    if page.faces not in ("covered", "clear"):
        raise ValueError(f"faces must be 'covered' or 'clear'. Got {page.faces!r}.")
    if page.audience not in ("private", "public"):
        raise ValueError(f"audience must be 'private' or 'public'. Got {page.audience!r}.")
    pictures = any(one.release_picture or one.gallery_picture for one in page.shown)
    if page.audience == "public" and (pictures or page.faces == "clear"):
        raise ValueError(f"shown must hold no picture with audience 'public'. Got faces {page.faces!r}.")


def _findings(page: Page) -> dict[str, Any]:
    """What the template shows of findings, pairs, clusters and changes."""
    told = page.summary.get("evidence")
    claim, second = (False, False) if told is None else (told["claim"], len(told["models"]) > 1)
    rows = people(page)
    names = {one.row["rank"]: one.row["training_identity"] or one.row["training_key"] for one in rows}
    return {
        "people": people_table(rows, claim, second, told is not None) if rows else None,
        "people_total": 0 if page.findings is None else page.findings.num_rows,
        "held": HELD,
        "pairs": pairs_table(page.candidates),
        "clusters": cluster_grid(page.clusters, {one.row["rank"] for one in rows if one.listed} if claim else None),
        "clusters_total": len(page.clusters),
        "graphs": drawings(page.clusters, names),
        "changes": changes(page.changes, claim),
    }


def people(page: Page) -> list[Person]:
    """The list of people; empty without findings."""
    if page.findings is None:
        return []
    told = page.summary.get("evidence")
    q, claim = (None, False) if told is None else (told["q"], told["claim"])
    return people_rows(page.findings, page.pixels, q, claim, page.mutual, page.reviewed)


def _file(name: str) -> Markup:
    """A file of the templates, to be inserted as it is."""
    return Markup(files("pipeline").joinpath("templates", name).read_text("utf-8"))  # noqa: S704 - our own


def _policy(script: str, style: str) -> str:
    """The page's policy: nothing is loaded but its own pictures, and no other script runs.

    Style attributes stay allowed, because the figures have them.
    """
    digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in (script, style)]
    return (
        f"default-src 'none'; img-src data:; script-src 'sha256-{digests[0]}'; style-src 'unsafe-inline'; "
        f"style-src-elem 'sha256-{digests[1]}'; base-uri 'none'; form-action 'none'"
    )


def _set(one: Mapping[str, Any], clean: Callable[[str], str]) -> dict[str, Any]:
    """A set as it is shown; its form and notes are not in summaries of old audits."""
    notes = [clean(note) for note in one.get("notes", [])]
    return {**one, "uri": clean(one["uri"]), "form": one.get("form"), "notes": notes}


def _arms(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(role, summary["arms"][role]) for role in ("training", "control", "anchor") if summary["arms"].get(role)]


def _part(name: str, value: Any, clean: Callable[[str], str]) -> dict[str, Any]:
    """One entry of the manifest: a section of leaves, or a single value under its own name."""
    leaves = _flat(value, clean)
    scalar = not isinstance(value, Mapping)
    return {"name": name, "scalar": scalar, "leaves": [(name, text) for _, text in leaves] if scalar else leaves}


def _flat(value: Any, clean: Callable[[str], str], dotted: str = "") -> list[tuple[str, str]]:
    """Leaves of nested mappings as dotted name and text, so that any manifest can be shown."""
    if isinstance(value, Mapping) and value:
        names = {name: f"{dotted}.{clean(str(name))}" if dotted else clean(str(name)) for name in value}
        return [leaf for name, one in value.items() for leaf in _flat(one, clean, names[name])]
    if isinstance(value, (list, tuple)):
        return [(dotted, ", ".join(clean(str(one)) for one in value) or "none")]
    return [(dotted, "none" if value is None or value == {} else clean(str(value)))]


def _data_uri(picture: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"


def _finalize(value: Any) -> Any:
    """Make every text that the template prints visible, before autoescape; markup of the template's own passes."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _drawing(svg: str) -> Markup:
    """A figure of `pipeline.figures` for insertion: inside HTML the namespace is implied."""
    if not svg.startswith("<svg"):
        raise ValueError(f"a figure must be one <svg> element of pipeline.figures. Got {svg[:40]!r}.")
    return Markup(svg.replace(' xmlns="http://www.w3.org/2000/svg"', ""))  # noqa: S704 - made by pipeline.figures


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "cosine": cosine,
        "power": power,
        "p_value": p_value,
        "tier_class": tier_class,
        "data_uri": _data_uri,
        "drawing": _drawing,
    }
    environment.globals |= {"ratio": ratio}
    return environment
