"""Forms in which sets are published. Each is a module of this package with

`recognises(source, files) -> bool`     whether the source's files are of this form, by their content or names
`listing(source, options) -> Listing`   names, labels, sizes and places of all records, without decoding
a class derived from `Reader`           opens one record by its place, as a stream

`FORMATS` is the closed list, in the order in which forms are tried; a form's name is written into every unit.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from operators.errors import FormatError
from operators.formats.listing import Listing, named_as_image
from operators.formats.reading import Reader
from operators.sources import LocalSource, Source, open_source, remote_scheme

IDENTITIES = ("auto", "parent", "label", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One form of publication."""

    module: str
    """Its module in this package, imported when it is used."""
    reader: str
    """Name of its reader class."""
    holds: str = "images"
    """`images`, or `vectors`: ready embeddings."""


FORMATS: Mapping[str, Form] = {
    "zip": Form(module="zips", reader="ZipReader"),
    "tar": Form(module="tars", reader="TarReader"),
    "webdataset": Form(module="webdataset", reader="WebDatasetReader"),
    "recordio": Form(module="recordio", reader="RecordReader"),
    "parquet": Form(module="parquet", reader="ParquetReader"),
    "arrow": Form(module="arrow", reader="ArrowReader"),
    "lmdb": Form(module="lmdbs", reader="LmdbReader"),
    "hdf5": Form(module="hdf5", reader="Hdf5Reader"),
    "tfrecord": Form(module="tfrecord", reader="TfRecordReader"),
    "vectors": Form(module="given", reader="VectorReader", holds="vectors"),
    "folder": Form(module="folder", reader="FolderReader"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceLimits:
    """What an archive may ask of the machine that reads it."""

    max_records: int = 100_000_000
    max_member_bytes: int = 2**30
    """Of one member after decompression; a larger one becomes a rejected row."""
    max_ratio: float = 200.0
    """Of a member's size to its size in the archive; images hardly compress, so more is a bomb."""

    def __post_init__(self) -> None:
        for name in ("max_records", "max_member_bytes", "max_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive. Got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SetConfig:
    """One set of the audit."""

    uri: str
    """Where the set is: a folder, an archive or file, or a pattern such as `train-{0000..0031}.tar`; on this machine,
    or `s3://`, `gs://`, `http(s)://`."""
    format: str = "auto"
    """Form of publication (`operators.formats.FORMATS`); `auto` recognises it by the content, and says it."""
    identity: str = "auto"
    """Where a person's label comes from: `auto` (the form's own label if it has one, else the folder), `label` (the
    form's own), `parent` (the folder that holds the image), `attribute:NAME`, or `none`."""
    attributes: list[str] = field(default_factory=list)
    """Attributes of each record to keep (group, age, split...), by their names in the set."""
    catalogue: str | None = None
    """Its name in the catalogue (`unveil catalogue`): fills in `identity` where it is `auto`, and what the set differs
    in from the one published is said."""
    list_file: str | None = None
    """A list file (CSV, TSV or Parquet: path, identity, any attributes): only records that it names are read."""
    column: str | None = None
    """Column or dataset that holds the image or vector, where the form has several. Empty: recognised."""
    anonymous: bool = False
    """Ask object storage without credentials, as for public buckets."""
    foreign: bool = False
    """The set is ready embeddings of another model than the audit's; `sets.bridge` leads from there to here."""
    limits: SourceLimits = field(default_factory=SourceLimits)

    def __post_init__(self) -> None:
        if self.format != "auto" and self.format not in FORMATS:
            raise ValueError(f"format must be 'auto' or one of {', '.join(FORMATS)}. Got {self.format!r}.")
        if self.identity not in IDENTITIES and not self.identity.removeprefix("attribute:").strip(":"):
            raise ValueError(f"identity: give the attribute's name after 'attribute:'. Got {self.identity!r}.")
        if self.identity not in IDENTITIES and not self.identity.startswith("attribute:"):
            raise ValueError(
                f"identity must be one of {', '.join(IDENTITIES)}, or 'attribute:NAME'. Got {self.identity!r}."
            )
        if self.foreign and self.format != "auto" and FORMATS[self.format].holds != "vectors":
            raise ValueError(f"foreign is for ready embeddings (format vectors). Got format {self.format!r}.")
        remote_scheme(self.uri)


def recognised(options: SetConfig) -> tuple[str, Source]:
    """The form of a set, and its files' place.

    Raises
    ------
    FormatError
        If the place is missing, holds nothing that any form knows, or things of several forms.
    """
    source = open_source(options.uri, options.anonymous)
    if options.format != "auto":
        return options.format, source
    files = list(source.files())
    if isinstance(source, LocalSource):
        source.remember(files)
    # A set of images has millions of them, and no other form calls its files so.
    others = files if source.single is not None else [file for file in files if not named_as_image(file.path)]
    found = [name for name in FORMATS if module(name).recognises(source, files if name == "folder" else others)]
    if len(found) == 1:
        return found[0], source
    if not found:
        raise FormatError(
            f"{source.uri}: no file of a known form ({', '.join(FORMATS)}) among {len(files):,}. "
            f"Correct the set's `uri`, or give its `format`."
        )
    raise FormatError(
        f"{source.uri}: holds sets of several forms ({', '.join(found)}). Give the set's `format` or a narrower `uri`."
    )


def listed(options: SetConfig) -> tuple[str, Listing]:
    """The form and the records of a set; FormatError as `recognised` and the form's own listing raise it."""
    from operators.formats import lists

    name, source = recognised(options)
    listing: Listing = module(name).listing(source, options)
    if len(listing.entries) > options.limits.max_records:
        raise FormatError(
            f"{source.uri}: {len(listing.entries):,} records; the limit is {options.limits.max_records:,} "
            f"(limits.max_records of the set)."
        )
    if options.list_file is not None:
        listing = lists.chosen(listing, options)
    for wanted in options.attributes:
        if not any(wanted in (entry.attributes or {}) for entry in listing.entries):
            raise FormatError(f"{source.uri}: no record has the attribute {wanted!r}. Correct the set's `attributes`.")
    return name, listing


def reader(form_name: str, uri: str, anonymous: bool = False) -> Reader:
    """Opens the records of a listed set; FormatError if the form is not known."""
    if form_name not in FORMATS:
        raise FormatError(f"format {form_name!r} is not known. Use one of: {', '.join(FORMATS)}.")
    made: Callable[[Source], Reader] = getattr(module(form_name), FORMATS[form_name].reader)
    return made(open_source(uri, anonymous))


def module(name: str) -> Any:
    """The module of the form called `name`."""
    return importlib.import_module(f"operators.formats.{FORMATS[name].module}")
