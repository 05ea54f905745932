"""The verdict of an audit in SARIF 2.1.0 (OASIS standard, 2020), which code hosts and CI systems show beside a change.

Aggregates only: no image, person or place is named, so that the file can be shown where others read along.
Every result points at `summary.json`, because viewers want a file and no other may be named.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pipeline import __version__
from pipeline.page_evidence import SIGNIFICANT, claims, excess_sentence, grade
from pipeline.spreadsheet import visible
from pipeline.wording import count

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
PLACE = "summary.json"


class Rule(NamedTuple):
    """What an audit can say to a machine."""

    id: str
    level: str
    """Of its results: error, warning or note."""
    short: str
    full: str


RULES = (
    Rule(
        "leakage-found", "error", "Training people are listed as leaked",
        "The controlled audit lists training people at its false discovery rate. Of those listed, at most that share "
        "is expected not to be linked to training membership.",
    ),
    Rule(
        "excess-found", "error", "Training people match the release more closely than control people",
        "More training people than control people are over a bar that the control set gives (exact test). This holds "
        "for the sets as a whole and names nobody.",
    ),
    Rule(
        "limit-exceeded", "error", "More findings than the configured limit",
        "The number of training people with a candidate or on the list is over assess.limit.",
    ),
    Rule(
        "candidates-found", "warning", "Pairs over the threshold",
        "Pairs of a release image and a training image are over the threshold. Look-alikes are expected among them; "
        "somebody has to compare the images.",
    ),
    Rule(
        "coverage-incomplete", "warning", "Images that could not be audited",
        "Nothing is known of images that could not be audited. summary.json counts them by set and reason.",
    ),
    Rule(
        "no-control", "warning", "No control set was tested",
        "Without real faces that the generator never saw there is no rate of error, and no claim.",
    ),
    Rule(
        "no-claim", "warning", "A check of comparability failed",
        "The control set cannot carry a claim, so that the audit gives a ranked list without rates of error.",
    ),
    Rule(
        "sensitivity-unknown", "note", "How much would have been found was not measured",
        "No copies were planted. Run `unveil plant` to know what share of leaks of which kind this audit finds.",
    ),
)  # fmt: skip


def sarif(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The log file: one run, the rules, and a result for each that applies. No result says that a release is private.

    Parameters
    ----------
    summary
        `summary.json` of the audit.
    """
    numbers = {rule.id: at for at, rule in enumerate(RULES)}
    results = [
        {
            "ruleId": rule,
            "ruleIndex": numbers[rule],
            "level": RULES[numbers[rule]].level,
            "message": {"text": visible(text)},
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": PLACE}}}],
            "partialFingerprints": {"unveilRule/v1": rule},
        }
        for rule, text in _results(summary)
    ]
    driver = {"name": "Unveil", "semanticVersion": __version__, "rules": [_descriptor(rule) for rule in RULES]}
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "columnKind": "utf16CodeUnits", "results": results}],
    }


def _results(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rule and message of all that applies."""
    evidence, training, limit = summary.get("evidence"), summary["arms"]["training"], summary["limit"]
    claim = evidence is not None and bool(evidence["claim"])
    if evidence is not None and claim and evidence["listed"]:
        yield "leakage-found", f"Evidence grade {evidence['grade']}. {claims(evidence)[0]}"
    if evidence is not None and claim and evidence["excess"] and evidence["excess"][0]["p"] < SIGNIFICANT:
        yield "excess-found", f"Evidence grade {evidence['grade']}. {excess_sentence(evidence)}"
    if limit is not None and summary["findings"] > limit:
        yield "limit-exceeded", f"{count(summary['findings'], 'finding')}; the limit is {limit:,}."
    if training["candidates"]:
        yield (
            "candidates-found",
            f"{count(training['candidates'], 'pair')} over the threshold, of "
            f"{count(training['persons'], 'training person')}; {training['expected_false']:.1f} pairs are expected by "
            f"chance among {training['comparisons']:,}.",
        )
    lost = {role: one["images"] - one["audited"] for role, one in sorted(summary["sets"].items())}
    if any(lost.values()):
        sets = ", ".join(f"{role} {images:,}" for role, images in lost.items() if images)
        yield "coverage-incomplete", f"{count(sum(lost.values()), 'image')} could not be audited: {sets}."
    if evidence is None:
        yield "no-control", grade(None).meaning
    elif not claim:
        yield "no-claim", grade(evidence).meaning
    if evidence is not None and not evidence["recall"]:
        yield "sensitivity-unknown", "What share of planted copies this audit would find was not measured."


def _descriptor(rule: Rule) -> dict[str, Any]:
    name = "".join(part.capitalize() for part in rule.id.split("-"))
    return {
        "id": rule.id,
        "name": name,
        "shortDescription": {"text": f"{rule.short}."},
        "fullDescription": {"text": rule.full},
        "defaultConfiguration": {"level": rule.level},
    }
