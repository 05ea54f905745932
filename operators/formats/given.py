"""Ready embeddings: `.npy`, `.npz`, Parquet or Arrow with a column of lists, HDF5, or JSON lines.

A record's bytes are its vector as little-endian float32. Whether it has the right width and finite values is seen where
vectors are taken in (`operators.ready`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pyarrow as pa

from operators.errors import FormatError
from operators.formats import arrow, jsonlines, npyfiles, parquet
from operators.formats.columns import Columns, holds_vectors, vector_table
from operators.formats.h5vectors import Vectors, is_hdf5
from operators.formats.h5vectors import holds_vectors as h5_holds_vectors
from operators.formats.h5vectors import vectors as h5_vectors
from operators.formats.indexes import Entries
from operators.formats.listing import Entry, Listing
from operators.formats.naming import missing_shards, one_ending
from operators.formats.tabular import Group, Rows
from operators.formats.vectorreader import VectorReader
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

__all__ = ["VectorReader", "listing", "recognises"]

H5 = (".h5", ".hdf5", ".hdf", ".he5")
LINES = (".jsonl", ".ndjson", ".json")
LOOK = 8
"""Files of each kind that are looked at."""


def _kinds(source: Source, files: Sequence[File]) -> Mapping[str, list[File]]:
    """Files that may hold vectors, by kind, in their order."""
    only = source.single is not None

    def ending(*endings: str) -> list[File]:
        some = [file for file in files if only or file.path.lower().endswith(endings)]
        return sorted(some, key=lambda file: file.path)

    return {
        "NumPy": ending(".npy", ".npz"),
        "Parquet": parquet.candidates(source, files),
        "Arrow": arrow.candidates(source, files),
        "HDF5": [file for file in ending(*H5) if is_hdf5(source, file)],
        "JSON lines": ending(*LINES),
    }


def _holds(source: Source, kind: str, file: File) -> bool:
    if kind == "NumPy":
        return npyfiles.is_array(source, file)
    if kind == "Parquet":
        schema = parquet.schema_of(source, file)
        return schema is not None and holds_vectors(schema)
    if kind == "Arrow":
        schema = arrow.schema_of(source, file)
        return schema is not None and holds_vectors(schema)
    if kind == "HDF5":
        from operators.formats import hdf5

        return h5_holds_vectors(source, file) and not hdf5.recognises(source, [file])
    return jsonlines.is_lines(source, file)


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether a file holds vectors of floats, and no images."""
    kinds = _kinds(source, files)
    return any(_holds(source, kind, file) for kind, some in kinds.items() for file in some[:LOOK])


def listing(source: Source, options: "SetConfig") -> Listing:
    """All vectors, named by what lies beside them, else by file and row.

    Raises
    ------
    FormatError
        If there are no vectors, or vectors of several kinds, or a file is damaged.
    """
    files = list(source.files())
    kinds = {kind: some for kind, some in _kinds(source, files).items() if some}
    if len(kinds) > 1 or source.single is not None:
        kinds = {kind: some for kind, some in kinds.items() if any(_holds(source, kind, one) for one in some[:LOOK])}
    if len(kinds) != 1:
        raise FormatError(
            f"{source.uri}: {'vectors of several kinds: ' + ', '.join(kinds) if kinds else 'no vectors'} here. Correct "
            f"the set's `uri`."
        )
    kind, chosen = next(iter(kinds.items()))
    if kind == "NumPy":
        chosen = [file for file in chosen if file.error is not None or npyfiles.is_array(source, file)] or chosen
    one_ending(file.path for file in chosen)
    entries, notes = _entries(source, kind, chosen, files, options)
    others = {file.path for file in files} - {file.path for file in chosen}
    unlisted = Counter(PurePosixPath(path).suffix or "no extension" for path in others)
    return Listing(entries=entries, unlisted=dict(sorted(unlisted.items())), notes=[*notes, *missing_shards(chosen)])


def _entries(
    source: Source, kind: str, chosen: Sequence[File], files: Sequence[File], options: "SetConfig"
) -> tuple[Sequence[Entry], list[str]]:
    """The entries of all files of a kind, and what is to be said of them."""
    if kind == "JSON lines":
        made, lost = Entries(options), 0
        for file in chosen:
            lost += jsonlines.enter(source, file, made, options, lost)
        return made.made, []
    rows = Rows(source.uri, options)
    for file in chosen:
        where = f"{source.uri}: {file.path}"
        choose = partial(vector_table, options=options, where=where)
        if kind == "NumPy":
            columns, group, beside = npyfiles.vectors(source, files, file, options)
            rows.add([group], columns, beside)
        elif kind in ("Parquet", "Arrow"):
            wide = partial(parquet.tables, known=None) if kind == "Parquet" else arrow.tables
            for columns, groups, beside in wide(source, file, where, choose):
                rows.add([_renamed(one, kind.lower()) for one in groups], columns, beside)
        else:
            _add_hdf5(rows, source, file, options, where)
    rows.name()
    return rows, []


def _renamed(group: Group, kind: str) -> Group:
    return replace(group, place=(group.place[0], kind, *group.place[1:]))


def _add_hdf5(rows: Rows, source: Source, file: File, options: "SetConfig", where: str) -> None:
    """All vectors of an HDF5 file; a dataset that is one vector is named by its own path."""
    found = h5_vectors(source, file, options.column, options.limits.max_records)
    tables = [one for one in found if one.rows]
    if len(tables) > 1 and options.column is None:
        names = ", ".join(one.name for one in tables[:20])
        raise FormatError(f"{where} has several datasets of vectors ({names}). Give the set's `column`.")
    if tables:
        groups = _groups(file, tables[0], 0)
        beside = {name: pa.array(values, pa.string()) for name, values in tables[0].beside.items()}
        rows.add(groups, npyfiles.described(list(beside), options, where), beside)
        return
    single = [group for at, one in enumerate(found) for group in _groups(file, one, at)]
    rows.add(single, Columns(content="", files=("name",)), {"name": pa.array([one.name for one in found], pa.string())})


def _groups(file: File, one: Vectors, first: int) -> list[Group]:
    """The blocks of a dataset."""
    size = 4 * one.width
    if one.fault is not None:
        rows = max(one.rows, 1)
        return [Group(file=file.path, place=(file.path, "none"), rows=rows, first=first, bytes=size, fault=one.fault)]
    groups = []
    for rows, where in one.blocks:
        kind = "raw" if len(where) == 1 else "chunk"
        place = (file.path, kind, one.dtype, one.width, *where)
        groups.append(Group(file=file.path, place=place, rows=rows, first=first, bytes=size))
        first += rows
    return groups
