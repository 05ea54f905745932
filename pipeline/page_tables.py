"""Long tables of the report: their first rows as HTML, all of them as data that the page's script sorts and filters.

Both are made from the same cells, so that the page says the same with and without its script. A cell is a list of
parts, and a part is a text with one of a closed set of kinds; kinds name an element and a class in
`templates/report.js` and in `templates/tables.html.j2`. No part is ever read as HTML.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.spreadsheet import visible

PRINTED = 200
"""Rows that stand in the HTML: what is there without the script, and on paper."""

SHORT = 4
"""Length up to which a repeated text is cheaper where it stands than as a number of the list of words."""

KINDS = {
    "text": "_", "name": "b", "key": "k", "small": "s", "none": "i", "why": "w", "more": "d", "muted": "m",
    "tier": "0", "tier same": "1", "tier blend": "2", "tier hub": "3",
}  # fmt: skip
"""Kinds of parts, and the letter that stands for each in the data; `more` is folded away until somebody opens it."""


class Part(NamedTuple):
    """A piece of a cell."""

    kind: str
    """One of `KINDS`."""
    text: str


Cell = Sequence[Part]


class Column(NamedTuple):
    """A column; its sort key is a number where it holds numbers, and the text of its first part otherwise."""

    name: str
    label: str = ""
    """Before the cell on a narrow window; empty: the name."""
    number: bool = False
    falls: bool = False
    """The first click sorts from the highest value down."""
    head: bool = False
    """Its cells name their rows."""


class Row(NamedTuple):
    """A row of cells with what it is sorted and filtered by."""

    cells: Sequence[Cell]
    keys: Sequence[float | None]
    """Of number columns: the value to sort by, None for the end; of others None."""
    listed: bool = True


class Filters(NamedTuple):
    """What a table can be filtered by; columns are given by number."""

    text: Sequence[int]
    """Columns that are searched for a text."""
    asks: str
    """Label of the search."""
    pick: int | None = None
    """Column of which one value can be chosen."""
    least: int | None = None
    """Column of which a least value can be asked for."""
    listed: str = ""
    """Label of the box that leaves out rows that are not listed; empty for none."""


class LongTable(NamedTuple):
    """A table as the page shows it."""

    name: str
    """Start of the ids of its elements."""
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    filters: Filters
    style: str = ""
    """Class of the table."""

    @property
    def printed(self) -> Sequence[Row]:
        """Rows that stand in the HTML."""
        return self.rows[:PRINTED]

    @property
    def data(self) -> Markup:
        """All rows as JSON for a script element."""
        return script_json(packed(self.rows))


def text(value: str) -> Cell:
    """A cell of one plain text."""
    return (Part("text", value),)


def who(identity: str | None, key: str, *more: str) -> Cell:
    """The cell of an image: label, key, and small remarks."""
    name = Part("none", "no label") if identity is None else Part("name", identity)
    return (name, Part("key", key), *(Part("small", one) for one in more if one))


def packed(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows for the script: `rows` of listed, keys and cells, in which a repeated part is its number in `words`."""
    said_R = [[[_said(part) for part in cell] for cell in row.cells] for row in rows]
    parts = Counter(said for cells in said_R for cell in cells for said in cell)
    words = [said for said, times in parts.items() if times > 1 and len(said) > SHORT]
    number_of: Mapping[str, int] = {said: at for at, said in enumerate(words)}
    return {
        "words": words,
        "rows": [
            [
                int(row.listed),
                [_short(key) for key in row.keys],
                [[number_of.get(said, said) for said in cell] for cell in cells],
            ]
            for row, cells in zip(rows, said_R, strict=True)
        ],
    }


def _said(part: Part) -> str:
    return KINDS[part.kind] + visible(part.text)


def _short(key: float | None) -> float | None:
    """A sort key with seven significant digits: enough to sort and filter as the cell is written."""
    return key if key is None or isinstance(key, int) else float(f"{key:.7g}")


def script_json(value: Any) -> Markup:
    r"""`value` as JSON that no HTML parser and no script parser can take for anything else.

    Everything but ASCII is escaped by JSON itself, and `<`, `>` and `&` are written as \u escapes, so that neither a
    closing tag nor a comment nor a character reference can begin inside.
    """
    made = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        made = made.replace(char, f"\\u{ord(char):04x}")
    return Markup(made)  # noqa: S704 - escaped above
