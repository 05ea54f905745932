"""Sets that come as ready embeddings: their units go to the store without detector, model or Ray."""

import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import Store
from operators.errors import FormatError
from operators.formats import FORMATS
from operators.ready import DEVICE, embedded
from operators.records import embeddings, unnest
from pipeline.progress import Progress
from pipeline.stage import Run


def take_ready(run: Run, pending: pa.Table, store: Store) -> pa.Table:
    """Commit those of the `pending` units that hold vectors to `store`, and return the others.

    Raises
    ------
    FormatError
        If there are such units and the audit has several embedders: vectors are of one model.
    """
    vectors = [name for name, form in FORMATS.items() if form.holds == "vectors"]
    ready = pc.is_in(pending["format"], pa.array(vectors))
    units = pending.filter(ready)
    if units.num_rows == 0:
        return pending
    if len(run.config.models()) > 1:
        raise FormatError(
            f"sets.{units['set'][0].as_py()}: holds ready embeddings, which are of one model, and the audit has "
            f"several embedders. Name the one that made them."
        )
    progress = Progress("embed", sum(map(len, units["members"])), "vectors")
    for at in range(units.num_rows):
        progress.add(*_commit(units.slice(at, 1), store, run.config.embedder.width))
    progress.end()
    return pending.filter(pc.invert(ready))


def _commit(unit: pa.Table, store: Store, width: int) -> tuple[int, int]:
    """Embed and commit one unit; its images, and how many of them failed."""
    contract = embeddings(width)
    images = contract.check(unnest(embedded(unit, width), "images"))
    counts = {entry["values"]: entry["counts"] for entry in images["status"].value_counts().to_pylist()}
    name = unit["unit"][0].as_py()
    store.commit(name, images, contract=contract.contract, key=name, facts={"status": counts, "device": DEVICE})
    return len(images), len(images) - counts.get("ok", 0)
