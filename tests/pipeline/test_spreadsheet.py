import csv
import io
import math

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.tables import FINDINGS
from pipeline.spreadsheet import safe_csv, safe_text, visible


def read(data: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True))


@pytest.mark.parametrize(
    ("given_text", "cell"),
    [
        ("000001/12.png", "000001/12.png"),
        ("Zoë/日本.jpg", "Zoë/日本.jpg"),
        ('=HYPERLINK("x")', '\'=HYPERLINK("x")'),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\\u0009=1"),
        ("\r=1", "'\\u000d=1"),
        ("  =1", "'  =1"),
        ("\uff1d1", "'\uff1d1"),
        ("\uff0b1", "'\uff0b1"),
        ("\uff0d1", "'\uff0d1"),
        ("\uff20A", "'\uff20A"),
        ("a\nb", "a\\u000ab"),
        ("a\x00b", "a\\u0000b"),
        ("\x1b[31mred", "\\u001b[31mred"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("a\u2066b\u2069", "a\\u2066b\\u2069"),
        ("a\u200bb\ufeff", "a\\u200bb\\ufeff"),
        ("a\xa0b", "a\\u00a0b"),
        ("a\u3164b", "a\\u3164b"),
        ("\udce9.jpg", "\\udce9.jpg"),
        ("\U000e0041", "\\U000e0041"),
        ("\u2028", "\\u2028"),
        ('"><img src=x>,;', '"><img src=x>,;'),
        ("", ""),
    ],
)
def test_hostile_names_become_plain_cells(given_text, cell):
    assert safe_text(given_text) == cell


def test_a_table_with_every_kind_of_column_reads_back():
    table = pa.table(
        {
            "=name": pa.array(["a,b", None, '=x"y']),
            "count": pa.array([-3, None, 2], pa.int64()),
            "cosine": pa.array([0.1, None, -1e-7]),
            "same": pa.array([True, None, False]),
            "list": pa.array([[1, 2], None, []]),
        }
    )
    assert read(safe_csv(table)) == [
        ["'=name", "count", "cosine", "same", "list"],
        ["a,b", "-3", "0.1", "true", "[1, 2]"],
        ["", "", "", "", ""],
        ["'=x\"y", "2", "-1e-07", "false", "[]"],
    ]


def test_every_cell_is_quoted():
    assert safe_csv(pa.table({"a": [1], "b": ["x"]})) == b'"a","b"\r\n"1","x"\r\n'


def test_an_empty_table_is_its_header():
    assert read(safe_csv(FINDINGS.from_rows([]))) == [FINDINGS.schema.names]


def test_bytes_that_are_not_utf8_are_shown_instead_of_raising():
    raw = pa.array([b"caf\xe9", None], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    assert read(safe_csv(pa.table({"key": broken}))) == [["key"], ["caf\\udce9"], [""]]


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=20))
def test_no_text_cell_is_a_formula_or_holds_a_control_character(names):
    cells = read(safe_csv(pa.table({"key": pa.array(names, pa.string())})))
    assert [row for row in cells[1:] if len(row) != 1] == []
    assert [row[0] for row in cells[1:]] == [safe_text(name) for name in names]
    for (cell,) in cells[1:]:
        assert cell[:1] not in "=+-@\t\r" or not cell
        assert cell.isprintable()


@given(st.text())
def test_visible_text_can_always_be_printed_and_escapes_once(text):
    shown = visible(text)
    assert shown.isprintable()
    assert shown.encode("utf-8").decode() == shown
    assert visible(shown) == shown


@given(st.floats(allow_nan=False))
def test_floats_read_back_exactly(value):
    ((_,), (cell,)) = read(safe_csv(pa.table({"x": pa.array([value])})))
    assert float(cell) == value
    assert math.copysign(1, float(cell)) == math.copysign(1, value)
