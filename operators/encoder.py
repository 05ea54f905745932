"""Faces to stored embeddings, one unit at a time."""

from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators import vectors
from operators.alignment import alignment
from operators.backbones import BackboneConfig, open_backbone
from operators.faces import crops
from operators.records import FACES, embedded_unit, embeddings, nest, unnest
from operators.selftest import drawn_face

T = TypeVar("T", bound=np.generic)

UNUSABLE = "the model's output is not finite or is zero"


class Encoder:
    """Embeds the faces of a unit: one row of `FACES` in, one row of `embedded_unit(width)` out."""

    def __init__(self, config: BackboneConfig) -> None:
        self.alignment = config.alignment
        self.backbone = open_backbone(config)
        self.contract = embeddings(config.width)
        self.unit_contract = embedded_unit(config.width)

    def __call__(self, unit: pa.Table) -> pa.Table:
        """The embedded unit of one unit's faces."""
        faces = unnest(FACES.check(unit), "faces")
        name, device = unit["unit"][0].as_py(), self.backbone.device
        return nest(self.embed(faces), self.unit_contract, "images", unit=name, device=device)

    def placeless(self) -> bool:
        """Whether a face has the same bits in every place of a batch, beside any others, as far as four batches show.

        Only then is the vector of an image the same wherever it is embedded, so that one may be copied for another.
        """
        pixels = alignment(self.alignment).pixels
        noise = np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3), np.uint8)
        pair, count = np.stack([drawn_face(pixels), noise]), self.backbone.config.batch
        which = np.concatenate([np.zeros(count, int), np.arange(count) % 2, np.arange(1, count + 1) % 2, [0]])
        found = self.backbone(pair[which])[which == 0]
        return bool((found.view(np.uint32) == found[:1].view(np.uint32)).all())

    def embed(self, faces: pa.Table) -> pa.Table:
        """Rows of the embeddings contract, one per row of FACE, in the same order; equal faces are embedded once."""
        ready = np.asarray(pc.equal(faces["status"], "ok"))
        ok = faces.filter(pa.array(ready))
        number = pc.fill_null(ok["face"], 1).cast(pa.string())
        which = pc.binary_join_element_wise(ok["digest"], number, "#")
        _, first, copy_of = np.unique(which.to_numpy(zero_copy_only=False), return_index=True, return_inverse=True)
        order = np.argsort(first)  # in the order in which they come
        raw = self.backbone(crops(ok.take(pa.array(first[order])), self.alignment))[np.argsort(order)[copy_of]]
        made_ND, norms, usable = vectors.normalise(raw)
        stored_ND = _spread(made_ND, ready)
        good = _spread(usable, ready)
        status = pc.if_else(pa.array(ready & ~good), "bad_embedding", faces["status"])
        error = pc.if_else(pa.array(ready & ~good), UNUSABLE, faces["error"])
        columns = {
            "status": status,
            "error": error,
            "norm": pa.array(_spread(norms, ready), pa.float32(), mask=~good),
            "vector": vectors.to_arrow(stored_ND, good),
        }
        arrays = [columns[f.name] if f.name in columns else faces[f.name] for f in self.contract.schema]
        return self.contract.check(pa.Table.from_arrays(arrays, schema=self.contract.schema))


def _spread(values_M: NDArray[T], ready_N: NDArray[np.bool_]) -> NDArray[T]:
    """Values of the ready rows put back in their places, zero elsewhere."""
    spread = np.zeros((len(ready_N), *values_M.shape[1:]), values_M.dtype)
    spread[ready_N] = values_M
    return spread
