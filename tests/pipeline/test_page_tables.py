"""The data behind the long tables: it reads back as it is, and holds nothing that a parser of HTML could take up."""

import json

from pipeline.page_tables import KINDS, PRINTED, Column, Filters, LongTable, Part, Row, packed, script_json, text, who

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--",
    "-->",
    "&lt;",
    "\u2028\u2029",
    "\u202egpj.exe",
    '"\\',
    "\ud800",
]


def test_json_of_hostile_texts_has_no_markup_and_reads_back() -> None:
    made = str(script_json({"all": [name for name in HOSTILE if name != "\ud800"]}))
    assert made.isascii() and not set("<>&\u2028\u2029") & set(made)
    assert json.loads(made)["all"] == HOSTILE[:-1]


def test_packed_rows_are_the_cells_with_repeated_parts_as_numbers() -> None:
    rows = [
        Row(
            [text(f"{n}"), who(None, "key/1.jpg", "remark" if n else ""), (Part("tier hub", "hub"),)],
            [n, None, None],
            n > 1,
        )
        for n in range(3)
    ]
    made = packed(rows)
    told = [
        [[made["words"][one] if isinstance(one, int) else one for one in cell] for cell in row[2]]
        for row in made["rows"]
    ]
    assert told[1] == [["_1"], ["ino label", "kkey/1.jpg", "sremark"], ["3hub"]]
    assert told[0][1] == ["ino label", "kkey/1.jpg"]
    assert sorted(made["words"]) == ["ino label", "kkey/1.jpg", "sremark"]
    assert [row[:2] for row in made["rows"]] == [[0, [0, None, None]], [0, [1, None, None]], [1, [2, None, None]]]


def test_what_is_not_drawn_is_written_out_in_the_data_too() -> None:
    made = packed([Row([[Part("name", name) for name in HOSTILE]], [None])])
    assert (
        made["rows"][0][2][0][4:6] == ["b\\u2028\\u2029", "b\\u202egpj.exe"] and made["rows"][0][2][0][7] == "b\\ud800"
    )


def test_the_first_rows_stand_in_the_page_and_kinds_have_one_letter_each() -> None:
    rows = [Row([text(str(n))], [n]) for n in range(PRINTED + 5)]
    table = LongTable("t", "T", [Column("n", number=True)], rows, Filters((0,), "Search"))
    assert list(table.printed) == rows[:PRINTED] and len(json.loads(str(table.data))["rows"]) == PRINTED + 5
    assert len(set(KINDS.values())) == len(KINDS) and all(len(letter) == 1 for letter in KINDS.values())


def test_sort_keys_keep_seven_digits_and_numbers_of_rows_stay_whole() -> None:
    assert packed([Row([text("")], [0.123456789])])["rows"][0][1] == [0.1234568]
    assert json.dumps(packed([Row([text("")], [12_345_678])])["rows"][0][1]) == "[12345678]"
