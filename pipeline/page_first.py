"""How much was checked and what to do next, for the report's first screen."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.page_evidence import Stat
from pipeline.wording import count, known

Summary = Mapping[str, Any]

AUDITED = 0.99
"""Share of a set's images that could be audited below which the first step is to find out why."""
REVIEWED = 100
"""Pairs that a review is begun with at most (`review.pairs`)."""


class Step(NamedTuple):
    """Something to do."""

    says: str
    command: str = ""
    """What to type; empty where there is no command for it. CONFIG stands for the configuration of the audit."""


def checked(summary: Summary, manifest: Mapping[str, Any]) -> list[Stat]:
    """How many images could be audited, and how many comparisons were made."""
    sets = summary["sets"]
    images, audited = (sum(one[name] for one in sets.values()) for name in ("images", "audited"))
    says = f"of all images could be audited: {audited:,} of {images:,}"
    shares = {role: one["audited"] / one["images"] for role, one in sets.items() if one["images"]}
    if len(shares) > 1 and shares[worst := min(shares, key=lambda role: shares[role])] < 1:
        says += f"; of the {worst} set {_share(sets[worst]['audited'], sets[worst]['images'])}"
    comparisons = f"{summary['arms']['training']['comparisons']:,}"
    return [
        Stat(_share(audited, images) if images else "none", says),
        Stat(comparisons, f"comparisons of a release and a training image{_again(manifest)}"),
    ]


def _share(audited: int, images: int) -> str:
    """A share in per cent, rounded down, so that one lost image in many is not called 100 %."""
    return f"{audited * 10_000 // images / 100:g} %"


def _again(manifest: Mapping[str, Any]) -> str:
    """What the certificate of the search says; empty where the manifest has none of this form."""
    found: Any = manifest
    for name in ("stages", "search", "certificate"):
        found = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(found.get("comparisons_searched_again"), int):
        return ""
    outcome = found.get("outcome")
    return f"; {found['comparisons_searched_again']:,} searched again by another path: {outcome}" if outcome else ""


def steps(summary: Summary) -> list[Step]:
    """What follows from the result, the most urgent first."""
    if not summary["arms"]["training"]["comparisons"]:
        return [Step("Find out why no image could be audited: Coverage has the reasons.", "unveil doctor CONFIG")]
    told = [*_coverage(summary), *_control(summary), *_findings(summary), *_sensitivity(summary)]
    return told or [
        Step("State this result with its sensitivity. Audit again when the release, or what is known of it, changes.")
    ]


def _coverage(summary: Summary) -> list[Step]:
    low = [
        f"{one['images'] - one['audited']:,} of {one['images']:,} in the {role} set"
        for role, one in summary["sets"].items()
        if one["images"] and one["audited"] < AUDITED * one["images"]
    ]
    if not low:
        return []
    return [Step(f"Raise the coverage: images that could not be audited are {', '.join(low)}. See Coverage.")]


def _control(summary: Summary) -> list[Step]:
    evidence = summary.get("evidence")
    if "control" not in summary["arms"]:
        return [
            Step(
                "Get a control set: real faces that the generator never saw, prepared like the training set. Without "
                "one no rate of error can be stated, and no review can be blind.",
                "unveil run CONFIG sets.control.uri=FOLDER",
            )
        ]
    if evidence is None:
        return [
            Step("Have the control set tested as evidence for persons.", "unveil run CONFIG assess.controlled=true")
        ]
    if not evidence["claim"]:
        return [
            Step(
                "Repair the comparison: a check of the control set failed (see the reasons). Prepare both sets alike, "
                "or take control people who are more like those of the training set, and audit again.",
                "unveil run CONFIG",
            )
        ]
    shortest = evidence["shortest_list"]
    if not known(shortest) or shortest > evidence["persons"]["tested"]["training"]:
        return [Step("Enlarge the control set: with so few people no list can be supported.", "unveil run CONFIG")]
    return []


def _findings(summary: Summary) -> list[Step]:
    evidence = summary.get("evidence")
    claim = evidence is not None and evidence["claim"]
    found = evidence["listed"] if claim and evidence else summary["findings"]
    if not found:
        return []
    told = []
    if evidence is None:
        told.append(
            Step(
                "Look at the pairs: this makes a page with faces visible, for the eyes of those who may see them.",
                "unveil report CONFIG report.faces=clear",
            )
        )
    elif evidence.get("review") is None:
        pairs = min(REVIEWED, found)
        told.append(
            Step(
                f"Have people review {count(pairs, 'pair')}, blind and mixed with as many decoys.",
                f"unveil review CONFIG review.pairs={pairs}",
            )
        )
    told.append(_clean(claim))
    return told


def _clean(claim: bool) -> Step:
    if claim:
        return Step("Take the findings out of the release, and see what remains.", "unveil clean CONFIG")
    return Step(
        "Or take all candidates out of the release, look-alikes included, and see what remains.",
        "unveil clean CONFIG clean.findings=candidates",
    )


def _sensitivity(summary: Summary) -> list[Step]:
    evidence = summary.get("evidence")
    if evidence is None or evidence.get("recall"):
        return []
    return [Step("Measure how much this audit would have found.", "unveil plant CONFIG")]
