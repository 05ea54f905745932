"""List files: a CSV, TSV or Parquet table that says which records of a set are read, and who and what they show.

The table has a column `path` with keys of the set, may have one called `identity`, and any others as attributes. It
lies on this machine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from operators.errors import FormatError
from operators.formats.listing import Entry, Listing, identity_of

if TYPE_CHECKING:
    from operators.formats import SetConfig

PATH, IDENTITY = "path", "identity"


def chosen(listing: Listing, options: "SetConfig") -> Listing:
    """The records that the set's list file names, with its labels and attributes.

    A record that is named and not there is kept as one that cannot be read; those that are not named are counted.

    Raises
    ------
    FormatError
        If the list file is missing, cannot be parsed, lacks the column `path` or an attribute, or names a record twice.
    """
    path = str(options.list_file)
    table = _table(path)
    missing = [name for name in options.attributes if name not in table.column_names]
    if missing and not any(entry.attributes for entry in listing.entries):
        raise FormatError(f"{path}: no column {missing[0]!r}; it has {', '.join(table.column_names)}.")
    there = {entry.key: entry for entry in listing.entries}
    entries = [_entry(there, path, row, options) for row in _rows(path, table)]
    unlisted = dict(listing.unlisted)
    if left := len(there) - sum(entry.key in there for entry in entries):
        unlisted["not in the list file"] = left
    absent = sum(entry.key not in there for entry in entries)
    notes = [*listing.notes, *([f"{absent:,} records named in {path} are not in the set"] if absent else [])]
    return Listing(entries=entries, unlisted=unlisted, notes=notes)


def _entry(there: Mapping[str, Entry], path: str, row: Mapping[str, str], options: "SetConfig") -> Entry:
    """One named record with what the list says of it."""
    key = row[PATH]
    attributes = {name: value for name, value in row.items() if name != PATH}
    if key not in there:
        error = "named in the list file, and not in the set; correct its path"
        return Entry(key=key, identity=row.get(IDENTITY), bytes=0, error=error, attributes=_kept(attributes, options))
    entry = there[key]
    identity = entry.identity
    if options.identity.startswith("attribute:") or (options.identity in ("auto", "label") and IDENTITY in row):
        identity = identity_of(options.identity, key, row.get(IDENTITY), {**(entry.attributes or {}), **attributes})
    kept = {**(entry.attributes or {}), **(_kept(attributes, options) or {})}
    return replace(entry, identity=identity, attributes=kept or None)


def _kept(attributes: Mapping[str, str], options: "SetConfig") -> dict[str, str] | None:
    return {name: attributes[name] for name in options.attributes if attributes.get(name)} or None


def _rows(path: str, table: pa.Table) -> Iterator[dict[str, str]]:
    """Rows as text, without empty fields; FormatError where a path is empty or comes twice."""
    seen: set[str] = set()
    for at, row in enumerate(table.to_pylist(), 2):
        found = {name: str(value) for name, value in row.items() if value not in (None, "")}
        key = found.get(PATH)
        if key is None:
            raise FormatError(f"{path}, line {at}: the column `{PATH}` is empty.")
        if key in seen:
            raise FormatError(f"{path}, line {at}: {key!r} is named twice. Remove one of the lines.")
        seen.add(key)
        yield found


def _table(path: str) -> pa.Table:
    """The list file as a table whose values are text or null."""
    try:
        if _magic(path) == b"PAR1":
            table = pq.read_table(path)
        else:
            names = _names(path)
            delimiter = "\t" if "\t" in names else ","
            types = {name.strip().strip('"'): pa.string() for name in names.split(delimiter)}
            table = pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=types, strings_can_be_null=True, null_values=[""]
                ),
            )
    except OSError as error:
        raise FormatError(f"{path}: the list file cannot be read ({error.strerror or error}).") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not a CSV, TSV or Parquet table ({str(error).splitlines()[0]}).") from error
    if PATH not in table.column_names:
        raise FormatError(
            f"{path}: no column `{PATH}`; it has {', '.join(table.column_names)}. The first line must name the columns."
        )
    return table


def _magic(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(4)


def _names(path: str) -> str:
    """The first line of a text table."""
    with Path(path).open(encoding="utf-8-sig") as file:
        return file.readline(1_000_000).rstrip("\n")
