"""embed: every image of every set to a stored embedding, or to a row that says why not.

    units -> read + decode + detect + align (CPU actors) -> embed (CPU or GPU actors) -> one committed file per unit

A unit is one row all the way, so Ray's blocks never decide what is computed together. Resume is a listing: units whose
file is committed under this embedder and preparation are not computed again, by this run or any other that shares the
store.
"""

import logging
import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.faults import IncompleteTable, StorageError
from cluster.pool import original_errors
from cluster.resources import Resources
from cluster.storage import Commit, Store
from operators.backbones import BackboneConfig
from operators.encoder import Encoder
from operators.errors import FormatError
from operators.faces import PREPARATION_VERSION, FaceConfig, FacePreparation
from operators.tables import REJECTS, UNITS, Table, embeddings, unnest
from pipeline.progress import Progress
from pipeline.stage import Run, fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """Workers of the embed stage."""

    prepare: Resources = field(default_factory=lambda: Resources(workers=64, cpus=0.4))
    encode: Resources = field(default_factory=lambda: Resources(workers=64, cpus=0.4))


def embed(run: Run) -> None:
    """Embed what is not yet in the store, and commit for each set the table of images that could not be audited."""
    with run.timed("embed") as facts:
        units = {role: run.table("scan", role, UNITS) for role in run.config.sets.given()}
        store = unit_store(run)
        wanted = pa.concat_tables(units.values()).combine_chunks()
        pending = _pending(wanted, store)
        images = sum(map(len, wanted["members"]))
        facts["images"], facts["units"] = images, wanted.num_rows
        facts["embedded_now"] = sum(map(len, pending["members"]))
        if pending.num_rows:
            store.sweep()
            run.ray()
            _embed_units(pending, run, store)
        else:
            log.info("embed: nothing to do, %s images in %s units are embedded", f"{images:,}", f"{wanted.num_rows:,}")
        for role, table in units.items():
            facts[role] = _close(run, role, table, store)
        audited = sum(facts[role]["status"]["ok"] for role in units)
        log.info("embed: %s of %s images audited", f"{audited:,}", f"{images:,}")


def unit_store(run: Run) -> Store:
    """Where embeddings of this embedder and face preparation are kept."""
    return run.embeddings.child(embedding_key(run.config.embedder, run.config.faces))


def embedding_key(embedder: BackboneConfig, faces: FaceConfig) -> str:
    """Digest of everything that an embedding depends on apart from the image; paths are not part of it."""
    model = {name: value for name, value in asdict(embedder).items() if name not in ("path", "name")}
    preparation = {name: value for name, value in asdict(faces).items() if name != "detector"}
    return fingerprint(embeddings(embedder.width).contract, PREPARATION_VERSION, model, preparation)


def _pending(wanted: pa.Table, store: Store) -> pa.Table:
    """Units without a committed file, each once even if two sets share it."""
    seen: set[str] = set()
    rows = []
    for at, name in enumerate(wanted["unit"].to_pylist()):
        if name not in seen and store.find(name) is None:
            rows.append(at)
        seen.add(name)
    return wanted.take(pa.array(rows, pa.int64()))


def _embed_units(pending: pa.Table, run: Run, store: Store) -> None:
    """The Ray Data chain, from units to committed files."""
    import ray

    faces = replace(run.config.faces, detector=os.path.abspath(run.config.faces.detector))
    embedder = replace(run.config.embedder, path=os.path.abspath(run.config.embedder.path))
    workers = run.config.embed
    opening = ray.remote(num_cpus=workers.encode.cpus, num_gpus=workers.encode.gpus)(_open_models)
    with original_errors():
        ray.get(opening.remote(faces, embedder))
    units = ray.data.from_arrow([pending.slice(at, 1) for at in range(pending.num_rows)])
    committed = (
        units.map_batches(
            FacePreparation,
            fn_constructor_args=(faces,),
            **workers.prepare.map_options(),
        )
        .map_batches(
            Encoder,
            fn_constructor_args=(embedder,),
            **workers.encode.map_options(),
        )
        .map_batches(
            _commit_unit,
            fn_kwargs={"root": str(store.root.resolve()), "contract": embeddings(embedder.width)},
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0.1,
        )
    )
    progress = Progress("embed", sum(map(len, pending["members"])), "images")
    for row in committed.iter_rows():
        if row["fault"] is not None:
            raise StorageError(row["fault"])
        progress.add(row["images"], row["failed"])
    progress.end()


def _open_models(faces: FaceConfig, embedder: BackboneConfig) -> None:
    """Open both models once where they will run: a missing or wrong file is reported as itself, before any work."""
    FacePreparation(faces)
    Encoder(embedder)


def _commit_unit(unit: pa.Table, root: str, contract: Table) -> pa.Table:
    """Write one embedded unit to the store; return its counts, or why it could not be written."""
    images = contract.check(unnest(unit, "images"))
    name = unit["unit"][0].as_py()
    counts = {entry["values"]: entry["counts"] for entry in images["status"].value_counts().to_pylist()}
    facts = {"status": counts, "device": unit["device"][0].as_py()}
    fault = None
    try:
        Store(root).commit(name, images, contract=contract.contract, key=name, facts=facts)
    except StorageError as error:
        fault = str(error)
    columns = {"images": [len(images)], "failed": [len(images) - counts.get("ok", 0)]}
    return pa.table({**columns, "fault": pa.array([fault], pa.string())})


def _close(run: Run, role: str, units: pa.Table, store: Store) -> dict[str, Any]:
    """Check that every listed image has its row, and commit the set's `rejects`; return counts by status, and devices.

    Raises
    ------
    IncompleteTable
        If a unit is not committed or has another number of rows than it has images.
    FormatError
        If no image of the set could be audited.
    """
    status: Counter[str] = Counter()
    devices: set[str] = set()
    rejects = [REJECTS.schema.empty_table()]
    for row in units.to_pylist():
        made = store.find(row["unit"])
        if made is None or made.rows != len(row["members"]):
            raise IncompleteTable(
                f"unit {row['unit']} of the {role} set: {len(row['members'])} images listed, "
                f"{made.rows if made else 'none'} embedded. Run `unveil embed` again."
            )
        counts = made.facts["status"]
        status.update(counts)
        devices.add(made.facts["device"])
        if set(counts) != {"ok"}:
            rejects.append(_rejects(role, store.read(row["unit"])))
    table = pa.concat_tables(rejects).combine_chunks()
    key = closing_key(run, units)
    run.save("embed", role, REJECTS, table, key=key, status=dict(sorted(status.items())))
    if not status["ok"]:
        reasons = ", ".join(f"{name} {count:,}" for name, count in status.most_common())
        raise FormatError(
            f"sets.{role}: none of its {sum(status.values()):,} images could be audited ({reasons}). "
            f"The reasons are in {run.folder}/embed/{role}.parquet; check the set's `uri` and `faces.mode`."
        )
    return {"status": dict(sorted(status.items())), "devices": sorted(devices)}


def closing_key(run: Run, units: pa.Table) -> str:
    """Digest of a set as embedded: its units, the embedder and the preparation."""
    return fingerprint(REJECTS.contract, unit_store(run).root.name, units["unit"].to_pylist())


def closed(run: Run, role: str, units: pa.Table) -> Commit:
    """The marker of a set whose `units` are all embedded as now configured.

    Raises
    ------
    IncompleteTable
        If embed has not run, or ran for other units, another embedder or another preparation.
    """
    made = run.commit("embed", role)
    if made.key != closing_key(run, units):
        raise IncompleteTable(
            f"{run.folder}/embed: the {role} set or its options have changed. Run `unveil embed` again."
        )
    return made


def _rejects(role: str, images: pa.Table) -> pa.Table:
    failed = images.filter(pc.not_equal(images["status"], "ok"))
    columns = [failed[name] for name in ("key", "digest", "status", "error")]
    return pa.table([pa.array([role] * failed.num_rows, pa.string()), *columns], schema=REJECTS.schema)
