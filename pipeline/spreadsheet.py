"""Tables for spreadsheets, and the one way in which text from outside is made harmless to read.

File names and labels come from the sets under audit and may be hostile: they can hold formulas, terminal codes, or
marks that reverse the reading order so that one name looks like another.
"""

import csv
import io
import unicodedata
from typing import Any

import pyarrow as pa

FORMULA = frozenset("=+-@")
"""Characters that make a spreadsheet read a cell as a formula; full-width and small forms count as well."""

BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols that are drawn as nothing, although Unicode calls them printable."""


def visible(text: str) -> str:
    r"""`text` with everything that is not drawn as itself written as \uXXXX (\UXXXXXXXX beyond the basic plane).

    Escaped are control characters, newlines, all spaces but the plain one, bidirectional and zero-width marks, private
    and unassigned characters, and lone surrogates, so that the result can always be encoded and printed.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char.isprintable() and char not in BLANK else _code(char) for char in text)


def _code(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def safe_text(text: str) -> str:
    """`visible(text)` as a cell that no spreadsheet takes for a formula: one that could be gets a ' in front."""
    start = text.lstrip()[:1]
    risky = text[:1] in ("\t", "\r", "\n") or (start and unicodedata.normalize("NFKC", start)[:1] in FORMULA)
    return f"'{visible(text)}" if risky else visible(text)


def safe_csv(table: pa.Table) -> bytes:
    """`table` as UTF-8 CSV with a header line, every cell quoted.

    Text is written as `safe_text` gives it, column names too. Numbers are plain, floats in the shortest form that reads
    back as the same value; booleans are true and false; null is empty. Lists and structs are written as text.
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerow([safe_text(name) for name in table.column_names])
    columns = [[_cell(value) for value in values(column)] for column in table.columns]
    writer.writerows(zip(*columns, strict=True))
    return out.getvalue().encode()


def values(column: pa.ChunkedArray) -> list[Any]:
    """The column as Python values; bytes that are not valid UTF-8 become lone surrogates instead of an error."""
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return list(column.to_pylist())
    raw = column.cast(pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()).to_pylist()
    return [None if text is None else text.decode("utf-8", "surrogateescape") for text in raw]


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case _:
            return safe_text(str(value))
