"""Entries of the catalogue in plain words: one in full, all in a table, and the configuration that each leads to."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from pipeline.entries import CERTAINTIES, Arm, Entry, Fact, Figure, Relation, Size, TrainedOn

WIDTH = 100
"""Columns of running text."""
UNKNOWN = "not known"
RELATED: Mapping[str, str] = {
    "part_of": "part of {}",
    "made_from": "made from {}",
    "shares_people": "holds some of the same people as {}",
}


def table(known: Mapping[str, Entry]) -> str:
    """A line for each entry; of a real set, the fourth column says what it was taken from."""
    head = ("name", "images", "people", "generator saw / taken from", "form", "paper")
    rows = [_row(one) for one in known.values()]
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]
    lines = [_line(head, widths), _line(["-" * width for width in widths], widths)]
    last = ""
    for one, row in zip(known.values(), rows, strict=True):
        if last not in ("", one.kind):
            lines.append("")
        last = one.kind
        lines.append(_line(row, widths))
    return "\n".join(lines) + "\n"


def text(one: Entry, known: Mapping[str, Entry]) -> str:
    """All that is known of a set; each group of facts ends with its certainty and source."""
    lines = [f"{one.title} ({one.name})", f"{'synthetic release' if one.kind == 'release' else 'real faces'}"]
    if one.note:
        lines += _wrapped(one.note, "  ")
    for heading, groups in _sections(one, known):
        lines += ["", heading]
        for said, fact in groups:
            lines += _wrapped(said, "  ")
            if fact is not None:
                lines += _wrapped(fact.note, "    ") if fact.note else []
                lines.append(f"    [{fact.certainty}] {fact.source}")
    lines += ["", "Configuration", textwrap.indent(config_lines(one, known), "  ").rstrip(), ""]
    lines += [f"[{name}]: {meaning}" for name, meaning in CERTAINTIES.items()]
    return "\n".join(lines) + "\n"


def config_lines(one: Entry, known: Mapping[str, Entry]) -> str:
    """The YAML that audits a release with the first of the proposed sets, or that takes a real set into an audit."""
    roles, remarks = {"training": one}, {}
    if one.audit:
        controls, anchors = one.audit.controls, one.audit.anchors
        chosen = [("training", one.audit.training), ("control", [arm.set for arm in controls])]
        chosen += [("anchor", [arm.set for arm in anchors])]
        roles = {"release": one} | {role: known[names[0]] for role, names in chosen if names}
        if controls and controls[0].part:
            remarks["control"] = f"  # only {controls[0].part}"
    lines = ["sets:", *(f"  {role}: {_set_line(role, other)}{remarks.get(role, '')}" for role, other in roles.items())]
    if "training" not in roles:
        lines.append("  training: {uri: /path/to/training}  # any real set: its generator saw none that is known of")
    # One mode holds for all sets of an audit; `detect` is right for cut-out faces too, only slower.
    aligned = all(other.crop.mode == "aligned" for other in roles.values())
    return "\n".join([*lines, f"faces: {{mode: {'aligned' if aligned else 'detect'}}}"]) + "\n"


def _set_line(role: str, one: Entry) -> str:
    options = {"uri": f"/path/to/{role}", "catalogue": one.name}
    if one.form.format:
        options["format"] = one.form.format
    options["identity"] = f'"{one.people.option}"' if ":" in one.people.option else one.people.option
    return "{" + ", ".join(f"{key}: {value}" for key, value in options.items()) + "}"


def _row(one: Entry) -> tuple[str, ...]:
    size = one.sizes[0]
    seen = [t.set for t in one.generator.trained_on] if one.generator else _taken_from(one)
    nothing = "no real face" if one.generator else "-"
    paper = one.paper.arxiv or one.paper.venue or "-"
    counts = (_count(size, size.images), _count(size, size.identities))
    return (one.name, *counts, ", ".join(dict.fromkeys(seen)) or nothing, one.form.format or "?", paper)


def _taken_from(one: Entry) -> list[str]:
    return [relation.set for relation in one.relations if relation.kind != "shares_people"]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Numbers, the second and third cell, to the right; all others to the left."""
    padded = [
        cell.rjust(width) if at in (1, 2) else cell.ljust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _count(size: Size, value: int | None) -> str:
    return "?" if value is None else f"{'~' if size.rounded else ''}{value:,}"


def _sections(one: Entry, known: Mapping[str, Entry]) -> Iterator[tuple[str, list[tuple[str, Fact | None]]]]:
    paper = one.paper
    where = ", ".join(filter(None, (f"arXiv {paper.arxiv}" if paper.arxiv else "", paper.venue))) or UNKNOWN
    yield "Paper", [(f"{paper.title} ({where})", paper)]
    yield "Size", [(_size(size), size) for size in one.sizes]
    if one.generator:
        seen = [(_seen(t, known), t) for t in one.generator.trained_on]
        yield "Generator", [(one.generator.method, one.generator), *seen]
    yield "Form", [(f"{one.form.format or UNKNOWN}: {one.form.layout}. Example: {one.form.key or UNKNOWN}", one.form)]
    pixels = f"{one.crop.width} x {one.crop.height} pixels" if one.crop.width else f"pixels {UNKNOWN}"
    yield "Faces", [(f"faces.mode={one.crop.mode}; {pixels}", one.crop)]
    yield "Identities", [(f"identity: {one.people.option}; {one.people.meaning}", one.people)]
    yield "Licence and access", [(f"{one.licence.terms or 'terms ' + UNKNOWN}. {one.licence.access}", one.licence)]
    if one.relations:
        yield "Related sets", [(_related(relation, known), relation) for relation in one.relations]
    if one.leakage:
        yield "Published on leakage", [(_figure(figure, known), figure) for figure in one.leakage]
    if one.audit:
        titles = ", ".join(known[name].title for name in one.audit.training) or "none: no real face is known of"
        yield "Audit: training set", [(titles, None), *([(one.audit.note, None)] if one.audit.note else [])]
        yield "Audit: control", [(_arm(arm, known), None) for arm in one.audit.controls] or [("none known", None)]
        yield "Audit: anchor", [(_arm(arm, known), None) for arm in one.audit.anchors] or [("none known", None)]


def _size(size: Size) -> str:
    return f"{size.version}: images {_count(size, size.images)}, people {_count(size, size.identities)}"


def _seen(one: TrainedOn, known: Mapping[str, Entry]) -> str:
    return f"trained on {known[one.set].title}: {one.role}"


def _related(one: Relation, known: Mapping[str, Entry]) -> str:
    return RELATED[one.kind].format(known[one.set].title)


def _figure(one: Figure, known: Mapping[str, Entry]) -> str:
    value = f": {one.value:g}" if one.value is not None else ""
    against = f"against {known[one.against].title}; " if one.against else ""
    return f"{one.what}{value} ({against}{one.how})"


def _arm(arm: Arm, known: Mapping[str, Entry]) -> str:
    return f"{known[arm.set].title}{f', only {arm.part}' if arm.part else ''}: {arm.why}"


def _wrapped(said: str, indent: str) -> list[str]:
    return textwrap.wrap(
        said, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
