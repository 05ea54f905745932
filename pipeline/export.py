"""export: what an audit found, for other programs: a section for a dataset card, a list for FiftyOne, a verdict for CI.

`card.md`       a section for the README of a data set on the Hugging Face Hub: aggregates only, made to be published
`fiftyone/`     `labels.csv` in FiftyOne's `CSVDataset` format: confidential, it names images
`verdict.json`  grade, counts and limit, for a job that has to decide
`verdict.sarif` the same for systems that show results of checks (SARIF 2.1.0): aggregates only

They are made from `summary.json` and committed tables; nothing is computed anew.
"""

import csv
import io
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.faults import IncompleteTable
from cluster.storage import to_json, write_private
from operators.tables import FINDINGS
from pipeline import __version__
from pipeline.assess import assess_key
from pipeline.clean import folder_of
from pipeline.clean_record import cleaned
from pipeline.config import ARMS, PLACEBO, RELEASE
from pipeline.page_evidence import claims, grade, not_claimed, sensitivity_sentence
from pipeline.sarif import sarif
from pipeline.spreadsheet import safe_text, visible
from pipeline.stage import Run
from pipeline.wording import count, percent, power

log = logging.getLogger(__name__)

VERDICT = "verdict/1"
PREFIX = "unveil_"
"""Before the names of columns, which become fields of samples: FiftyOne has `id`, `tags` and others of its own."""
FIELDS = (
    "rank", "training_identity", "training_key", "release_identity", "cosine", "same_bytes", "candidates", "p", "q",
    "tier", "reasons", "decision",
)  # fmt: skip
ROLES = (RELEASE, *ARMS, PLACEBO)
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&:@$])")


def export(run: Run, clean_folder: Path | None = None) -> None:
    """Write `export/` of the run folder.

    Parameters
    ----------
    run
        A finished audit.
    clean_folder
        Where `clean` wrote, for what the card says of it; None: where the configuration says.

    Raises
    ------
    IncompleteTable
        If the audit is not finished.
    """
    with run.timed("export") as facts:
        summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_bytes())
        made = run.commit("assess", "candidates")
        if made.key != assess_key(run, summary["calibration"]["threshold"]):
            raise IncompleteTable(f"{run.folder}/assess is of another search. Run `unveil assess` again.")
        record = cleaned(clean_folder or folder_of(run))
        if record is not None and record["audit"]["candidates"] != made.sha256:
            log.warning("export: the last `clean` is of another audit, and the card leaves it out")
            record = None
        findings = run.table("assess", "findings", FINDINGS)
        target = run.folder / "export"
        write_private(target / "card.md", card(summary, run.ledger.record["created"][:10], record).encode())
        write_private(target / "fiftyone" / "labels.csv", fiftyone_csv(findings))
        write_private(target / "verdict.json", to_json(verdict(summary)))
        write_private(target / "verdict.sarif", to_json(sarif(summary)))
        facts["findings"] = findings.num_rows
        log.info("export: %s", target)


def verdict(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a job needs to decide: `passed` is false over `assess.limit`, and null where no limit is set.

    A verdict that passed says that the limit was kept, and nothing of privacy.
    """
    evidence, limit = summary.get("evidence"), summary["limit"]
    claim = evidence is not None and bool(evidence["claim"])
    return {
        "contract": VERDICT,
        "unveil": __version__,
        "grade": None if evidence is None else evidence["grade"],
        "claim": claim,
        "listed": evidence["listed"] if evidence is not None and claim else None,
        "q": evidence["q"] if evidence is not None and claim else None,
        "excess_p": evidence["excess"][0]["p"] if evidence is not None and claim and evidence["excess"] else None,
        "findings": summary["findings"],
        "candidates": summary["arms"]["training"]["candidates"],
        "not_audited": {role: one["images"] - one["audited"] for role, one in summary["sets"].items()},
        "limit": limit,
        "passed": None if limit is None else summary["findings"] <= limit,
    }


def fiftyone_csv(findings: pa.Table) -> bytes:
    """The findings for FiftyOne's `CSVDataset` importer: one row per release image, with its best finding.

    `filepath` is the image's key, to be found under the importer's `data_path`, the folder of the release. An image
    that is the best of several findings keeps the first, as an importer would keep one only, and says how many.
    """
    rows: dict[str, dict[str, Any]] = {}
    for row in findings.to_pylist():
        known = rows.setdefault(row["release_key"], {**row, "findings": 0})
        known["findings"] += 1
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    names = (*FIELDS, "findings")
    writer.writerow(["filepath", *(PREFIX + name for name in names)])
    for path, row in rows.items():
        writer.writerow([path.encode("utf-8", "backslashreplace").decode(), *(_cell(row[name]) for name in names)])
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    """Empty for null, which the importer leaves out; text so that no spreadsheet takes it for a formula."""
    if value is None:
        return ""
    return safe_text(value) if isinstance(value, str) else str(value)


def card(summary: Mapping[str, Any], day: str, record: Mapping[str, Any] | None = None) -> str:
    """A Markdown section for a dataset card: what was audited, found, and not claimed. No name of an image or place.

    It has no line of its own that ends or begins YAML metadata, and texts from outside are escaped; the numbers stand
    once more in a YAML block, which `yaml.safe_load` reads.

    Parameters
    ----------
    summary
        `summary.json` of the audit.
    day
        When it was made.
    record
        Of `clean`, if this card is of what it left.
    """
    evidence = summary.get("evidence")
    lines = ["## Audit for leaked training faces", ""]
    lines.append(
        f"This data set was compared with the real faces that its generator was trained on, by Unveil {__version__} on "
        f"{day}. Face model: {_plain(summary['embedder']['name'])} "
        f"(SHA-256 `{str(summary['embedder']['sha256'])[:16]}`)."
    )
    lines += ["", "| set | images | audited | identities |", "|---|---|---|---|"]
    lines += [
        f"| {_plain(role)} | {one['images']:,} | {one['audited']:,} | {one['identities']:,} |"
        for role, one in sorted(summary["sets"].items(), key=lambda pair: ROLES.index(pair[0]))
    ]
    lines += ["", "### What was found", "", *(f"- {text}" for text in _found(summary, evidence))]
    if record is not None:
        lines += ["", "### What was removed", "", *(f"- {text}" for text in _removed(record))]
    lines += ["", "### What is not claimed", "", *(f"- {text}" for text in _not_claimed(evidence))]
    return "\n".join([*lines, "", *_yaml(summary, day), ""])


def _found(summary: Mapping[str, Any], evidence: Mapping[str, Any] | None) -> list[str]:
    training, calibration = summary["arms"]["training"], summary["calibration"]
    told = []
    if evidence is not None:
        shown = grade(evidence)
        told = [f"Evidence grade {shown.letter}. {shown.meaning}", *claims(evidence), sensitivity_sentence(evidence)]
    told.append(
        f"{count(training['candidates'], 'pair')} of a release image and a training image, of "
        f"{count(training['persons'], 'training person')}, are over the threshold of cosine "
        f"{calibration['threshold']:.4f} (false match rate {power(calibration['fmr'])} per pair); "
        f"{training['expected_false']:.1f} such pairs are expected by chance among {training['comparisons']:,}."
    )
    if "control" in summary["arms"]:
        control = summary["arms"]["control"]
        told.append(
            f"Of the control set, which the generator never saw, {count(control['persons'], 'person')} in "
            f"{control['comparisons']:,} comparisons."
        )
    return [_prose(text) for text in told]


def _removed(record: Mapping[str, Any]) -> list[str]:
    gone, before, after = record["removed"], record["before"], record["after"]
    share = percent(gone["images"] / max(before["images"], 1))
    told = [
        f"The numbers above are of the data set before. {gone['images']:,} of {before['images']:,} images ({share}) "
        f"were removed; {after['images']:,} images of {after['identities']:,} identities are left."
    ]
    again = record["audit_again"]
    if "after" in again:
        old, new = again["before"], again["after"]
        told.append(
            f"An audit of what is left finds {count(new['candidates'], 'pair')} over the threshold; there were "
            f"{old['candidates']:,}."
        )
        told.append(again["note"])
    if record["notes"]:
        told += [f"{note[0].upper()}{note[1:]}." for note in record["notes"]]
    return [_prose(text) for text in told]


def _not_claimed(evidence: Mapping[str, Any] | None) -> list[str]:
    if evidence is not None:
        return [_prose(text) for text in not_claimed(evidence)]
    return [
        "Any rate of error: there was no control set. Look-alikes are expected among the pairs over the threshold.",
        "That the data set is private, anonymous, lawful or free of training faces, whatever the counts.",
    ]


def _yaml(summary: Mapping[str, Any], day: str) -> list[str]:
    """The numbers as a fenced YAML block."""
    import yaml

    numbers = {"unveil": __version__, "date": day, "title": visible(str(summary["title"])), **verdict(summary)}
    numbers["threshold"] = summary["calibration"]["threshold"]
    text = yaml.safe_dump({"leakage_audit": numbers}, sort_keys=False, allow_unicode=False, width=float("inf"))
    return ["```yaml", *text.rstrip("\n").split("\n"), "```"]


def _plain(text: str) -> str:
    """Text from outside as Markdown that is drawn as itself."""
    return MARKDOWN.sub(r"\\\1", visible(text))


def _prose(text: str) -> str:
    """A sentence of our own, which may hold a word from outside: no HTML, no link, no table."""
    return re.sub(r"([\\`*_\[\]|<>])", r"\\\1", visible(text))
