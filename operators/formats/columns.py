"""Which columns of a Parquet or Arrow table hold the images, their names, the persons' labels and attributes.

Image columns are `struct<bytes: binary, path: string>`, as Hugging Face `datasets` writes them, or plain binary.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

from operators.errors import FormatError

if TYPE_CHECKING:
    from operators.formats import SetConfig

IMAGES = ("image", "img", "face", "jpg", "jpeg", "png", "picture", "image_bytes", "bytes", "encoded", "data")
LABELS = (
    *("identity", "identity_id", "identity_name", "subject", "subject_id", "person", "person_id"),
    *("label", "labels", "class", "target"),
)
FILES = (
    "path",
    "file_name",
    "filename",
    "image_path",
    "image_name",
    "file",
    "key",
    "__key__",
    "name",
    "id",
    "image_id",
)
VECTORS = ("embedding", "embeddings", "vector", "vectors", "feature", "features", "feat", "emb", "representation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The columns by which a table is read."""

    content: str
    """Where the images or vectors are, as a dotted path: `image.bytes`, `embedding`."""
    files: Sequence[str] = ()
    """Dotted paths of columns that may hold names of records, the likeliest first."""
    label: str | None = None
    classes: Sequence[str] | None = None
    """Names of the labels' numbers, by Hugging Face's metadata."""
    attributes: Mapping[str, str | None] = field(default_factory=dict)
    """Those that will be looked at; the value is not used."""

    def beside(self) -> list[str]:
        """All columns but the content, each once."""
        named = [*self.files, *([self.label] if self.label is not None else []), *self.attributes]
        return list(dict.fromkeys(named))


def image_columns(schema: pa.Schema) -> list[str]:
    """Top-level columns that can hold encoded images, the likeliest first."""
    found = [one.name for one in schema if _bytes_of(one) is not None and schema.names.count(one.name) == 1]
    said = features(schema)
    ranked = {name: at for at, name in enumerate(IMAGES)}
    is_image = {name for name in found if said.get(name, {}).get("_type") == "Image"}
    return sorted(found, key=lambda name: (name not in is_image, ranked.get(name.lower(), len(ranked))))


def vector_columns(schema: pa.Schema) -> list[str]:
    """Top-level columns of lists of floats, the likeliest first."""
    found = [one.name for one in schema if _is_vector(one.type) and schema.names.count(one.name) == 1]
    ranked = {name: at for at, name in enumerate(VECTORS)}
    return sorted(found, key=lambda name: ranked.get(name.lower(), len(ranked)))


def holds_images(schema: pa.Schema) -> bool:
    """Whether a table is a set of images."""
    found = image_columns(schema)
    return bool(found) and (len(found) == 1 or _is_likely(schema, found[0]))


def holds_vectors(schema: pa.Schema) -> bool:
    """Whether a table is a set of ready embeddings, and none of images."""
    return not image_columns(schema) and bool(vector_columns(schema))


def image_table(schema: pa.Schema, options: "SetConfig", where: str) -> Columns:
    """The columns of a set of images; FormatError if the image's is missing or cannot be told."""
    name = _chosen(schema, image_columns(schema), options.column, where, "images (binary, or struct<bytes, path>)")
    struct = pa.types.is_struct(schema.field(name).type)
    own = [f"{name}.path"] if struct and _has_text(schema.field(name).type, "path") else []
    return _described(schema, f"{name}.bytes" if struct else name, own, options, where)


def vector_table(schema: pa.Schema, options: "SetConfig", where: str) -> Columns:
    """The columns of a set of vectors; FormatError if the vectors' is missing or cannot be told."""
    name = _chosen(schema, vector_columns(schema), options.column, where, "vectors (lists of floats)")
    return _described(schema, name, [], options, where)


def features(schema: pa.Schema) -> Mapping[str, Mapping[str, object]]:
    """What Hugging Face's metadata say of the columns; nothing where there are none."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {name: one for name, one in said.items() if isinstance(one, dict)} if isinstance(said, dict) else {}


def _chosen(schema: pa.Schema, found: Sequence[str], wanted: str | None, where: str, what: str) -> str:
    there = ", ".join(schema.names[:30]) or "none"
    if wanted is not None:
        if wanted not in found:
            raise FormatError(f"{where}: no column {wanted!r} of {what}; its columns are {there}.")
        return wanted
    if not found:
        raise FormatError(f"{where}: no column of {what}; its columns are {there}. Correct the set's `uri`.")
    if len(found) > 1 and not _is_likely(schema, found[0]):
        raise FormatError(f"{where}: several columns of {what}: {', '.join(found[:30])}. Give the set's `column`.")
    return found[0]


def _is_likely(schema: pa.Schema, name: str) -> bool:
    return name.lower() in (*IMAGES, *VECTORS) or features(schema).get(name, {}).get("_type") == "Image"


def _described(schema: pa.Schema, content: str, own: Sequence[str], options: "SetConfig", where: str) -> Columns:
    """`Columns` with what stands beside the content; FormatError if the attribute that names persons is missing."""
    scalars = [one.name for one in schema if _is_scalar(one.type) and schema.names.count(one.name) == 1]
    label = next((one for name in LABELS for one in scalars if one.lower() == name), None)
    texts = [one for one in scalars if pa.types.is_string(_plain(schema.field(one).type)) or _is_id(schema, one)]
    files = [one for wanted in FILES for one in texts if one.lower() == wanted and one != label]
    wanted = list(options.attributes)
    if options.identity.startswith("attribute:"):
        wanted.append(options.identity.removeprefix("attribute:"))
        if wanted[-1] not in scalars:
            raise FormatError(f"{where}: no column {wanted[-1]!r} of one value each; there are {', '.join(scalars)}.")
    names = features(schema).get(label, {}).get("names") if label is not None else None
    classes = [str(one) for one in names] if isinstance(names, list) else None
    attributes = dict.fromkeys(one for one in wanted if one in scalars)
    return Columns(content=content, files=[*own, *files[:1]], label=label, classes=classes, attributes=attributes)


def _bytes_of(one: pa.Field) -> pa.DataType | None:
    """The type of a column's bytes if it is an image column."""
    kind = one.type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else pa.null()
    return kind if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


def _has_text(kind: pa.DataType, child: str) -> bool:
    return kind.get_field_index(child) >= 0 and _is_text(_plain(kind.field(child).type))


def _is_vector(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and pa.types.is_floating(kind.value_type))


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_id(schema: pa.Schema, name: str) -> bool:
    kind = _plain(schema.field(name).type)
    return pa.types.is_large_string(kind) or (name.lower() in ("id", "image_id") and pa.types.is_integer(kind))


def _is_scalar(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    numbers = pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind)
    return bool(_is_text(kind) or numbers or pa.types.is_boolean(kind))
