"""What a report may hold that anybody can read: no picture, no path, and keyed hashes in the place of names.

A name is replaced by HMAC-SHA256 under a random key of the run (`audience.key`, never published), cut to 128 bit. A
plain hash would not do: names of known sets can be tried. What is hashed says what it names, of which set, so that
equal names in two sets do not look like one. Who has the run folder finds a name again in `public_ids.parquet`, or by
`name_of`.

Hashes alone do not hide a pair: who has a photo and the release can compute their cosine and look for it. So scores
are rounded (`COSINE_DIGITS`), pixel evidence is left out, and what is listed in the order of names is sorted by hash.
Facts and options are copied by their names, never as a whole: what nobody thought of is not published.
"""

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.files import write_new
from operators.errors import ConfigError
from operators.groups import FEWEST
from operators.tables import FINDINGS, PAIR_EVIDENCE, REJECTS, Table
from pipeline.page import Page, Shown
from pipeline.spreadsheet import values
from pipeline.wording import without_folders

KEY, IDS = "audience.key", "public_ids.parquet"
KEY_BYTES, HASH_BYTES = 32, 16
IMAGE, IDENTITY = "image", "identity"
COSINE_DIGITS = 2
"""Decimals of a published cosine: many pairs share a value."""
SIGNIFICANT = 2
"""Digits of a published p-value."""
NOT_SHOWN = "not shown"
NEAR_TO_MANY = "near to abnormally many images, or of poor quality"

PUBLIC_IDS = Table(
    name="public_ids",
    version=1,
    schema=pa.schema({name: pa.string() for name in ("id", "set", "kind", "name")}),
)


def name_of(key: bytes, name: str, role: str, kind: str) -> str:
    """The public id of an image or identity of a set: HMAC-SHA256, the first 128 bit as 32 hex digits.

    Parameters
    ----------
    key
        Of the run.
    name
        Key of an image, or label of a person; text that is not valid UTF-8 as lone surrogates.
    role
        The set: release, training, control, ...
    kind
        `image` or `identity`.
    """
    text = f"{kind}\0{role}\0{name}".encode("utf-8", "surrogatepass")  # neither kind nor role can hold a NUL
    return hmac.new(key, text, hashlib.sha256).digest()[:HASH_BYTES].hex()


def run_key(folder: Path) -> bytes:
    """The key of a run, made when it is missing.

    Raises
    ------
    ConfigError
        If `audience.key` may be read by others, or does not hold such a key.
    StorageError
        If it cannot be made.
    """
    path = folder / KEY
    if not os.path.lexists(path):
        write_new(path, secrets.token_bytes(KEY_BYTES))
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            about, key = os.fstat(file.fileno()), file.read(KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). It must be a file of yours.") from error
    if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o077 or len(key) != KEY_BYTES:
        raise ConfigError(
            f"{path}: must be a file of {KEY_BYTES} bytes that nobody else may read. If others may have read it, "
            f"delete it: the next public report then has a new key, and other ids."
        )
    return key


class Names:
    """Hashes names under one key, and remembers which."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._made: dict[tuple[str, str, str], str] = {}

    def __call__(self, name: str | None, role: str, kind: str) -> str | None:
        """The public id; None for None."""
        if name is None:
            return None
        return self._made.setdefault((role, kind, name), name_of(self._key, name, role, kind))

    def table(self) -> pa.Table:
        """What every id stands for, under PUBLIC_IDS."""
        rows = sorted((made, *of) for of, made in self._made.items())
        texts = [[one.encode("utf-8", "surrogateescape") for one in column] for column in zip(*rows, strict=True)]
        columns = [pa.array(column, pa.binary()).cast(pa.string(), safe=False) for column in texts or [[]] * 4]
        return pa.table(columns, schema=PUBLIC_IDS.schema)


def public_page(page: Page, names: Names, figures: Sequence[tuple[str, str]], roc: str | None) -> Page:
    """The page as anybody may see it, without clusters and candidates; `figures` must be drawn from rounded scores."""
    return replace(
        page,
        summary=public_summary(page.summary),
        manifest=public_manifest(page.manifest),
        shown=[_shown(one, names) for one in page.shown],
        rejects=public_rejects(page.rejects, names),
        figures=figures,
        faces="covered",
        findings=None if page.findings is None else public_findings(page.findings, names),
        pixels=None if page.pixels is None else _pixels(page.pixels, names),
        roc=roc,
        audience="public",
        changes=None if page.changes is None else _changes(page.changes, names),
        clusters=(),
        candidates=None,
    )


def public_findings(findings: pa.Table, names: Names) -> pa.Table:
    """Rows of FINDINGS with ids for names, rounded scores, and no reasons: those hold measurements of pixels."""
    changed = {
        **_named(names, "training", "training"),
        **_named(names, "release", "release"),
        **dict.fromkeys(("cosine", "anchor_cosine", "statistic"), rounded),
        **dict.fromkeys(("p", "q"), significant),
        "reasons": lambda _: None,
        "hub": lambda said: None if said is None else NEAR_TO_MANY,
    }
    return _mapped(findings, FINDINGS, changed)


def public_candidates(candidates: pa.Table, contract: Table, names: Names) -> pa.Table:
    """Rows of CANDIDATES against the training set with ids for names and rounded cosines."""
    changed = {**_named(names, "gallery", "training"), **_named(names, "release", "release"), "cosine": rounded}
    return _mapped(candidates, contract, changed)


def public_rejects(rejects: pa.Table, names: Names) -> pa.Table:
    """Rows of REJECTS with ids for keys, in their order; no digests, which anybody can compute, and no error texts."""
    columns = [values(rejects[name]) for name in ("set", "key", "status")]
    rows = [(role, str(names(key, role, IMAGE)), status) for role, key, status in zip(*columns, strict=True)]
    return REJECTS.from_rows([{"set": role, "key": key, "status": status} for role, key, status in sorted(rows)])


def public_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """`summary.json` without places, notes, suffixes of files and names of small groups; highest cosines rounded."""
    told = _picked(summary, SUMMARY) | {"audience": "public", "title": without_folders(str(summary["title"]))}
    told["warnings"] = [without_folders(one) for one in summary.get("warnings", [])]
    told["sets"] = {role: _set(one) for role, one in summary["sets"].items()}
    told["arms"] = {arm: {**one, "highest": rounded(one["highest"])} for arm, one in summary["arms"].items()}
    evidence = summary.get("evidence")
    told["evidence"] = None if evidence is None else _picked(evidence, EVIDENCE)
    for name in ("excess", "operating"):  # their bars are the statistics of single people
        if evidence is not None and evidence.get(name):
            told["evidence"][name] = [{**one, "threshold": rounded(one.get("threshold"))} for one in evidence[name]]
    if evidence is not None and evidence.get("groups"):
        rates = [_group(at, rate) for at, rate in enumerate(evidence["groups"]["rates"], 1)]
        told["evidence"]["groups"] = {**evidence["groups"], "rates": rates}
    return told


SUMMARY = ("schema", "embedder", "translation", "calibration", "findings", "limit", "classes")
SETS = ("form", "images", "audited", "identities", "rejected", "faces")
EVIDENCE = (
    "grade", "claim", "reasons", "frozen", "source", "anchored", "models", "q", "listed", "shortest_list", "persons",
    "gate", "placebo", "excess", "auc", "operating", "roc", "detectable", "over_threshold", "hubs", "sensitivity",
    "pairs", "disagreement", "recall", "review", "groups",
)  # fmt: skip
MANIFEST = ("unveil", "code", "created", "python", "platform", "versions", "datasets")
OPTIONS: Mapping[str, Sequence[str]] = {
    "embedder": ("name", "sha256", "width", "alignment", "channels", "dtype", "flip"),
    "faces": ("kind", "mode", "several", "min_face", "min_score", "longest_side", "detector_sha256"),
    "scan": ("unit_images",),
    "search": ("k", "columns", "floor", "counts", "within", "certify"),
    "assess": (
        "fmr", "calibration_images", "seed", "controlled", "evidence", "judged_pairs", "judged_controls",
        "judged_photos", "blend_images", "limit",
    ),
    "plant": ("persons", "seed", "transforms"),
}  # fmt: skip
SEARCHED = ("comparisons", "certificate", "engines", "floor", "tiles")


def public_manifest(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of `run.json`: versions, digests of the sets' contents, options that are numbers and choices, and the search."""
    told = {name: record[name] for name in MANIFEST if name in record}
    config, stages = record.get("config", {}), record.get("stages", {})
    told["config"] = {part: _picked(config.get(part, {}), chosen) for part, chosen in OPTIONS.items()}
    return told | {"stages": {"search": _picked(stages.get("search", {}), SEARCHED)}}


def rounded(value: float | None) -> float | None:
    """A score as it is published."""
    return None if value is None else round(value, COSINE_DIGITS)


def significant(value: float | None) -> float | None:
    """A p-value as it is published."""
    return None if value is None else float(f"{value:.{SIGNIFICANT}g}")


def _picked(given: Mapping[str, Any], chosen: Sequence[str]) -> dict[str, Any]:
    return {name: given[name] for name in chosen if name in given}


def _set(one: Mapping[str, Any]) -> dict[str, Any]:
    notes = len(one.get("notes", []))
    said = [f"{notes} notes on this set are in the private report"] if notes else []
    files = sum(one["unlisted"].values())
    return _picked(one, SETS) | {"uri": NOT_SHOWN, "notes": said, "unlisted": {"files": files} if files else {}}


def _group(at: int, rate: Mapping[str, Any]) -> Mapping[str, Any]:
    """A group of so few people that its name could be a person's loses it."""
    few = min(rate["members"], rate["controls"]) < FEWEST
    return {**rate, "group": f"group {at}"} if few else rate


def _shown(one: Shown, names: Names) -> Shown:
    return replace(
        one,
        cosine=round(one.cosine, COSINE_DIGITS),
        release_key=str(names(one.release_key, "release", IMAGE)),
        release_identity=names(one.release_identity, "release", IDENTITY),
        gallery_key=str(names(one.gallery_key, "training", IMAGE)),
        gallery_identity=names(one.gallery_identity, "training", IDENTITY),
        release_picture=None,
        gallery_picture=None,
        q=significant(one.q),
    )


def _pixels(pixels: pa.Table, names: Names) -> pa.Table:
    """Only what is not a measurement of one pair of images."""
    kept = {"rank": lambda rank: rank, "blend_partner_key": lambda key: names(key, "training", IMAGE)}
    nothing: Callable[[Any], Any] = lambda _: None  # noqa: E731
    changed = {name: kept.get(name, nothing) for name in PAIR_EVIDENCE.schema.names}
    changed |= {"second_z": lambda z: None if z is None else round(z, 1), "blend_q": significant}
    return _mapped(pixels, PAIR_EVIDENCE, changed)


def _changes(changes: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """What `pipeline.previous.told` says; its rows hold a finding's names and scores."""
    made = {**_named(names, "training", "training"), **_named(names, "release", "release")}
    made |= dict.fromkeys(("cosine", "previous_cosine"), rounded) | dict.fromkeys(("q", "previous_q"), significant)
    told = {**changes, "previous": {**changes["previous"], "title": without_folders(changes["previous"]["title"])}}
    for name in ("new", "gone", "moves"):
        told[name] = [{of: made.get(of, _same)(value) for of, value in row.items()} for row in changes[name]]
    return told


def _same(value: Any) -> Any:
    return value


def _named(names: Names, prefix: str, role: str) -> dict[str, Callable[[Any], Any]]:
    """How the two columns that name one side of a pair change."""
    return {
        f"{prefix}_key": lambda name: names(name, role, IMAGE),
        f"{prefix}_identity": lambda name: names(name, role, IDENTITY),
    }


def _mapped(table: pa.Table, contract: Table, changed: Mapping[str, Callable[[Any], Any]]) -> pa.Table:
    """The table with every value of some columns changed."""
    contract.check(table)

    def columns() -> Iterator[pa.Array]:
        for field in contract.schema:
            if field.name in changed:
                yield pa.array([changed[field.name](value) for value in values(table[field.name])], field.type)
            else:
                yield table[field.name]

    return pa.table(list(columns()), schema=contract.schema)
