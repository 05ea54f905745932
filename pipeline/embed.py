"""embed: every image of every set to a stored embedding, or to a row that says why not.

    units -> read + decode + detect + align -> embed -> embed by the next model -> one committed file per unit and model

On CPUs one actor does all of this for a unit; with GPUs, preparation (CPU actors), models (GPU actors) and commit are
steps with actors of their own (`pipeline.workers`). An image is decoded and its face detected once, whatever the number
of models; each model has its own store. A unit is one row all the way, so Ray's blocks never decide what is computed
together. Resume is a listing: units whose file is committed under this embedder and preparation are not computed again,
by this run or any other that shares the store.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.faults import ClusterError, IncompleteTable, StorageError
from cluster.pool import original_errors
from cluster.resources import Resources
from cluster.storage import Commit, Place, Store, to_json
from operators.backbones import BackboneConfig, address
from operators.encoder import Encoder
from operators.errors import FormatError
from operators.face_rows import Further, expanded, rows_of
from operators.faces import PREPARATION_VERSION, FaceConfig, FacePreparation
from operators.records import embeddings
from operators.tables import REJECTS, UNITS
from pipeline.earlier import keep_units, units_before
from pipeline.models import obtained
from pipeline.progress import Progress
from pipeline.ready_units import take_ready
from pipeline.repeats import with_sources
from pipeline.stage import Run, fingerprint
from pipeline.translated import apart, told, translate_units
from pipeline.workers import Task, UnitCommit, UnitEncoder, UnitPreparation, UnitWorker

log = logging.getLogger(__name__)


COMMIT = Resources(workers=64, cpus=0.1)
"""Of the step that writes, where steps have workers of their own."""
RUNTIME = "runtime.json"
"""Beside the embeddings of a model: what ran it when the first of them were made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """Workers of the embed stage."""

    prepare: Resources = field(default_factory=lambda: Resources(workers=64, cpus=0.4))
    encode: Resources = field(default_factory=lambda: Resources(workers=64, cpus=0.4))
    chain: str = "auto"
    """`steps`: images are prepared by some workers and embedded by others, each sized by itself; best where GPUs embed.
    `whole`: every worker takes a unit from its list to its commit, with the shares of both; best where CPUs do all.
    `auto`: `whole` unless `encode.gpus` is set. The tables are the same bytes."""

    def __post_init__(self) -> None:
        if self.chain not in ("auto", "steps", "whole"):
            raise ValueError(f"chain must be one of auto, steps, whole. Got {self.chain!r}.")

    @property
    def in_one_worker(self) -> bool:
        """Whether each worker does all steps."""
        return self.chain == "whole" or (self.chain == "auto" and not self.encode.gpus)

    @property
    def worker(self) -> Resources:
        """Shares of a worker that does all steps."""
        return Resources(
            workers=min(self.prepare.workers, self.encode.workers),
            cpus=self.prepare.cpus + self.encode.cpus,
            gpus=self.prepare.gpus + self.encode.gpus,
        )


def embed(run: Run) -> None:
    """Embed what is not yet in the stores, and commit for each set the table of images that could not be audited."""
    with run.timed("embed") as facts:
        units = {role: run.table("scan", role, UNITS) for role in run.config.sets.embedded()}
        models = run.config.models()
        wanted = pa.concat_tables(units.values()).combine_chunks()
        pending = _pending(wanted, [unit_store(run, model) for model in models])
        images = sum(map(len, wanted["members"]))
        facts["images"], facts["units"] = images, wanted.num_rows
        facts["embedded_now"] = sum(map(len, pending["members"]))
        if pending.num_rows:
            unit_store(run).make_key()
            for model in models:
                unit_store(run, model).sweep()
            pending, foreign = apart(run, run.readable(pending))
            pending = take_ready(run, pending, unit_store(run))
            if pending.num_rows:
                run.ray()
                facts["copied_now"] = _embed_units(pending, wanted, run)
            translate_units(run, foreign, unit_store(run))
        else:
            log.info("embed: nothing to do, %s images in %s units are embedded", f"{images:,}", f"{wanted.num_rows:,}")
        for model in models[1:]:
            facts[f"model {model.name}"] = {role: _close(run, role, table, model) for role, table in units.items()}
        for role, table in units.items():
            facts[role] = _close(run, role, table, models[0])
        keep_units(run, units)
        if run.config.sets.foreign():
            facts["translation"] = told(run, unit_store(run))
        audited = sum(facts[role]["status"]["ok"] for role in units)
        what = f"{audited:,} faces" if run.config.faces.several == "all" else f"{audited:,}"
        log.info("embed: %s of %s images audited", what, f"{images:,}")


def unit_store(run: Run, model: BackboneConfig | None = None) -> Store:
    """Where embeddings of a model, if none is named of the audit's first, and of this face preparation are kept."""
    return run.embeddings.child(embedding_key(model or run.config.embedder, run.config.faces))


def embedding_key(embedder: BackboneConfig, faces: FaceConfig) -> str:
    """Digest of everything that an embedding depends on apart from the image; paths are not part of it."""
    aside = ("detector", "isolate", *(("most_faces",) if faces.several != "all" else ()))
    preparation = {name: value for name, value in asdict(faces).items() if name not in aside}
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


def _embed_units(pending: pa.Table, wanted: pa.Table, run: Run) -> int:
    """The Ray Data chain, from units to committed files; returns how many rows were taken from other units."""
    import ray
    import ray.data

    faces = replace(run.config.faces, detector=os.path.abspath(run.config.faces.detector))
    models = [replace(one, path=os.path.abspath(one.path)) for one in map(obtained, run.config.models())]
    roots: list[Place] = [unit_store(run, model) for model in models]
    shares = run.config.embed.encode
    opening = ray.remote(num_cpus=shares.cpus, num_gpus=shares.gpus, max_retries=3)(_open_models)
    with original_errors():
        models, placeless = ray.get(opening.remote(faces, _as_begun(models, roots)))
    for model, root in zip(models, roots, strict=True):
        Store(root).note(RUNTIME, to_json({"runtime": model.runtime}))
    earlier = units_before(run, wanted, [unit_store(run, model) for model in run.config.models()])
    listed = with_sources(pending, pa.concat_tables([earlier, wanted]), copies=placeless)
    task = Task(faces=faces, models=tuple(models), roots=tuple(roots))
    committed = _chain(ray.data.from_arrow([listed.slice(at, 1) for at in range(listed.num_rows)]), task, run)
    progress, copies = Progress("embed", sum(map(len, pending["members"])), "images"), 0
    with original_errors():
        for row in committed.iter_rows():
            _refuse(row)
            progress.add(row["images"], row["failed"])
            copies += row["copies"]
    progress.end()
    return copies


def _chain(units: Any, task: Task, run: Run) -> Any:
    """The dataset of committed units' counts: one worker for all steps, or a step each where a model is on a GPU."""
    options, count = run.config.embed, units.num_blocks()
    if options.in_one_worker:
        shares = options.worker
        return units.map_batches(UnitWorker, fn_constructor_args=(task,), **shares.map_options(at_least=count))
    made = units.map_batches(UnitPreparation, fn_constructor_args=(task,), **options.prepare.map_options())
    for place in range(len(task.models)):
        made = made.map_batches(UnitEncoder, fn_constructor_args=(task, place), **options.encode.map_options())
    return made.map_batches(UnitCommit, fn_constructor_args=(task,), **COMMIT.map_options())


def _refuse(row: dict[str, Any]) -> None:
    """Raise what a worker reports instead of a committed unit."""
    if row["fault"] is not None:
        raise StorageError(row["fault"])
    if row["lost"] is not None:
        raise ClusterError(
            f"{row['lost']} Most likely memory ran out: set fewer `embed.encode.workers`, or a smaller "
            f"`scan.unit_images`, the images that a worker holds. What is committed is kept; run `unveil embed` again."
        )


def _as_begun(models: Sequence[BackboneConfig], roots: Sequence[Place]) -> list[BackboneConfig]:
    """The models, with `auto` as it was chosen when their stores were begun: another choice has other last bits."""
    begun = []
    for model, root in zip(models, roots, strict=True):
        chosen, noted = model.runtime, Store(root).noted(RUNTIME)
        if chosen == "auto" and noted is not None:
            chosen = str(json.loads(noted)["runtime"])
        begun.append(replace(model, runtime=chosen))
    return begun


def _open_models(faces: FaceConfig, models: Sequence[BackboneConfig]) -> tuple[list[BackboneConfig], bool]:
    """Open all models once where they will run: a missing or wrong file is reported as itself, before any work.

    Returns the models with what `auto` came to, so that no two workers of a run, or of its resumption, differ; and
    whether equal images have equal vectors in any place of any batch.
    """
    FacePreparation(faces, tuple(dict.fromkeys(model.alignment for model in models)))
    encoders = [Encoder(model) for model in models]
    return [one.backbone.config for one in encoders], all(one.placeless() for one in encoders)


def _close(run: Run, role: str, units: pa.Table, model: BackboneConfig) -> dict[str, Any]:
    """Check that every listed image has its row, and commit the set's `rejects`.

    Returns counts by status, devices, and the name of the table of rejects. Preparation is shared by all models of an
    audit, so what one model alone could not embed is what has the status `bad_embedding` there.

    Raises
    ------
    IncompleteTable
        If a unit is not committed or has another number of rows than its images have faces.
    FormatError
        If no image of the set could be audited, or a further face has the name of an image.
    """
    store = unit_store(run, model)
    status: Counter[str] = Counter()
    devices: set[str] = set()
    rejects = [REJECTS.schema.empty_table()]
    several: list[Further] = []
    sizes = pc.list_value_length(units["members"]).to_pylist()
    for name, size in zip(units["unit"].to_pylist(), sizes, strict=True):
        made = store.find(name)
        several.append(made.facts.get("faces", {}) if made else {})
        if made is None or made.rows != rows_of(several[-1], size).sum():
            raise IncompleteTable(
                f"unit {name} of the {role} set: {size} images listed, {made.rows if made else 'none'} embedded. Run "
                f"`unveil embed` again."
            )
        counts = made.facts["status"]
        status.update(counts)
        devices.add(made.facts["device"])
        if set(counts) != {"ok"}:
            rejects.append(_rejects(role, store.read(name)))
    expanded(units, several)  # for its check of names
    table = pa.concat_tables(rejects).combine_chunks()
    name = rejects_name(run, role, model)
    key = closing_key(run, units, model)
    run.save("embed", name, REJECTS, table, key=key, status=dict(sorted(status.items())))
    if not status["ok"]:
        reasons = ", ".join(f"{name} {count:,}" for name, count in status.most_common())
        raise FormatError(
            f"sets.{role}: none of its {sum(status.values()):,} images could be audited ({reasons}). "
            f"The reasons are in {run.folder}/embed/{name}.parquet; check the set's `uri` and `faces.mode`."
        )
    return {"status": dict(sorted(status.items())), "devices": sorted(devices), "rejects": name}


def rejects_name(run: Run, role: str, model: BackboneConfig | None = None) -> str:
    """The table of embed with a set's images that a model, if none is named the audit's first, could not embed."""
    if model is None or model == run.config.embedder:
        return role
    return f"{role}-{unit_store(run, model).name}"


def closing_key(run: Run, units: pa.Table, model: BackboneConfig | None = None) -> str:
    """Digest of a set as embedded: its units, the embedder and the preparation."""
    return fingerprint(REJECTS.contract, unit_store(run, model).name, units["unit"].to_pylist())


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
