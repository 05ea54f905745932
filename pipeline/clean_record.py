"""What `clean` says of itself: the tables of what stays and goes, counts before and after, and the lines at the end."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from operators.persons import label_codes
from operators.tables import Table
from pipeline.clean_images import Leading
from pipeline.clean_policy import Removal, Step
from pipeline.wording import count, percent

CONTRACT = "clean/1"
NAME = "clean.json"

MANIFEST = Table(
    name="manifest",
    version=1,
    schema=pa.schema(
        [
            pa.field("key", pa.string()),
            pa.field("identity", pa.string()),
            pa.field("digest", pa.string()),
            pa.field("kept", pa.bool_()),
            pa.field("reason", pa.string()),  # why it goes; of what stays, whether it was not audited; else null
        ]
    ),
)

REMOVED = Table(
    name="removed",
    version=2,
    schema=pa.schema(
        [
            pa.field("path", pa.string()),
            pa.field("identity", pa.string()),
            pa.field("why", pa.string()),
            pa.field("because_of", pa.string()),  # the removed image that took this one along; null: its own link
            pa.field("faces", pa.int64()),  # of this image that come close to a training person of a finding
            pa.field("face", pa.int64()),  # that of the strongest link, by its number in its image
            pa.field("finding", pa.int64()),  # rank of the finding; this and the rest are of the strongest link
            pa.field("training_identity", pa.string()),
            pa.field("training_key", pa.string()),
            pa.field("cosine", pa.float64()),
            pa.field("q", pa.float64()),
            pa.field("tier", pa.string()),
        ]
    ),
)

REASONS: Mapping[Step, str] = {
    Step.LINK: "close to a training person of a finding",
    Step.SAME_BYTES: "the same bytes as an image that goes",
    Step.IDENTITY: "the identity of an image that goes",
    Step.CLUSTER: "connected with an image that goes",
    Step.NOT_AUDITED: "not audited",
}
STAYS_UNSEEN = "stays, not audited"


def manifest(release: pa.Table, made: Removal) -> pa.Table:
    """Every release image and whether it stays, under the MANIFEST contract.

    Parameters
    ----------
    release
        Columns `key`, `identity`, `digest` and `status`, in row order.
    made
        What goes.
    """
    kept_N = made.step_N == Step.KEPT
    unseen_N = kept_N & _unseen(release)
    texts = pa.array([None, *(REASONS[step] for step in Step if step), STAYS_UNSEEN], pa.string())
    reason = texts.take(pa.array(np.where(unseen_N, len(texts) - 1, made.step_N)))
    columns = [release["key"], release["identity"], release["digest"], pa.array(kept_N), reason]
    return MANIFEST.check(pa.table(columns, schema=MANIFEST.schema).combine_chunks())


def removed(release: pa.Table, leading: Leading, made: Removal) -> pa.Table:
    """Every image that goes, with the strongest link behind it, best finding first, under the REMOVED contract."""
    gone, found = np.flatnonzero(made.step_N != Step.KEPT), leading.found
    behind = made.link_N[gone]
    gone = gone[np.lexsort((gone, made.step_N[gone], np.where(behind < 0, len(found), behind)))]
    behind, cause = made.link_N[gone], made.cause_N[gone]
    link = found.take(pa.array(behind, mask=behind < 0))
    own = release.take(pa.array(gone))
    texts = pa.array([None, *(REASONS[step] for step in Step if step)], pa.string())
    columns = {
        "path": own["key"],
        "identity": own["identity"],
        "why": texts.take(pa.array(made.step_N[gone])),
        "because_of": release["key"].take(pa.array(cause, mask=cause < 0)),
        "faces": pa.array(leading.faces_N[gone], pa.int64()),
        "finding": link["rank"],
        **{name: link[name] for name in ("face", "training_identity", "training_key", "cosine", "q", "tier")},
    }
    return REMOVED.check(pa.table([columns[name] for name in REMOVED.schema.names], schema=REMOVED.schema))


def _unseen(release: pa.Table) -> NDArray[np.bool_]:
    return np.asarray(pc.not_equal(release["status"], "ok").to_numpy(), np.bool_)


def sizes(release: pa.Table, kept_N: NDArray[np.bool_]) -> dict[str, Any]:
    """Images, audited images, identities and images of an identity, of the images in `kept_N`."""
    code_N = label_codes(release["identity"])[kept_N]
    counts = np.bincount(code_N[code_N >= 0])
    counts = counts[counts > 0]
    spread = None
    if len(counts):
        spread = {"least": int(counts.min()), "median": float(np.median(counts)), "most": int(counts.max())}
    return {
        "images": int(kept_N.sum()),
        "audited": int((kept_N & ~_unseen(release)).sum()),
        "identities": len(counts),
        "images_of_an_identity": spread,
    }


def losses(release: pa.Table, leading: Leading, made: Removal, *, faces: bool) -> dict[str, Any]:
    """How many images go for which reason, and what that does to identities; with `faces`, how many faces led to it."""
    kept_N = made.step_N == Step.KEPT
    code_N = label_codes(release["identity"])
    labelled = code_N >= 0
    before = np.bincount(code_N[labelled])
    after = np.bincount(code_N[labelled & kept_N], minlength=len(before))
    return {
        "images": int((~kept_N).sum()),
        "by_reason": {REASONS[step]: int((made.step_N == step).sum()) for step in Step if step},
        **({"faces": int(leading.faces_N.sum())} if faces else {}),
        "training_persons": len(np.unique(leading.found["person"].to_numpy()[leading.selected_L])),
        "identities_gone": int((after == 0).sum()),
        "identities_smaller": int(((after > 0) & (after < before)).sum()),
    }


def numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What an audit found, in a few numbers that can be compared with those of another."""
    training, evidence = summary["arms"]["training"], summary.get("evidence")
    found: dict[str, Any] = {name: training[name] for name in ("candidates", "persons", "release_images", "highest")}
    found |= {"threshold": summary["calibration"]["threshold"], "findings": summary["findings"]}
    if "control" in summary["arms"]:
        found["control_persons"] = summary["arms"]["control"]["persons"]
    if evidence is not None:
        excess = evidence["excess"][0] if evidence["excess"] and evidence["claim"] else None
        found |= {name: evidence[name] for name in ("grade", "claim")}
        found["listed"] = evidence["listed"] if evidence["claim"] else None
        found["excess"] = None if excess is None else {name: excess[name] for name in ("delta", "p")}
    return found


def record_of(folder: Path) -> dict[str, Any] | None:
    """The record of the last `clean` into this folder, finished or not; None if there was none."""
    try:
        record = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("contract") == CONTRACT else None


def cleaned(folder: Path) -> dict[str, Any] | None:
    """The record of the last `clean` into this folder, if it was finished."""
    record = record_of(folder)
    return record if record is not None and record.get("state") == "done" else None


def unseen_note(stays: pa.Table) -> list[str]:
    """Says how many images stay that nobody has looked at."""
    unseen = pc.sum(pc.equal(stays["reason"], STAYS_UNSEEN)).as_py() or 0
    return [f"{unseen:,} images stay that could not be audited: nothing is known of them"] if unseen else []


def parquet_bytes(table: pa.Table) -> bytes:
    """`table` as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def clean_lines(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of the lines at the end of `unveil clean`."""
    before, after, gone = record["before"], record["after"], record["removed"]
    share = percent(gone["images"] / max(before["images"], 1))
    lines = [
        ("removed", f"{gone['images']:,} of {before['images']:,} images ({share}), policy {record['policy']['policy']}")
    ]
    lines += [("", f"{amount:,}: {reason}") for reason, amount in gone["by_reason"].items() if amount]
    if "faces" in gone:
        lines.append(("", f"{count(gone['faces'], 'face')} in these images led to it"))
    lines.append(
        ("left", f"{after['images']:,} images of {count(after['identities'], 'identity', 'identities')}; "
         f"{gone['identities_gone']:,} gone, {gone['identities_smaller']:,} smaller")
    )  # fmt: skip
    lines += [("note", note) for note in record["notes"]]
    if (written := record["written"]) is not None:
        failed = sum(written["not_written"].values())
        lines.append(("written", f"{written['images']:,} images as {written['form']}; {failed:,} could not be copied"))
    again = record["audit_again"]
    if "why_not" in again:
        return [*lines, ("audit again", f"not made: {again['why_not']}")]
    old, new = again["before"], again["after"]
    for name, text in (
        ("candidates", "candidate pairs"),
        ("persons", "persons over the threshold"),
        ("listed", "listed persons"),
    ):
        if old.get(name) is not None or new.get(name) is not None:
            lines.append(("audit again", f"{text}: {_shown(old.get(name))} before, {_shown(new.get(name))} after"))
    shares = [one["excess"] and percent(one["excess"]["delta"]) for one in (old, new) if "excess" in one]
    if len(shares) == 2 and all(shares):
        lines.append(("audit again", f"excess of members over controls: {shares[0]} before, {shares[1]} after"))
    return [*lines, ("", again["note"])]


def clean_text(record: Mapping[str, Any]) -> str:
    """These lines as the terminal shows them."""
    return "\n".join(f"{name:<13} {text}" for name, text in clean_lines(record))


def _shown(value: int | None) -> str:
    return "not claimed" if value is None else f"{value:,}"
