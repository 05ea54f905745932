"""embed: every image of every set to a stored embedding, or to a row that says why not.

    units -> read + decode + detect + align (CPU actors) -> embed (CPU or GPU actors) -> one committed file per unit
                                                         -> embed by the next model  ->

An image is decoded and its face detected once, whatever the number of models; each model has its own store.
A unit is one row all the way, so Ray's blocks never decide what is computed together. Resume is a listing: units whose
file is committed under this embedder and preparation are not computed again, by this run or any other that shares the
store.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.faults import IncompleteTable, StorageError
from cluster.pool import original_errors
from cluster.resources import Resources
from cluster.storage import Commit, Store, to_json, write_private
from operators.backbones import BackboneConfig, address
from operators.encoder import Encoder
from operators.errors import FormatError
from operators.faces import PREPARATION_VERSION, FaceConfig, FacePreparation
from operators.records import FACES, embedded_unit, embeddings, unnest
from operators.tables import REJECTS, UNITS, Table
from pipeline.models import obtained
from pipeline.progress import Progress
from pipeline.stage import Run, fingerprint

log = logging.getLogger(__name__)


RUNTIME = "runtime.json"
"""Beside the embeddings of a model: what ran it when the first of them were made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """Workers of the embed stage."""

    prepare: Resources = field(default_factory=lambda: Resources(workers=64, cpus=0.4))
    encode: Resources = field(default_factory=lambda: Resources(workers=64, cpus=0.4))


def embed(run: Run) -> None:
    """Embed what is not yet in the stores, and commit for each set the table of images that could not be audited."""
    with run.timed("embed") as facts:
        units = {role: run.table("scan", role, UNITS) for role in run.config.sets.given()}
        models = run.config.models()
        wanted = pa.concat_tables(units.values()).combine_chunks()
        pending = _pending(wanted, [unit_store(run, model) for model in models])
        images = sum(map(len, wanted["members"]))
        facts["images"], facts["units"] = images, wanted.num_rows
        facts["embedded_now"] = sum(map(len, pending["members"]))
        if pending.num_rows:
            for model in models:
                unit_store(run, model).sweep()
            run.ray()
            _embed_units(pending, run)
        else:
            log.info("embed: nothing to do, %s images in %s units are embedded", f"{images:,}", f"{wanted.num_rows:,}")
        for model in models[1:]:
            facts[f"model {model.name}"] = {role: _close(run, role, table, model) for role, table in units.items()}
        for role, table in units.items():
            facts[role] = _close(run, role, table, models[0])
        audited = sum(facts[role]["status"]["ok"] for role in units)
        log.info("embed: %s of %s images audited", f"{audited:,}", f"{images:,}")


def unit_store(run: Run, model: BackboneConfig | None = None) -> Store:
    """Where embeddings of a model, if none is named of the audit's first, and of this face preparation are kept."""
    return run.embeddings.child(embedding_key(model or run.config.embedder, run.config.faces))


def embedding_key(embedder: BackboneConfig, faces: FaceConfig) -> str:
    """Digest of everything that an embedding depends on apart from the image; paths are not part of it."""
    preparation = {name: value for name, value in asdict(faces).items() if name not in ("detector", "isolate")}
    return fingerprint(embeddings(embedder.width).contract, PREPARATION_VERSION, address(embedder), preparation)


def _pending(wanted: pa.Table, stores: Sequence[Store]) -> pa.Table:
    """Units that are not committed in every store, each once even if two sets share it."""
    seen: set[str] = set()
    rows = []
    for at, name in enumerate(wanted["unit"].to_pylist()):
        if name not in seen and any(store.find(name) is None for store in stores):
            rows.append(at)
        seen.add(name)
    return wanted.take(pa.array(rows, pa.int64()))


def _embed_units(pending: pa.Table, run: Run) -> None:
    """The Ray Data chain, from units to committed files."""
    import ray

    faces = replace(run.config.faces, detector=os.path.abspath(run.config.faces.detector))
    models = [replace(one, path=os.path.abspath(one.path)) for one in map(obtained, run.config.models())]
    roots = [str(unit_store(run, model).root.resolve()) for model in models]
    alignments = tuple(dict.fromkeys(model.alignment for model in models))
    workers = run.config.embed
    opening = ray.remote(num_cpus=workers.encode.cpus, num_gpus=workers.encode.gpus)(_open_models)
    with original_errors():
        models = ray.get(opening.remote(faces, _as_begun(models, roots)))
    for model, root in zip(models, roots, strict=True):
        write_private(Path(root) / RUNTIME, to_json({"runtime": model.runtime}))
    made = ray.data.from_arrow([pending.slice(at, 1) for at in range(pending.num_rows)]).map_batches(
        FacePreparation, fn_constructor_args=(faces, alignments), **workers.prepare.map_options()
    )
    for at, (model, root) in enumerate(zip(models, roots, strict=True)):
        last = at == len(models) - 1
        made = made.map_batches(
            UnitEncoder, fn_constructor_args=(model, root, at, last), **workers.encode.map_options()
        )
    contracts = [embeddings(model.width) for model in models]
    committed = made.map_batches(
        _commit_unit,
        fn_kwargs={"roots": roots, "contracts": contracts},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0.1,
    )
    progress = Progress("embed", sum(map(len, pending["members"])), "images")
    for row in committed.iter_rows():
        if row["fault"] is not None:
            raise StorageError(row["fault"])
        progress.add(row["images"], row["failed"])
    progress.end()


def _as_begun(models: Sequence[BackboneConfig], roots: Sequence[str]) -> list[BackboneConfig]:
    """The models, with `auto` as it was chosen when their stores were begun: another choice has other last bits."""
    begun = []
    for model, root in zip(models, roots, strict=True):
        path = Path(root) / RUNTIME
        chosen = model.runtime
        if chosen == "auto" and path.exists():
            chosen = str(json.loads(path.read_bytes())["runtime"])
        begun.append(replace(model, runtime=chosen))
    return begun


class UnitEncoder:
    """Adds what one model makes of a unit's faces to the unit's row; nothing where its store has the unit already."""

    def __init__(self, model: BackboneConfig, root: str, place: int, last: bool) -> None:
        self.encoder, self.store, self.last = Encoder(model), Store(root), last
        self.contract = embedded_unit(model.width)
        self.names = [f"{name}_{place}" for name in ("device", "images")]

    def __call__(self, unit: pa.Table) -> pa.Table:
        """The row with two more columns, and without the faces if no model comes after this one."""
        if self.store.find(unit["unit"][0].as_py()) is None:
            made = self.encoder(unit.select(FACES.schema.names))
            columns = [made["device"], made["images"]]
        else:
            columns = [pa.nulls(1, self.contract.schema.field(name).type) for name in ("device", "images")]
        for name, column in zip(self.names, columns, strict=True):
            unit = unit.append_column(name, column)
        return unit.drop_columns(["faces"]) if self.last else unit


def _open_models(faces: FaceConfig, models: Sequence[BackboneConfig]) -> list[BackboneConfig]:
    """Open all models once where they will run: a missing or wrong file is reported as itself, before any work.

    Returns the models with what `auto` came to, so that no two workers of a run, or of its resumption, differ.
    """
    FacePreparation(faces, tuple(dict.fromkeys(model.alignment for model in models)))
    return [Encoder(model).backbone.config for model in models]


def _commit_unit(unit: pa.Table, roots: Sequence[str], contracts: Sequence[Table]) -> pa.Table:
    """Write what each model made of a unit; return the unit's counts, or why it could not be written."""
    name = unit["unit"][0].as_py()
    count, failed, fault = 0, 0, None
    for at, (root, contract) in enumerate(zip(roots, contracts, strict=True)):
        if unit[f"images_{at}"][0].as_py() is None:
            continue
        images = contract.check(unnest(unit, f"images_{at}"))
        counts = {entry["values"]: entry["counts"] for entry in images["status"].value_counts().to_pylist()}
        count, failed = len(images), len(images) - counts.get("ok", 0)
        facts = {"status": counts, "device": unit[f"device_{at}"][0].as_py()}
        try:
            Store(root).commit(name, images, contract=contract.contract, key=name, facts=facts)
        except StorageError as error:
            fault = str(error)
    return pa.table({"images": [count], "failed": [failed], "fault": pa.array([fault], pa.string())})


def _close(run: Run, role: str, units: pa.Table, model: BackboneConfig) -> dict[str, Any]:
    """Check that every listed image has its row, and commit the set's `rejects`; return counts by status, and devices.

    Raises
    ------
    IncompleteTable
        If a unit is not committed or has another number of rows than it has images.
    FormatError
        If no image of the set could be audited.
    """
    store = unit_store(run, model)
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
    name = role if model == run.config.embedder else f"{role}-{store.root.name}"
    key = closing_key(run, units, model)
    run.save("embed", name, REJECTS, table, key=key, status=dict(sorted(status.items())))
    if not status["ok"]:
        reasons = ", ".join(f"{name} {count:,}" for name, count in status.most_common())
        raise FormatError(
            f"sets.{role}: none of its {sum(status.values()):,} images could be audited ({reasons}). "
            f"The reasons are in {run.folder}/embed/{name}.parquet; check the set's `uri` and `faces.mode`."
        )
    return {"status": dict(sorted(status.items())), "devices": sorted(devices)}


def closing_key(run: Run, units: pa.Table, model: BackboneConfig | None = None) -> str:
    """Digest of a set as embedded: its units, the embedder and the preparation."""
    return fingerprint(REJECTS.contract, unit_store(run, model).root.name, units["unit"].to_pylist())


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
