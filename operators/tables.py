"""The contracts of the tables that pass between stages.

Suffixes of array names, here and in all operators: N rows of one set, Q queries (release images), G gallery images,
D components of an embedding, H and W pixels, C channels, K neighbours kept. `vectors_ND` has shape (N, D).

A row of `UNITS` and of `FACES` is a whole unit, so that a unit crosses Ray Data as one row and can never be split or
mixed with another; its images are a nested list that `unnest` and `nest` open and close. All other tables have one
row per image, pair or person.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from operators.errors import SchemaMismatch

FACE_PIXELS = 112
"""Side of an aligned face in pixels (ArcFace convention)."""

FACE_BYTES = FACE_PIXELS * FACE_PIXELS * 3
"""Bytes of an aligned RGB face."""

STATUSES = (
    "ok",
    "unreadable",  # the file could not be opened
    "changed",  # its bytes are not those that scan listed
    "not_an_image",  # not a JPEG, PNG, WebP, BMP or PPM/PGM file, whatever its name
    "corrupt",  # an image that ends early or cannot be decoded
    "too_large",  # over the limit of bytes or pixels
    "not_aligned",  # `aligned` mode was declared, and the image is not a 112 x 112 face
    "no_face",
    "several_faces",  # more than one face, and the policy is to reject
    "bad_embedding",  # the model's output is not finite, or zero
)
"""Outcomes of one image. All but `ok` mean that the image was not audited; the row's `error` says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A named, versioned Arrow schema. A change of columns or of their meaning bumps `version`."""

    name: str
    version: int
    schema: pa.Schema

    @property
    def contract(self) -> str:
        """Name and version as commit markers record it, for example `units/1`."""
        return f"{self.name}/{self.version}"

    def check(self, table: pa.Table) -> pa.Table:
        """Return `table` unchanged if its columns are exactly the contract's, else raise SchemaMismatch."""
        if table.schema.equals(self.schema):
            return table
        expected = {f.name: f.type for f in self.schema}
        found = {f.name: f.type for f in table.schema}
        wrong = [
            f"{n}: expected {t}, found {found.get(n, 'nothing')}" for n, t in expected.items() if found.get(n) != t
        ]
        wrong += [f"{n}: not part of the contract" for n in found if n not in expected]
        wrong += [f"{n}: occurs {table.schema.names.count(n)} times" for n in found if table.schema.names.count(n) > 1]
        reason = "; ".join(wrong) or "columns are in another order"
        raise SchemaMismatch(f"table {self.contract}: {reason}. Remove the stage's output and run the stage again.")

    def from_rows(self, rows: list[dict[str, Any]]) -> pa.Table:
        """Build a table under this contract from one dict per row; missing columns become null."""
        return pa.Table.from_pylist(rows, schema=self.schema)


MEMBER = pa.struct(
    [
        pa.field("key", pa.string()),  # path inside the set, `/` separated: the image's name everywhere
        pa.field("identity", pa.string()),  # label of the person inside the set; null where the set has none
        pa.field("bytes", pa.int64()),
        pa.field("digest", pa.string()),  # SHA-256 of the encoded image; null where it could not be read
        pa.field("error", pa.string()),  # why it could not be read; null otherwise
    ]
)

UNITS = Table(
    name="units",
    version=1,
    schema=pa.schema(
        [
            pa.field("set", pa.string()),  # role in the audit: release, training, control or anchor
            pa.field("uri", pa.string()),
            pa.field("format", pa.string()),
            pa.field("unit", pa.string()),  # digest of the members: the unit's name
            pa.field("first_row", pa.int64()),  # row number of the first member in the set's key order
            pa.field("members", pa.list_(MEMBER)),
        ]
    ),
)

FACE = pa.struct(
    [
        pa.field("key", pa.string()),
        pa.field("identity", pa.string()),
        pa.field("digest", pa.string()),
        pa.field("status", pa.string()),
        pa.field("error", pa.string()),
        pa.field("faces_found", pa.int32()),
        pa.field("detector_score", pa.float32()),  # null in `aligned` mode
        pa.field("box", pa.list_(pa.float32(), 4)),  # x, y, width, height in pixels of the upright image
        pa.field("crop", pa.binary(FACE_BYTES)),  # aligned RGB face, row-major uint8; null unless status is ok
    ]
)

FACES = Table(
    name="faces",
    version=1,
    schema=pa.schema([pa.field("unit", pa.string()), pa.field("faces", pa.list_(FACE))]),
)


def embeddings(width: int) -> Table:
    """The contract of embeddings with `width` components: one row per image, failed images included."""
    return Table(
        name="embeddings",
        version=1,
        schema=pa.schema(
            [
                pa.field("key", pa.string()),
                pa.field("identity", pa.string()),
                pa.field("digest", pa.string()),
                pa.field("status", pa.string()),
                pa.field("error", pa.string()),
                pa.field("faces_found", pa.int32()),
                pa.field("detector_score", pa.float32()),
                pa.field("box", pa.list_(pa.float32(), 4)),
                pa.field("norm", pa.float32()),  # length of the vector before normalisation: a quality proxy
                pa.field("vector", pa.list_(pa.float16(), width)),  # unit length, rounded to fp16; null unless ok
            ]
        ),
    )


def embedded_unit(width: int) -> Table:
    """The contract of one embedded unit: the rows of `embeddings(width)` as a nested list."""
    rows = pa.list_(pa.struct(list(embeddings(width).schema)))
    return Table(
        name="embedded_unit",
        version=1,
        schema=pa.schema(
            [
                pa.field("unit", pa.string()),
                pa.field("device", pa.string()),  # what the embedder ran on
                pa.field("images", rows),
            ]
        ),
    )


NEIGHBOURS = Table(
    name="neighbours",
    version=1,
    schema=pa.schema(
        [
            pa.field("release_row", pa.int64()),
            pa.field("arm", pa.string()),  # the gallery set: training or control
            pa.field("gallery_row", pa.int64()),
            pa.field("rank", pa.int32()),  # 1 is the best of this arm for this release image
            pa.field("cosine", pa.float64()),  # exact inner product of the stored vectors
        ]
    ),
)

CLOSEST = Table(
    name="closest",
    version=1,
    schema=pa.schema(
        [
            pa.field("arm", pa.string()),
            pa.field("gallery_row", pa.int64()),
            pa.field("release_row", pa.int64()),
            pa.field("rank", pa.int32()),  # 1 is the best release image of its block for this gallery image
            pa.field("cosine", pa.float64()),
        ]
    ),
)

PAIRS = Table(
    name="pairs",
    version=1,
    schema=pa.schema(
        [
            pa.field("release_row", pa.int64()),
            pa.field("arm", pa.string()),
            pa.field("gallery_row", pa.int64()),
            pa.field("cosine", pa.float64()),
        ]
    ),
)

CANDIDATES = Table(
    name="candidates",
    version=1,
    schema=pa.schema(
        [
            pa.field("rank", pa.int64()),  # 1 is the highest cosine of this arm
            pa.field("arm", pa.string()),
            pa.field("release_key", pa.string()),
            pa.field("release_identity", pa.string()),
            pa.field("gallery_key", pa.string()),
            pa.field("gallery_identity", pa.string()),
            pa.field("cosine", pa.float64()),
            pa.field("same_bytes", pa.bool_()),  # both files have the same SHA-256
            pa.field("release_multiplicity", pa.int64()),  # candidates of this arm with the same release image
            pa.field("gallery_multiplicity", pa.int64()),  # candidates of this arm with the same gallery image
        ]
    ),
)

FINDINGS = Table(
    name="findings",
    version=1,
    schema=pa.schema(
        [
            pa.field("rank", pa.int64()),
            pa.field("training_identity", pa.string()),  # null where the training set has no labels
            pa.field("training_key", pa.string()),  # the image of the best candidate
            pa.field("release_identity", pa.string()),
            pa.field("release_key", pa.string()),
            pa.field("cosine", pa.float64()),
            pa.field("same_bytes", pa.bool_()),
            pa.field("candidates", pa.int64()),  # pairs over the threshold that involve this person
            pa.field("release_images", pa.int64()),  # distinct release images among them
            pa.field("decision", pa.string()),
        ]
    ),
)


REJECTS = Table(
    name="rejects",
    version=1,
    schema=pa.schema(
        [
            pa.field("set", pa.string()),
            pa.field("key", pa.string()),
            pa.field("digest", pa.string()),
            pa.field("status", pa.string()),
            pa.field("error", pa.string()),
        ]
    ),
)


def unnest(table: pa.Table, column: str) -> pa.Table:
    """The images of a one-row unit table as one row each.

    Raises
    ------
    SchemaMismatch
        If `table` has not exactly one row.
    """
    if table.num_rows != 1:
        raise SchemaMismatch(f"a unit is one row; found {table.num_rows}. Pass units one at a time (batch_size=1).")
    return pa.Table.from_struct_array(table[column].combine_chunks().flatten())


def nest(images: pa.Table, contract: Table, column: str, **values: Any) -> pa.Table:
    """One row of `contract` whose `column` holds the rows of `images` and whose other columns are `values`."""
    struct = contract.schema.field(column).type.value_type
    rows = pa.StructArray.from_arrays([images[f.name].combine_chunks() for f in struct], fields=list(struct))
    nested = pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)
    columns = [nested if f.name == column else pa.array([values[f.name]], f.type) for f in contract.schema]
    return contract.check(pa.Table.from_arrays(columns, schema=contract.schema))
