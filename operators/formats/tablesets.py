"""What sets of Parquet and of Arrow files share: which files are theirs, and how their tables become one listing."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pyarrow as pa

from operators.errors import FormatError
from operators.formats.columns import Columns, image_table
from operators.formats.listing import Listing
from operators.formats.naming import missing_shards, one_ending
from operators.formats.reading import Reader
from operators.formats.tabular import Group, Rows, first_endings
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

Tables = Callable[
    [Source, File, str, Callable[[pa.Schema], Columns]],
    Iterable[tuple[Columns, Sequence[Group], Mapping[str, pa.Array]]],
]
"""Groups of records of a file, some at a time, with the columns that stand beside the images."""


def candidates(source: Source, files: Sequence[File], endings: tuple[str, ...]) -> list[File]:
    """Files called as those of the form are, or the only one, by their paths."""
    only = source.single is not None
    some = [file for file in files if only or file.path.lower().endswith(endings)]
    return sorted(some, key=lambda file: file.path)


def listing(
    source: Source, options: "SetConfig", kind: str, endings: tuple[str, ...], tables: Tables, reader: Reader
) -> Listing:
    """All rows of all files of a `kind`, named by their paths if these differ, else `<file>/<row>`.

    Raises
    ------
    FormatError
        If there is no such file, one is damaged, or has no column of images.
    """
    files = list(source.files())
    chosen = candidates(source, files, endings)
    if not chosen:
        raise FormatError(f"{source.uri}: no {kind} file here. Correct the set's `uri`.")
    one_ending(file.path for file in chosen)
    rows = Rows(source.uri, options)
    for file in chosen:
        where = f"{source.uri}: {file.path}"
        for columns, groups, beside in tables(source, file, where, partial(image_table, options=options, where=where)):
            rows.add(groups, columns, beside)
    if rows.name():
        rows.endings = first_endings(reader, rows)
    others = {file.path for file in files} - {file.path for file in chosen}
    unlisted = Counter(PurePosixPath(path).suffix or "no extension" for path in others)
    return Listing(entries=rows, unlisted=dict(sorted(unlisted.items())), notes=missing_shards(chosen))
