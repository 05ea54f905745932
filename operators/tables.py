"""The contracts of the tables that pass between stages.

Suffixes of array names, here and in all operators: N rows of one set, Q queries (release images), G gallery images,
D components of an embedding, H and W pixels, C channels, K neighbours kept. `vectors_ND` has shape (N, D).

A row of `UNITS` and of the tables in `operators/records.py` is a whole unit, so that a unit crosses Ray Data as one row
and can never be split or mixed with another; its images are a nested list. All other tables have one row per image,
pair or person.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from operators.errors import SchemaMismatch

FACE_PIXELS = 112
"""Side of an aligned face in pixels (ArcFace convention)."""

STATUSES = (
    "ok",
    "unreadable",  # the file could not be opened
    "changed",  # its bytes are not those that scan listed
    "not_an_image",  # not a JPEG, PNG, WebP, BMP or PPM/PGM file, whatever its name
    "corrupt",  # an image that ends early or cannot be decoded
    "too_large",  # over the limit of bytes or pixels
    "not_aligned",  # `aligned` mode was declared, and the image is not a 112 x 112 face
    "no_face",
    "too_small",  # a face, but smaller than `faces.min_face`
    "several_faces",  # more than one face, and the policy is to reject
    "timed_out",  # reading, decoding and detection took longer than they may
    "crashed",  # they ended the process that they ran in
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
        pa.field("key", pa.string()),  # path inside the set, `/` separated: its name everywhere
        pa.field("identity", pa.string()),  # label of the person inside the set; null where the set has none
        pa.field("bytes", pa.int64()),
        pa.field("digest", pa.string()),  # SHA-256 of the encoded image; null where it could not be read
        pa.field("error", pa.string()),  # why it could not be read; null otherwise
        pa.field("place", pa.string()),  # where its bytes are, for the reader of the set's form; null: the key says it
        pa.field("version", pa.string()),  # what its file was called by its server when it was listed (an ETag)
        pa.field("attributes", pa.map_(pa.string(), pa.string())),  # those that the configuration asks for
    ]
)

UNITS = Table(
    name="units",
    version=2,
    schema=pa.schema(
        [
            pa.field("set", pa.string()),  # role in the audit: release, training, control or anchor
            pa.field("uri", pa.string()),
            pa.field("format", pa.string()),  # one of `operators.formats.FORMATS`
            pa.field("anonymous", pa.bool_()),  # object storage is asked without credentials
            pa.field("unit", pa.string()),  # digest of the members: the unit's name
            pa.field("first_row", pa.int64()),  # row number of the first member in the set's key order
            pa.field("members", pa.list_(MEMBER)),
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
    version=2,
    schema=pa.schema(
        [
            pa.field("arm", pa.string()),
            pa.field("gallery_row", pa.int64()),
            pa.field("release_row", pa.int64()),
            pa.field("rank", pa.int32()),  # 1 is the best release image of all for this gallery image
            pa.field("cosine", pa.float64()),
        ]
    ),
)

PAIRS = Table(
    name="pairs",
    version=1,
    schema=pa.schema(
        {"release_row": pa.int64(), "arm": pa.string(), "gallery_row": pa.int64(), "cosine": pa.float64()}
    ),
)

WITHIN_NEIGHBOURS = Table(
    name="within_neighbours",
    version=1,
    schema=pa.schema(
        {"set": pa.string(), "row": pa.int64(), "other_row": pa.int64(), "rank": pa.int32(), "cosine": pa.float64()}
    ),
)

WITHIN_PAIRS = Table(  # `other_row` is above `row`, so that a pair is there once
    name="within_pairs",
    version=1,
    schema=pa.schema({"set": pa.string(), "row": pa.int64(), "other_row": pa.int64(), "cosine": pa.float64()}),
)

TILES = Table(
    name="tiles",
    version=1,
    schema=pa.schema(
        [
            pa.field("part", pa.int8()),  # 0: best of a query, 1: best of a gallery image, 2: over the floor
            pa.field("query", pa.int32()),  # place of the image in its block of queries, failed images counted
            pa.field("gallery", pa.int32()),  # place in the shard
            pa.field("cosine", pa.float64()),
        ]
    ),
)

SCORES = Table(
    name="scores",
    version=1,
    schema=pa.schema(
        [
            pa.field("arm", pa.string()),
            pa.field("cosine", pa.float64()),
            pa.field("pairs", pa.int64()),  # with this cosine or more, exactly
            pa.field("comparisons", pa.int64()),  # of which
            pa.field("basis", pa.string()),  # `all` comparisons of the arm, or a random `sample` of them
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

PEOPLE = Table(
    name="people",
    version=1,
    schema=pa.schema(
        [
            pa.field("unit", pa.int64()),  # number of the unit of inference, over both arms
            pa.field("arm", pa.string()),  # training or control
            pa.field("identity", pa.string()),  # label of the image below
            pa.field("labels", pa.int64()),  # distinct labels of the unit; more than 1: label noise, twins, copies
            pa.field("images", pa.int64()),
            pa.field("key", pa.string()),  # the image with the best match in the release
            pa.field("release_key", pa.string()),
            pa.field("release_identity", pa.string()),
            pa.field("cosine", pa.float64()),  # of the two: M(S)
            pa.field("anchor_cosine", pa.float64()),  # best match in the anchor set: M(A)
            pa.field("statistic", pa.float64()),  # null: none of its images was audited
            pa.field("eligible", pa.bool_()),  # takes part: has a statistic, and matching of groups kept it
            pa.field("p", pa.float64()),  # members only
            pa.field("q", pa.float64()),
            pa.field("group", pa.string()),
            pa.field("hub", pa.string()),  # why the image is thought to be near to everything, or too poor; else null
        ]
    ),
)

IMAGE_UNITS = Table(  # one row per image of training and control set, in row order
    name="image_units",
    version=1,
    schema=pa.schema({"arm": pa.string(), "unit": pa.int64()}),  # below 0: of a straddler
)

STRADDLERS = Table(
    name="straddlers",
    version=1,
    schema=pa.schema({"straddler": pa.int64(), "set": pa.string(), "key": pa.string(), "identity": pa.string()}),
)

FINDINGS = Table(
    name="findings",
    version=2,
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
            pa.field("labels", pa.int64()),  # distinct labels of the person; null where labels alone make persons
            pa.field("anchor_cosine", pa.float64()),  # this and the next three are null without a controlled claim
            pa.field("statistic", pa.float64()),
            pa.field("p", pa.float64()),
            pa.field("q", pa.float64()),
            pa.field("hub", pa.string()),  # why the image is thought to be near to everything; else null
            pa.field("tier", pa.string()),  # `operators.copies.Tier`; null where it was not looked at
            pa.field("reasons", pa.string()),
            pa.field("decision", pa.string()),
        ]
    ),
)


PAIR_EVIDENCE = Table(
    name="pair_evidence",
    version=1,
    schema=pa.schema(
        [
            pa.field("rank", pa.int64()),  # of the finding
            pa.field("hash_distance", pa.float64()),  # `operators.copies.CopySignals`
            pa.field("ncc", pa.float64()),
            pa.field("ssim", pa.float64()),
            pa.field("mirrored", pa.bool_()),
            pa.field("second_z", pa.float64()),  # the person's standardised statistic under the second face model
            pa.field("blend_partner_key", pa.string()),  # second source of the release image; null: none was found
            pa.field("blend_q", pa.float64()),
        ]
    ),
)

DISAGREEMENTS = Table(  # images whose second embedding is not what the first lets expect
    name="disagreements",
    version=1,
    schema=pa.schema({"set": pa.string(), "key": pa.string(), "cosine": pa.float64()}),
)

REJECTS = Table(
    name="rejects",
    version=1,
    schema=pa.schema({name: pa.string() for name in ("set", "key", "digest", "status", "error")}),
)
