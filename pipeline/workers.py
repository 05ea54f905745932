"""The workers of embed: what is done to a unit, from its list of images to its committed vectors.

A unit is one row all the way. Where no model runs on a GPU, one worker takes a unit from its list to its commit
(`UnitWorker`): a worker for each core then keeps all cores at useful work, holds one unit in memory, and hands nothing
through Ray's object store. Where models run on GPUs, preparation, models and commit are steps of a chain of their own,
so that many cores can feed one GPU.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.faults import IncompleteTable, StorageError
from cluster.storage import ASIDE, Place, Store
from operators.backbones import BackboneConfig
from operators.encoder import Encoder
from operators.face_rows import Further, rows_of
from operators.faces import FaceConfig, FacePreparation
from operators.records import FACES, embedded_unit, embeddings, unnest
from operators.tables import UNITS
from pipeline.meters import Meters
from pipeline.repeats import filled, without_copies

CARRIED = ("members", "sources")
"""Columns of a listed unit that stay in its row until the commit, like `ordinals`: the number of each prepared face in
its image."""
MOST_ATTEMPTS = 3
"""A step that ended so many workers with the same unit is not tried again in this run."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every worker needs to know."""

    faces: FaceConfig
    models: tuple[BackboneConfig, ...]
    roots: tuple[Place, ...]
    """Where the embeddings of each model are kept."""

    @cached_property
    def alignments(self) -> tuple[str, ...]:
        """The crops that the models need."""
        return tuple(dict.fromkeys(model.alignment for model in self.models))

    @cached_property
    def stores(self) -> tuple[Store, ...]:
        """The stores at `roots`."""
        return tuple(map(Store, self.roots))


class Attempts:
    """How often a step began on a unit and was ended by the death of its process, of this run.

    Ray Data starts a dead worker and its unit again without end, which is right for a machine that went away and wrong
    for a unit that takes more memory than there is. The count is a small file in the store; `Store.sweep` forgets it.
    """

    def __init__(self, store: Store, step: str) -> None:
        self.store, self.step = store, step

    def begin(self, unit: pa.Table) -> str | None:
        """Count an attempt; the reason not to make it if there were `MOST_ATTEMPTS`."""
        tried = self.store.noted(self._name(unit)) or b""
        if len(tried) >= MOST_ATTEMPTS:
            return (
                f"{len(tried)} workers died one after the other in the step {self.step} of unit "
                f"{unit['unit'][0].as_py()}, {len(unit['members'][0]):,} images."
            )
        self.store.note(self._name(unit), tried + b".")
        return None

    def end(self, unit: pa.Table) -> None:
        """Forget the unit, which was survived."""
        self.store.forget(self._name(unit))

    def _name(self, unit: pa.Table) -> str:
        return f"{ASIDE}{unit['unit'][0].as_py()}-{self.step}"


class UnitPreparation:
    """The faces of a listed unit, without the images whose rows can be taken from other units."""

    def __init__(self, task: Task) -> None:
        self.task, self.meters, self.attempts = task, Meters(), Attempts(task.stores[0], "prepare")
        self.preparation = FacePreparation(task.faces, task.alignments)
        if self.preparation.sandbox is not None:
            self.preparation.sandbox.start()  # while the models open

    def __call__(self, unit: pa.Table) -> pa.Table:
        """A row of `UNITS` with `sources` in; a row of `FACES` with the columns `CARRIED` out."""
        name, lost = unit["unit"][0].as_py(), self.attempts.begin(unit)
        wanting = [store for store in self.task.stores if store.find(name) is None]
        listed = without_copies(unit, wanting).select(UNITS.schema.names)
        made = FACES.from_rows([{"unit": name, "faces": []}])
        if lost is None:
            if wanting:  # Ray may ask again for a unit that is committed, if a worker died that held its counts
                with self.meters.stage("prepare", len(listed["members"][0])):
                    made = self.preparation(listed)
            self.attempts.end(unit)
        faces = made["faces"].combine_chunks()
        made = made.append_column("ordinals", pa.ListArray.from_arrays(faces.offsets, faces.values.field("face")))
        for column in CARRIED:
            made = made.append_column(column, unit[column])
        return made.append_column("lost", pa.array([lost], pa.string()))


class UnitEncoder:
    """Adds what one model makes of a unit's faces to the unit's row; nothing where its store has the unit already."""

    def __init__(self, task: Task, place: int) -> None:
        model = task.models[place]
        self.encoder, self.store, self.meters = Encoder(model), task.stores[place], Meters()
        self.attempts = Attempts(self.store, "embed")
        self.contract = embedded_unit(model.width)
        self.last = place == len(task.models) - 1
        self.names = [f"{name}_{place}" for name in ("device", "images")]

    def __call__(self, unit: pa.Table) -> pa.Table:
        """The row with two more columns, and without the faces if no model comes after this one."""
        columns = [pa.nulls(1, self.contract.schema.field(name).type) for name in ("device", "images")]
        lost = unit["lost"][0].as_py() or self.attempts.begin(unit)
        if lost is None:
            if self.store.find(unit["unit"][0].as_py()) is None:
                with self.meters.stage("embed", _images(unit)):
                    made = self.encoder(unit.select(FACES.schema.names))
                columns = [made["device"], made["images"]]
            self.attempts.end(unit)
        unit = unit.set_column(unit.schema.get_field_index("lost"), "lost", pa.array([lost], pa.string()))
        for name, column in zip(self.names, columns, strict=True):
            unit = unit.append_column(name, column)
        return unit.drop_columns(["faces"]) if self.last else unit


class UnitCommit:
    """Writes what each model made of a unit; returns the unit's counts, or why it could not be written."""

    def __init__(self, task: Task) -> None:
        self.task, self.meters = task, Meters()
        self.contracts = [embeddings(model.width) for model in task.models]

    def __call__(self, unit: pa.Table) -> pa.Table:
        """One row: `images`, `failed` and `copies` of the unit; `fault` if a store could not be written or read, and
        `lost` if the unit ended too many workers.
        """
        images, lost = len(unit["members"][0]), unit["lost"][0].as_py()
        failed, copies, fault = 0, 0, None
        for place, store in enumerate(self.task.stores if lost is None else ()):
            try:
                earlier = store.find(unit["unit"][0].as_py())
                counts, faces = (earlier.facts["status"], 0) if earlier else self._commit(unit, place)
            except (IncompleteTable, StorageError) as error:
                fault = str(error)
                continue
            failed = max(failed, sum(counts.values()) - counts.get("ok", 0))
            if earlier is None:
                copies = images - _images(unit)
                self.meters.committed(counts, faces, copies)
        row = {"images": [images], "failed": [failed], "copies": [copies]}
        return pa.table({**row, "fault": pa.array([fault], pa.string()), "lost": pa.array([lost], pa.string())})

    def _commit(self, unit: pa.Table, place: int) -> tuple[dict[str, int], int]:
        """Commit what a model made of a unit, with the rows of its copies; its images by status, and embedded faces."""
        store, contract, name = self.task.stores[place], self.contracts[place], unit["unit"][0].as_py()
        with self.meters.stage("commit", len(unit["members"][0])):
            embedded = contract.check(unnest(unit, f"images_{place}"))
            made, several = filled(embedded, _ordinals(unit), unit, store)
            counts = {one["values"]: one["counts"] for one in made["status"].value_counts().to_pylist()}
            facts = {"status": counts, "device": unit[f"device_{place}"][0].as_py()}
            facts |= {"faces": several} if several else {}
            store.commit(name, contract.check(made), contract=contract.contract, key=name, facts=facts)
        return by_image(made["status"].to_pylist(), several, len(unit["members"][0])), counts.get("ok", 0)


def by_image(status: Sequence[str], several: Further, images: int) -> dict[str, int]:
    """How many of a unit's images have which status: `ok` if one of its faces has, else that of the first.

    Parameters
    ----------
    status
        Of each row.
    several
        Which of the images have several rows.
    images
        How many there are.
    """
    if not several:
        return dict(Counter(status))
    ends = np.cumsum(rows_of(several, images)).tolist()
    rows = (status[start:end] for start, end in pairwise([0, *ends]))
    return dict(Counter("ok" if "ok" in own else own[0] for own in rows))


def _images(unit: pa.Table) -> int:
    """Images of a unit that were prepared; the others are copies."""
    return int((_ordinals(unit) == 1).sum())


def _ordinals(unit: pa.Table) -> NDArray[np.int64]:
    """The number of each prepared face of a unit in its image."""
    return np.asarray(unit["ordinals"].combine_chunks().flatten().to_numpy(), np.int64)


class UnitWorker:
    """All steps in one process."""

    def __init__(self, task: Task) -> None:
        self.steps: list[Callable[[pa.Table], pa.Table]] = [UnitPreparation(task)]
        self.steps += [UnitEncoder(task, place) for place in range(len(task.models))]
        self.steps.append(UnitCommit(task))

    def __call__(self, unit: pa.Table) -> pa.Table:
        """A row of `UNITS` with `sources` in, what `UnitCommit` returns out."""
        for step in self.steps:
            unit = step(unit)
        return unit
