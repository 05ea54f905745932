"""The report as one self-contained HTML page: no script, no request, every text from outside escaped.

`pipeline/templates/report.html.j2` says how the page looks; the sentences that depend on the result are made here,
where they can be tested. They follow the method's rules of wording: a count is given with the count that chance would
give, and no result is called privacy.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from operators.tables import REJECTS
from pipeline.page_evidence import claims, grade, looks_sentence
from pipeline.page_people import PEOPLE_OPEN, Person, people_rows, tier_class
from pipeline.page_sections import sections
from pipeline.page_sensitivity import alignment
from pipeline.spreadsheet import values, visible
from pipeline.wording import cosine, count, number, p_value, power, without_folders

REJECTS_LISTED = 200
HUB = 10
"""Candidates with one image from which its badge asks whether it is a hub."""

SIZE_RATIO = 1.5
"""Ratio of comparisons from which arms of different size are called so."""


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


def render(page: Page) -> str:
    """The page as HTML.

    A page with covered faces may be passed on, so folders of local paths are left out of it; the run folder keeps them.

    Raises
    ------
    ValueError
        If `page.faces` is neither `covered` nor `clear`.
    SchemaMismatch
        If one of the tables does not follow its contract.
    """
    if page.faces not in ("covered", "clear"):
        raise ValueError(f"faces must be 'covered' or 'clear'. Got {page.faces!r}.")
    clean = without_folders if page.faces == "covered" else str
    told = page.summary.get("evidence")
    rejects = REJECTS.check(page.rejects)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            page=page,
            summary=page.summary,
            sets={role: _set(one, clean) for role, one in page.summary["sets"].items()},
            grade=grade(told),
            told=None if told is None else sections(told),
            classes=alignment(page.summary.get("classes")),
            people=people(page),
            people_open=PEOPLE_OPEN,
            people_total=0 if page.findings is None else page.findings.num_rows,
            arms=_arms(page.summary),
            result=result(page.summary),
            cautions=[clean(one) for one in cautions(page.summary)],
            rejected=_rejected(rejects.slice(0, REJECTS_LISTED), clean),
            rejected_total=rejects.num_rows,
            manifest=[_part(name, value, clean) for name, value in page.manifest.items()],
            hub=HUB,
        )
    )


def _rejected(listed: pa.Table, clean: Callable[[str], str]) -> list[dict[str, Any]]:
    rows = [dict(zip(REJECTS.schema.names, row, strict=True)) for row in zip(*map(values, listed.columns), strict=True)]
    return [row | {"error": clean(row["error"] or "")} for row in rows]


def people(page: Page) -> list[Person]:
    """The list of people; empty without findings."""
    if page.findings is None:
        return []
    told = page.summary.get("evidence")
    q, claim = (None, False) if told is None else (told["q"], told["claim"])
    return people_rows(page.findings, page.pixels, q, claim)


def _set(one: Mapping[str, Any], clean: Callable[[str], str]) -> dict[str, Any]:
    """A set as it is shown; its form and notes are not in summaries of old audits."""
    notes = [clean(note) for note in one.get("notes", [])]
    return {**one, "uri": clean(one["uri"]), "form": one.get("form"), "notes": notes}


def result(summary: Mapping[str, Any]) -> list[str]:
    """The result in a few plain sentences: what was found, what chance would give, and what the control set gives."""
    training, control = summary["arms"]["training"], summary["arms"].get("control")
    if not training["comparisons"]:
        return ["Nothing was compared, so nothing is known: no image of one of the sets could be audited."]
    told, evidence = [_found(summary), _chance(training)], summary.get("evidence")
    if evidence is not None:
        told = claims(evidence) if evidence["claim"] else [*claims(evidence), *told]
    elif control:
        told.append(
            f"Against the control set, whom the generator never saw, the same threshold gives "
            f"{count(control['candidates'], 'candidate pair')} in {control['comparisons']:,} comparisons"
            f"{_times(ratio(training, control))}."
        )
    else:
        told.append("There is no control set, so nothing shows what people whom the generator never saw would give.")
    limit = summary["limit"]
    if limit is not None:
        over = summary["findings"] > limit
        told.append(
            f"The configured limit is {count(limit, 'finding')}: this result is {'over' if over else 'within'} it."
        )
    return told


def _found(summary: Mapping[str, Any]) -> str:
    training, threshold = summary["arms"]["training"], summary["calibration"]["threshold"]
    people = summary["sets"]["training"]["identities"]
    if not training["candidates"]:
        return (
            f"No pair of a release and a training image reaches the threshold of cosine {cosine(threshold)}; the "
            f"highest is {cosine(training['highest'])}. This does not show that the release is free of training faces."
        )
    whom = f"{people:,} training people" if people else f"{summary['sets']['training']['audited']:,} training images"
    verb = "has" if training["persons"] == 1 else "have"
    return f"{training['persons']:,} of {whom} {verb} at least one candidate pair in the release."


def _chance(training: Mapping[str, Any]) -> str:
    low, high = training["expected_false_low"], training["expected_false_high"]
    chance = (
        f"false matches alone would give about {number(training['expected_false'])} ({number(low)} to {number(high)}) "
        f"at this number of comparisons"
    )
    if not training["candidates"]:
        return f"If the release were like other real people, {chance}."
    verb = "is" if training["candidates"] == 1 else "are"
    told = f"There {verb} {count(training['candidates'], 'candidate pair')}; {chance}"
    return f"{told}." if training["candidates"] > high else f"{told}, so the count by itself is no sign of leakage."


def cautions(summary: Mapping[str, Any]) -> list[str]:
    """Warnings that follow from how this audit was set up."""
    arms, found = summary["arms"], list(summary.get("warnings", []))
    if not summary["calibration"]["labels"]:
        found.append(
            "The training set has no complete person labels. Pairs of one person then count as non-mated during "
            "calibration, which pushes the threshold up: real leaks can stay below it."
        )
    control = arms.get("control")
    evidence = summary.get("evidence")
    comparable = evidence is None or evidence["claim"]
    if comparable and control and control["comparisons"] and arms["training"]["comparisons"]:
        sizes = sorted((arms["training"]["comparisons"], control["comparisons"]))
        if sizes[1] > SIZE_RATIO * sizes[0]:
            found.append(
                "Training and control differ in size. A larger set gives higher best matches by chance alone: compare "
                "the numbers per comparison, not the curves."
            )
    lost = sum(sum(one["rejected"].values()) for one in summary["sets"].values())
    if lost:
        found.append(f"{count(lost, 'image')} could not be audited. Whom they show is unknown; see Coverage.")
    if noted := [role for role, one in summary["sets"].items() if one.get("notes")]:
        found.append(f"There are notes on {' and '.join(noted)}; see Coverage.")
    if evidence is not None and (looked := looks_sentence(evidence)):
        found.append(looked)
    return found


def ratio(training: Mapping[str, Any], control: Mapping[str, Any]) -> float | None:
    """Candidates per comparison of training over those of control; None where control has none."""
    if not control["candidates"] or not training["comparisons"]:
        return None
    return float(training["candidates"] / training["comparisons"] / (control["candidates"] / control["comparisons"]))


def _times(per_comparison: float | None) -> str:
    if per_comparison is None:
        return ""
    return f"; per comparison, training gives {number(per_comparison)} times as many as control"


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
