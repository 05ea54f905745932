"""The audit of the release that stays: a run of its own in the folder `audit`, from embeddings that are there.

No image is embedded again. The units of the smaller release are cut as `scan` would cut them by the manifest, and their
embeddings are rows of those of the audit; whatever the audit searched and the removal did not touch is taken over, by
the name of its content. Search and assess then run anew, so the numbers are those of an audit of the smaller release.
"""

import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.storage import ASIDE, MARKER, Store, private_folder
from operators.backbones import BackboneConfig
from operators.errors import ConfigError, SchemaMismatch
from operators.face_rows import face_key, faces_of, further, rows_of
from operators.records import embeddings
from operators.tables import UNITS
from operators.units import Member, cut, unit_digest
from pipeline.assess import assess
from pipeline.embed import embed, unit_store
from pipeline.search import search
from pipeline.stage import Run, fingerprint

log = logging.getLogger(__name__)


def audited_again(run: Run, kept_N: NDArray[np.bool_], folder: Path, manifest: Path) -> Run:
    """The finished run of the release images that stay.

    Parameters
    ----------
    run
        The audit.
    kept_N
        Whether each release image stays, in row order; one of them must have been audited.
    folder
        The run folder of the new audit.
    manifest
        The list file of the images that stay; the new audit's configuration names it.

    Raises
    ------
    ConfigError
        If a set is another model's embeddings: its units are named with the bridge that they went over.
    """
    if run.config.sets.foreign():
        raise ConfigError("an audit with another model's embeddings is not repeated here: give clean.reaudit=false.")
    inner = _inner(run, folder, manifest)
    for role in run.config.sets.given():
        if role != "release":
            made = run.commit("scan", role)
            _list(inner, role, run.table("scan", role, UNITS), made.key, made.facts)
    old = run.table("scan", "release", UNITS)
    units, rows = _units(old, kept_N, run.config.scan.unit_images)
    facts = _facts(units, run.commit("scan", "release").facts, int((~kept_N).sum()))
    _list(inner, "release", units, fingerprint(UNITS.contract, units["unit"].to_pylist(), facts), facts)
    for model in run.config.models():
        _take_embeddings(unit_store(run, model), model, old, units, rows)
    if inner.store.cipher is None or inner.store.cipher.like(run.store.cipher):  # else it is searched again
        _take_search(run.folder, inner.folder)
    embed(inner)
    search(inner)
    assess(inner)
    return inner


def _inner(run: Run, folder: Path, manifest: Path) -> Run:
    store = run.config.store or str(run.folder / "store")
    release = replace(run.config.sets.release, list_file=str(manifest))
    sets = replace(run.config.sets, release=release)
    inner = Run(replace(run.config, out=str(private_folder(folder)), store=store, sets=sets))
    inner.ray = run.ray  # type: ignore[method-assign]  # one session serves both
    return inner


def _list(inner: Run, role: str, units: pa.Table, key: str, facts: Any) -> None:
    earlier = inner.store.child("scan").find(role)
    if earlier is None or earlier.key != key:
        inner.save("scan", role, UNITS, units, key=key, **facts)


def _units(old: pa.Table, kept_N: NDArray[np.bool_], unit_images: int) -> tuple[pa.Table, NDArray[np.int64]]:
    """The units of the images that stay, and the old row of each of their images."""
    members = old["members"].combine_chunks().flatten()
    rows = np.flatnonzero(kept_N)
    names = ("key", "identity", "bytes", "digest", "error")
    columns = [members.field(name).take(pa.array(rows)).to_pylist() for name in names]
    listed = [Member(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]
    row_of = dict(zip(columns[0], rows.tolist(), strict=True))
    made = list(cut(listed, unit_images))
    order = np.array([row_of[member.key] for unit in made for member in unit], np.int64)
    starts = np.cumsum([0, *map(len, made)])
    nested = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), members.take(pa.array(order)))
    about = old.select(["set", "uri", "format", "anonymous"]).take(pa.array(np.zeros(len(made), np.int64)))
    columns = [
        *about.columns,
        pa.array([unit_digest(unit) for unit in made], pa.string()),
        pa.array(starts[:-1]),
        nested,
    ]
    return pa.table(columns, schema=UNITS.schema), order


def _facts(units: pa.Table, before: Any, removed: int) -> dict[str, Any]:
    """What `scan` says of a set, of the images that stay."""
    members = units["members"].combine_chunks().flatten()
    digests = Counter(members.field("digest").drop_null().to_pylist())
    return {
        "form": before["form"],
        "images": len(members),
        "bytes": pc.sum(members.field("bytes")).as_py() or 0,
        "identities": len(members.field("identity").drop_null().unique()),
        "equal_to_another": sum(count for count in digests.values() if count > 1),
        "unlisted": {**before["unlisted"], "not in the list file": removed},
        "notes": list(before["notes"]),
    }


def _take_embeddings(
    store: Store, model: BackboneConfig, old: pa.Table, units: pa.Table, rows: NDArray[np.int64]
) -> None:
    """Commit the new units' embeddings, row by row those of the audit; SchemaMismatch if a row is of another image.

    `rows` are numbers of images; where several faces of an image are audited, all its rows come along.
    """
    contract = embeddings(model.width)
    names, (count_N, first_N) = old["unit"].to_pylist(), _face_rows(store, old)
    firsts = first_N[old["first_row"].to_numpy()]
    keys = units["members"].combine_chunks().flatten().field("key").to_pylist()
    starts = [*units["first_row"].to_pylist(), len(rows)]
    for name, (start, end) in zip(units["unit"].to_pylist(), pairwise(starts), strict=True):
        if store.find(name) is not None:
            continue
        parts, sources, count_M = [], [], count_N[rows[start:end]]
        face_F = faces_of(count_M)
        for at, wanted in _by_unit(np.repeat(first_N[rows[start:end]], count_M) + face_F - 1, firsts):
            parts.append(store.read(names[at]).take(pa.array(wanted - firsts[at])))
            sources.append(store.find(names[at]))
        made = contract.check(pa.concat_tables(parts).combine_chunks())
        own = zip(np.repeat(np.arange(start, end), count_M).tolist(), face_F.tolist(), strict=True)
        if made["key"].to_pylist() != [face_key(keys[at], face) for at, face in own]:
            raise SchemaMismatch(
                f"{store.address}: embeddings of a release unit are not in the order of its list. Remove them, and run "
                f"`unveil embed` again."
            )
        status = {one["values"]: one["counts"] for one in made["status"].value_counts().to_pylist()}
        device = next((one.facts["device"] for one in sources if one is not None), "")
        facts = {"status": status, "device": device}
        facts |= {"faces": several} if (several := further(face_F, end - start)) else {}
        store.commit(name, made, contract=contract.contract, key=name, facts=facts)


def _face_rows(store: Store, units: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each image of the embedded `units`, how many rows it has, and the number of the first."""
    counts = [np.zeros(0, np.int64)]
    for name, size in zip(units["unit"].to_pylist(), pc.list_value_length(units["members"]).to_pylist(), strict=True):
        made = store.find(name)
        counts.append(rows_of(made.facts.get("faces", {}) if made else {}, size))
    count_N = np.concatenate(counts)
    return count_N, np.cumsum(count_N) - count_N


def _by_unit(rows: NDArray[np.int64], firsts: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Runs of rows that lie in one old unit, with its number; their order is kept."""
    unit_M = np.searchsorted(firsts, rows, side="right") - 1
    cuts = np.flatnonzero(np.diff(unit_M)) + 1
    for own in np.split(rows, cuts):
        yield int(np.searchsorted(firsts, own[0], side="right")) - 1, own


def _take_search(source: Path, target: Path) -> None:
    """Take over what was searched, of every model, as further names of the same files; a part that is there stays.

    Parts and tiles are named by their content, and what is not is checked by its key before it is used.
    """
    taken = 0
    for folder in _search_folders(source):
        to = target / folder.relative_to(source)
        for marker in folder.glob(f"*{MARKER}"):
            if not (to / marker.name).exists():
                private_folder(to)
                _link(marker.with_name(marker.name.removesuffix(MARKER) + ".parquet"), to)
                _link(marker, to)
                taken += 1
    log.info("clean: %d tables of the search taken over", taken)


def _search_folders(source: Path) -> Sequence[Path]:
    return [folder for folder in (source / "search", *sorted(source.glob("models/*/search"))) if folder.is_dir()]


def _link(path: Path, folder: Path) -> None:
    """`path` under the same name in `folder`; a copy where the two are not on one file system."""
    aside = folder / f"{ASIDE}{uuid.uuid4().hex}"
    try:
        os.link(path, aside)
    except OSError:
        shutil.copyfile(path, aside)
        aside.chmod(0o600)
    os.replace(aside, folder / path.name)
