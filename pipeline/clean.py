"""clean: the release without its findings, as a list of what stays, and what an audit of that finds.

findings -> release images that go -> manifest.csv, manifest.parquet, removed.csv -> images written anew, if asked for
         -> audit of what stays -> clean.json

Nothing of the release itself is changed, and nothing in `clean.out` that is not of an earlier `clean`. What the second
audit no longer finds is what was removed because it was found: it does not show that the release is private.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.faults import IncompleteTable
from cluster.storage import private_folder, to_json, write_private
from operators.addresses import public
from operators.errors import ConfigError
from operators.formats import FORMATS
from operators.persons import label_codes
from operators.sources import within
from operators.tables import UNITS
from pipeline.assess import assess_key
from pipeline.clean_audit import audited_again
from pipeline.clean_images import Images, Leading, by_image, near_images, release_images
from pipeline.clean_links import links, near_copies
from pipeline.clean_policy import POLICIES, Links, Near, Release, Removal, Step, removal
from pipeline.clean_record import (
    CONTRACT,
    MANIFEST,
    NAME,
    losses,
    manifest,
    numbers,
    parquet_bytes,
    record_of,
    removed,
    sizes,
    unseen_note,
)
from pipeline.clean_sinks import SINKS
from pipeline.clean_write import kept_list, rewrite
from pipeline.search import finished
from pipeline.spreadsheet import safe_csv
from pipeline.stage import Run, fingerprint

log = logging.getLogger(__name__)

UNAUDITED = ("keep", "remove")
FINDINGS_OF = ("listed", "candidates")
SELECTION = (
    "The second audit looks at the same people with the same face model as the one that chose what to remove, so it "
    "must find less. It shows what is left of these findings, not that there are no others."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanConfig:
    """What is taken out of the release, and what is made of the rest."""

    out: str = ""
    """Folder of the results. Empty: `clean` in the run folder."""
    policy: str = "image"
    """What goes with a finding: `image`, the release images that come close; `identity`, also all images of their
    synthetic identities; `cluster`, also everything connected with them: images close to one training person, or near
    copies of one another (which needs `search.within=[release]`)."""
    findings: str = "listed"
    """Which findings: `listed`, persons with a q-value of `q` or less, which needs a controlled audit that may claim
    it; or `candidates`, every pair over the threshold, look-alikes and false ones included."""
    q: float | None = None
    """False discovery rate of the list. Empty: that of the audit."""
    unaudited: str = "keep"
    """What becomes of images that could not be audited: `keep` or `remove`."""
    near: float = 0.9
    """Cosine from which two release images are near copies, for `policy=cluster`."""
    write: str = "none"
    """Write the images that stay anew, into `out/release`: `folder`, `webdataset`, `recordio`, or `none`."""
    shard_images: int = 10_000
    """Images of a WebDataset shard."""
    reaudit: bool = True
    """Whether what stays is audited again, from the embeddings that are there."""

    def __post_init__(self) -> None:
        allowed = {"policy": POLICIES, "findings": FINDINGS_OF, "unaudited": UNAUDITED, "write": ("none", *SINKS)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}. Got {getattr(self, name)!r}.")
        if self.q is not None and not 0 < self.q < 1:
            raise ValueError(f"q must be between 0 and 1. Got {self.q}.")
        if not 0 < self.near <= 1:
            raise ValueError(f"near must be a cosine over 0. Got {self.near}.")
        if self.shard_images < 1:
            raise ValueError(f"shard_images must be at least 1. Got {self.shard_images}.")


def folder_of(run: Run, options: CleanConfig | None = None) -> Path:
    """Where the results are."""
    return Path((options or run.config.clean).out or run.folder / "clean")


def clean(run: Run, options: CleanConfig | None = None) -> None:
    """Decide what goes, write the lists, and the images if asked for, and audit what stays.

    Raises
    ------
    ConfigError
        If the policy needs what this audit does not have, or `clean.out` holds other things.
    IncompleteTable
        If the audit is not finished, or is of other sets or options than these.
    """
    options = options or run.config.clean
    with run.timed("clean") as facts:
        notes: list[str] = []
        evidence = _summary(run).get("evidence")
        _refuse_vectors(run, options)
        level, images = _level(options, evidence, run, notes), release_images(run)
        release, near = images.table, _near(run, images, options, notes)
        found = links(run, evidence, images.keys)
        leading = by_image(images, found, _selected(found, level))
        made = _removal(release, leading, near, options)
        kept_N = made.step_N == Step.KEPT
        stays = manifest(release, made)
        out, written = _begun(run, options, stays)
        write_private(out / "manifest.csv", kept_list(run, kept_N))
        write_private(out / "manifest.parquet", parquet_bytes(stays))
        write_private(out / "removed.csv", safe_csv(removed(release, leading, made)))
        if options.write != "none" and written is None:
            written = _write(run, options, out, kept_N, stays)
        counts = losses(release, leading, made, faces=run.config.faces.several == "all")
        record: dict[str, Any] = {
            "audit": {"title": run.config.title, "candidates": run.commit("assess", "candidates").sha256},
            "policy": {name: value for name, value in asdict(options).items() if name != "out"} | {"q": level},
            "before": sizes(release, np.ones(len(kept_N), bool)),
            "after": sizes(release, kept_N),
            "removed": counts,
            "notes": [*notes, *unseen_note(stays)],
            "written": written,
            "audit_again": reaudit(run, options),
        }
        write_private(out / NAME, to_json({"contract": CONTRACT, "state": "done", **record}))
        facts |= {name: counts[name] for name in ("images", "training_persons", "identities_gone")}
        log.info("clean: %d of %d release images removed; %s says why", counts["images"], len(kept_N), out / NAME)


def reaudit(run: Run, options: CleanConfig | None = None) -> dict[str, Any]:
    """What an audit of the images that stay finds, beside what the audit found; or why there is none.

    It reads which images stay from `manifest.parquet` of the last `clean`.
    """
    options = options or run.config.clean
    out = folder_of(run, options)
    stays = MANIFEST.check(pq.read_table(out / "manifest.parquet"))
    release = release_images(run).table
    if not stays["key"].equals(release["key"]):
        raise IncompleteTable(f"{out}/manifest.parquet is of another release. Run `unveil clean` again.")
    kept_N = np.asarray(stays["kept"].to_numpy(), np.bool_)
    if not options.reaudit:
        return {"why_not": "clean.reaudit is false"}
    if kept_N.all():
        return {"why_not": "nothing was removed, so the audit itself says what is left"}
    if not (kept_N & np.asarray(pc.equal(release["status"], "ok").to_numpy(), np.bool_)).any():
        return {"why_not": "no image that was audited is left"}
    inner = audited_again(run, kept_N, out / "audit", out / "manifest.csv")
    after = json.loads((inner.folder / "summary.json").read_bytes())
    return {"before": numbers(_summary(run)), "after": numbers(after), "note": SELECTION}


def _summary(run: Run) -> dict[str, Any]:
    """The summary of the finished audit; IncompleteTable if it is of another search."""
    made = run.commit("assess", "candidates")
    summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_bytes())
    finished(run)
    if made.key != assess_key(run, summary["calibration"]["threshold"]):
        raise IncompleteTable(f"{run.folder}/assess is of another search. Run `unveil assess` again.")
    return summary


def _level(options: CleanConfig, evidence: Mapping[str, Any] | None, run: Run, notes: list[str]) -> float | None:
    """The false discovery rate of what is removed; None where every candidate is."""
    if options.findings == "candidates":
        notes.append("candidates are removed whatever their q-value: look-alikes and chance pairs are among them")
        return None
    if evidence is None or not evidence["claim"]:
        has = "has no control set" if evidence is None else f"is of grade {evidence['grade']} and claims no list"
        raise ConfigError(
            f"clean.findings=listed removes persons on the list, and this audit {has}. Use clean.findings=candidates."
        )
    own = run.config.assess.evidence.q
    if options.q is not None and options.q > own:
        notes.append(f"clean.q = {options.q:g} is looser than the list of the audit (q = {own:g})")
    return own if options.q is None else options.q


def _refuse_vectors(run: Run, options: CleanConfig) -> None:
    form = run.table("scan", "release", UNITS)["format"][0].as_py()
    if options.write != "none" and FORMATS[form].holds != "images":
        raise ConfigError("clean.write: the release came as ready vectors, without images. Use clean.write=none.")


def _near(run: Run, images: Images, options: CleanConfig, notes: list[str]) -> Near | None:
    """Near copies within the release, where the policy wants them and they were searched for."""
    if options.policy != "cluster":
        return None
    if "release" not in run.config.search.within:
        notes.append(
            "near copies within the release are not available (search.within does not name the release): groups are "
            "connected by training persons and equal files only"
        )
        return None
    floor: float = run.commit("search", "within-release").facts["floor"]
    if options.near < floor:
        raise ConfigError(
            f"clean.near = {options.near:g} is below the cosine {floor:g} from which the search kept pairs within the "
            f"release. Give clean.near={floor:g} or more, or search.floor={options.near:g} and search again."
        )
    return near_images(images, near_copies(run, options.near))


def _selected(found: pa.Table, level: float | None) -> NDArray[np.bool_]:
    """Which links lead to removal."""
    if level is None:
        return np.asarray(found["candidate"].to_numpy(), np.bool_)
    return np.asarray(pc.fill_null(pc.less_equal(found["q"], level), False).to_numpy(), np.bool_)


def _removal(release: pa.Table, leading: Leading, near: Near | None, options: CleanConfig) -> Removal:
    known = Release(
        identity_N=label_codes(release["identity"]),
        content_N=label_codes(release["digest"]),
        audited_N=np.asarray(pc.equal(release["status"], "ok").to_numpy(), np.bool_),
    )
    row_L, person_L = (leading.found[name].to_numpy() for name in ("release_row", "person"))
    close = Links(row_L, person_L, leading.selected_L)
    return removal(known, close, near, options.policy, options.unaudited)


def _begun(run: Run, options: CleanConfig, stays: pa.Table) -> tuple[Path, dict[str, Any] | None]:
    """The folder of the results, marked as ours, and what an earlier `clean` says of images that it wrote there.

    ConfigError if it lies inside a set, holds things of others, or images of another manifest or form.
    """
    out = folder_of(run, options)
    for role, one in run.config.sets.given().items():
        if within(str(out), one.uri):
            raise ConfigError(f"clean.out lies inside the {role} set ({public(one.uri)}). Put it elsewhere.")
    earlier = record_of(out)
    if earlier is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"clean.out: {out} holds other things. Give a new or empty folder.")
    there = (out / "release").exists()
    written = (earlier or {}).get("written") if there else None
    form = options.write if options.write != "none" or written is None else written["form"]
    if there and (written is None or written["key"] != _written_key(options, form, stays)):
        raise ConfigError(f"{out}/release holds images of another `clean`. Move it away, or give another clean.out.")
    private_folder(out)
    write_private(out / NAME, to_json({"contract": CONTRACT, "state": "begun", "written": written}))
    return out, written


def _written_key(options: CleanConfig, form: str, stays: pa.Table) -> str:
    """Digest of all that the images written anew depend on."""
    rows = hashlib.sha256(parquet_bytes(stays)).hexdigest()
    return fingerprint(form, rows, options.shard_images if form == "webdataset" else 0)


def _write(run: Run, options: CleanConfig, out: Path, kept_N: NDArray[np.bool_], stays: pa.Table) -> dict[str, Any]:
    """Write the images that stay anew; the record says so before they are visible."""
    units = run.table("scan", "release", UNITS)
    members = pa.Table.from_struct_array(units["members"].combine_chunks().flatten()).filter(pa.array(kept_N))
    about = run.readable(units).select(["format", "uri", "anonymous"]).slice(0, 1).to_pylist()[0]
    known = {"key": _written_key(options, options.write, stays), "form": options.write}
    found: dict[str, Any] = {}

    def note(counts: Mapping[str, Any]) -> None:
        found.update(known, **counts)
        write_private(out / NAME, to_json({"contract": CONTRACT, "state": "begun", "written": found}))

    rewrite(run, members, about, options, out, note)
    return found
