"""Units of ready embeddings of a foreign model, taken into the audit's space by a map of `operators.translation`."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators import vectors
from operators.addresses import public
from operators.encoder import UNUSABLE
from operators.errors import FormatError
from operators.formats import reader
from operators.ready import embedded
from operators.records import embedded_unit, embeddings, nest, unnest
from operators.tables import UNITS
from operators.translation import Translation

DEVICE = "translated"
"""What stands where other units say what the embedder ran on."""
LOOK = 64
"""Vectors that tell the width of a set."""
WIDEST = 65_536
"""Components of a vector at most; a longer one is none."""


def width_of(units: pa.Table) -> int:
    """Components of a vector in listed units (UNITS, several rows) of one set: what most of the first `LOOK` have.

    Raises
    ------
    FormatError
        If none of the first vectors can be read.
    """
    found = Counter(_widths(units))
    found.pop(0, None)
    if not found:
        raise FormatError(
            f"{public(units['uri'][0].as_py())}: none of the first {LOOK} vectors can be read. Check the set."
        )
    return found.most_common(1)[0][0]


def _widths(units: pa.Table) -> Iterator[int]:
    """Widths of the first vectors, 0 for one that cannot be read."""
    left = LOOK
    for unit in UNITS.check(units).to_pylist():
        with reader(unit["format"], unit["uri"], unit["anonymous"]) as opened:
            for member in unit["members"][:left]:
                left -= 1
                try:
                    if member["error"] is None:
                        with opened.open(member["place"] or member["key"], member["version"]) as file:
                            bytes_read = len(file.read(4 * WIDEST + 1))
                        yield bytes_read // 4 if bytes_read % 4 == 0 and bytes_read <= 4 * WIDEST else 0
                except OSError:
                    yield 0
        if left <= 0:
            return


def usable(unit: pa.Table, width: int) -> tuple[list[str], NDArray[np.float16]]:
    """Keys and unit-length vectors (N, `width`) of those rows of one listed unit of ready vectors that are good."""
    images = unnest(embedded(unit, width), "images")
    good = images.filter(pc.is_valid(images["vector"]))
    return good["key"].to_pylist(), vectors.from_arrow(good["vector"])


def translated(unit: pa.Table, translation: Translation) -> pa.Table:
    """The embedded unit, in the map's target space, of one listed unit of a foreign model's vectors.

    A vector is scaled to unit length, mapped, scaled again and rounded to fp16. A bad one is a row that says so, as in
    `operators.ready`; so is one that the map takes to zero. `norm` is the length of the vector as it was given.

    Parameters
    ----------
    unit
        One row of UNITS whose form holds vectors.
    translation
        The map from the space that the vectors are in.
    """
    source, target = translation.map_DE.shape
    images = unnest(embedded(unit, source), "images")
    good_N = np.asarray(images["vector"].combine_chunks().is_valid())
    raw_NE = np.zeros((len(images), target))
    foreign_MD = vectors.from_arrow(images["vector"].filter(pa.array(good_N))).astype(np.float64)
    raw_NE[good_N] = foreign_MD @ translation.map_DE + translation.offset_E
    made_NE, _, usable_N = vectors.normalise(raw_NE)
    lost = pa.array(good_N & ~usable_N)
    good_N &= usable_N
    columns = {
        "status": pc.if_else(lost, "bad_embedding", images["status"]),
        "error": pc.if_else(lost, UNUSABLE, images["error"]),
        "norm": pc.if_else(lost, pa.scalar(None, pa.float32()), images["norm"]),
        "vector": vectors.to_arrow(made_NE, good_N),
    }
    contract = embeddings(target)
    arrays = [columns[f.name] if f.name in columns else images[f.name] for f in contract.schema]
    table = contract.check(pa.Table.from_arrays(arrays, schema=contract.schema))
    return nest(table, embedded_unit(target), "images", unit=unit["unit"][0].as_py(), device=DEVICE)
