"""List files choose records, and say who and what they show."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.errors import FormatError
from operators.formats import SetConfig, lists
from operators.formats.listing import Entry, Listing

KEYS = ("ann/1.jpg", "ann/2.jpg", "ben/1.jpg", "é, x/1.jpg")


def listing() -> Listing:
    return Listing(
        entries=[Entry(key=key, identity=key.split("/")[0], bytes=7, place=f"at {key}") for key in KEYS], unlisted={}
    )


def chosen(path: Path, text: str, **options: object) -> Listing:
    path.write_text(text, encoding="utf-8")
    return lists.chosen(listing(), SetConfig(uri="x", list_file=str(path), **options))


def test_only_named_records_are_read_and_the_others_are_counted(tmp_path: Path) -> None:
    found = chosen(tmp_path / "list.csv", "path\nben/1.jpg\nann/2.jpg\n")
    assert [(e.key, e.identity, e.place, e.bytes) for e in found.entries] == [
        ("ben/1.jpg", "ben", "at ben/1.jpg", 7),
        ("ann/2.jpg", "ann", "at ann/2.jpg", 7),
    ]
    assert found.unlisted == {"not in the list file": 2}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_labels_and_attributes_come_from_columns(tmp_path: Path, delimiter: str, mark: str) -> None:
    rows = [["path", "identity", "group", "age"], ["ann/1.jpg", "007", "f", "31"], ["ben/1.jpg", "008", "", "x"]]
    text = mark + "\n".join(delimiter.join(row) for row in rows)
    found = chosen(tmp_path / "list.txt", text, attributes=["group", "age"]).entries
    assert [(e.identity, e.attributes) for e in found] == [("007", {"group": "f", "age": "31"}), ("008", {"age": "x"})]
    by_group = chosen(tmp_path / "list.txt", text, identity="attribute:group").entries
    assert [e.identity for e in by_group] == ["f", None]
    by_folder = chosen(tmp_path / "list.txt", text, identity="parent").entries
    assert [e.identity for e in by_folder] == ["ann", "ben"]


def test_a_parquet_table_and_quoted_names_say_the_same(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["é, x/1.jpg"], "identity": [12]}), tmp_path / "list.parquet")
    options = SetConfig(uri="x", list_file=str(tmp_path / "list.parquet"))
    (one,) = lists.chosen(listing(), options).entries
    (other,) = chosen(tmp_path / "list.csv", 'path,identity\n"é, x/1.jpg",12\n').entries
    assert one == other
    assert (one.key, one.identity) == ("é, x/1.jpg", "12")


def test_a_named_record_that_is_not_there_is_kept_as_unreadable_and_said(tmp_path: Path) -> None:
    found = chosen(tmp_path / "list.csv", "path,identity\nann/1.jpg,a\nann/9.jpg,a\n")
    assert [(e.key, e.error is None) for e in found.entries] == [("ann/1.jpg", True), ("ann/9.jpg", False)]
    assert "1 records named in" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("key,identity\nann/1.jpg,a\n", {}, r"no column `path`; it has key, identity"),
        ("path\nann/1.jpg\nann/1.jpg\n", {}, r"line 3: 'ann/1\.jpg' is named twice"),
        ("path,identity\n,a\n", {}, r"line 2: the column `path` is empty"),
        ("path\nann/1.jpg\n", {"attributes": ["group"]}, r"no column 'group'; it has path"),
        ('path,identity\n"ann/1.jpg\n', {}, "not a CSV, TSV or Parquet table|cannot be read"),
        ("", {}, "not a CSV|no column"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_by_name(tmp_path: Path, text: str, options: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message) as error:
        chosen(tmp_path / "list.csv", text, **options)
    assert "list.csv" in str(error.value)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"gone\.csv: the list file cannot be read"):
        lists.chosen(listing(), SetConfig(uri="x", list_file=str(tmp_path / "gone.csv")))
