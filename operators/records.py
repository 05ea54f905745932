"""The contracts of prepared and embedded images, and how a unit of them is opened and closed.

One row per image, failed images included, in the order in which the unit lists them; with `faces.several=all` a row for
each further face of the image follows (`operators.face_rows`). Columns that come with a face are null where there is
none.
"""

from typing import Any

import pyarrow as pa

from operators.errors import SchemaMismatch
from operators.tables import Table

CROP_COLUMNS = {"arcface112": "crop", "dlib150": "crop_dlib150"}
"""The column of FACE that holds the crop of each alignment (`operators.alignment.ALIGNMENTS`)."""

_IMAGE = [
    pa.field("key", pa.string()),
    pa.field("identity", pa.string()),
    pa.field("digest", pa.string()),
    pa.field("status", pa.string()),
    pa.field("error", pa.string()),
    pa.field("faces_found", pa.int32()),  # all that the detector found, whatever their size
    pa.field("detector_score", pa.float32()),  # null in `aligned` mode, like all three below
    pa.field("box", pa.list_(pa.float32(), 4)),  # x, y, width, height in pixels of the upright image
    pa.field("landmarks", pa.list_(pa.float32(), 10)),  # x and y of eyes, nose tip, mouth corners; same pixels
    pa.field("face_size", pa.float32()),  # shorter side of the box in pixels
    pa.field("sharpness", pa.float32()),  # `operators.quality.sharpness` of the 112 x 112 crop, in any mode
]
"""What is known of an image and its face, before and after embedding."""

FACE = pa.struct(
    [
        *_IMAGE,
        pa.field("face", pa.int32()),  # 1 for an image's first row; further faces (`faces.several=all`) count up
        # Aligned RGB faces, row-major uint8; null unless status is ok and the alignment was asked for. Not of fixed
        # size: a null would then take as much room as a face.
        *(pa.field(column, pa.binary()) for column in CROP_COLUMNS.values()),
    ]
)

FACES = Table(
    name="faces",
    version=3,
    schema=pa.schema([pa.field("unit", pa.string()), pa.field("faces", pa.list_(FACE))]),
)


def embeddings(width: int) -> Table:
    """The contract of embeddings with `width` components: one row per image, or face, failed images included."""
    return Table(
        name="embeddings",
        version=2,
        schema=pa.schema(
            [
                *_IMAGE,
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
        version=2,
        schema=pa.schema(
            [
                pa.field("unit", pa.string()),
                pa.field("device", pa.string()),  # what the embedder ran on
                pa.field("images", rows),
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
