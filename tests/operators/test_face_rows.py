"""Rows of images with several faces, against lists written out by hand."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.errors import FormatError, SchemaMismatch
from operators.face_rows import expanded, faces_of, further, picked, rows_of
from operators.records import FACES, unnest
from operators.tables import UNITS


def units(**keys: str) -> pa.Table:
    """Units with an image for each letter, labelled by it."""
    rows, first = [], 0
    for name, own in keys.items():
        members = [
            {"key": key, "identity": key.upper(), "digest": key, "attributes": [("tone", key)], "place": place}
            for key, place in zip(own, [None, "elsewhere", *own], strict=False)
        ]
        rows.append({"set": "training", "unit": name, "first_row": first, "members": members})
        first += len(own)
    return UNITS.from_rows(rows)


def test_a_further_face_is_a_row_without_label_behind_its_image() -> None:
    found = expanded(units(p="abc", q="d", r="ef"), [{"1": 3}, {}, {"1": 2}])
    members = [[member["key"] for member in own] for own in found["members"].to_pylist()]
    assert members == [["a", "b", "b#2", "b#3", "c"], ["d"], ["e", "f", "f#2"]]
    assert found["first_row"].to_pylist() == [0, 5, 6]
    assert found["unit"].to_pylist() == ["p", "q", "r"]
    rows = [member for own in found["members"].to_pylist() for member in own]
    assert [row["identity"] for row in rows] == ["A", "B", None, None, "C", "D", "E", "F", None]
    assert [dict(row["attributes"]) for row in rows[1:4]] == [{"tone": "b"}, {}, {}]
    assert [row["place"] for row in rows[:4]] == ["a", "elsewhere", "elsewhere", "elsewhere"]
    assert [row["digest"] for row in rows] == list("abbbcdeff")


def test_where_every_image_has_one_face_the_listing_is_that_of_scan() -> None:
    listed = units(p="ab", q="c")
    assert expanded(listed, [{}, {}]) is listed


def test_a_further_face_with_the_name_of_an_image_is_refused() -> None:
    listed = UNITS.from_rows(
        [
            {"set": "control", "unit": "p", "members": [{"key": "a.png"}]},
            {"set": "control", "unit": "q", "members": [{"key": "a.png#2"}]},
        ]
    )
    with pytest.raises(FormatError, match=r"sets\.control: an image is called 'a\.png#2'.*Rename the image"):
        expanded(listed, [{"0": 2}, {}])
    assert expanded(listed, [{}, {"0": 2}])["members"].to_pylist()[1][1]["key"] == "a.png#2#2"


@given(st.lists(st.integers(1, 5), max_size=30))
def test_the_count_of_rows_and_the_numbers_of_faces_say_the_same(counts: list[int]) -> None:
    numbers = np.array([face for count in counts for face in range(1, count + 1)], np.int64)
    found = further(numbers, len(counts))
    assert found == {str(at): count for at, count in enumerate(counts) if count > 1}
    assert rows_of(found, len(counts)).tolist() == counts
    assert faces_of(np.array(counts, np.int64)).tolist() == numbers.tolist()


@pytest.mark.parametrize(
    ("numbers", "images"), [([1, 2, 2], 1), ([2, 1], 1), ([1, 3], 1), ([1, 2], 2), ([1], 0), ([], 1)]
)
def test_rows_that_are_not_those_of_the_images_are_refused(numbers: list[int], images: int) -> None:
    with pytest.raises(SchemaMismatch, match=f"not those of {images} images"):
        further(np.array(numbers, np.int64), images)


def test_of_prepared_faces_the_one_asked_for_stands_in_the_place_of_its_image() -> None:
    """The image `b` was listed for its second face, `c` for a third one that is gone, `d` cannot be read any more."""
    faces = [
        {"key": "a", "identity": "A", "status": "ok", "face": 1, "face_size": 1.0},
        {"key": "a#2", "status": "ok", "face": 2, "face_size": 2.0},
        {"key": "b", "status": "ok", "face": 1, "face_size": 3.0},
        {"key": "b#2", "status": "ok", "face": 2, "face_size": 4.0},
        {"key": "c", "status": "ok", "face": 1, "face_size": 5.0},
        {"key": "d", "status": "changed", "error": "why", "face": 1},
    ]
    made = picked(FACES.from_rows([{"unit": "u", "faces": faces}]), np.array([1, 2, 3, 2]))
    rows = unnest(FACES.check(made), "faces").to_pylist()
    assert [(row["key"], row["identity"], row["status"], row["face_size"]) for row in rows] == [
        ("a", "A", "ok", 1.0),
        ("b", None, "ok", 4.0),
        ("c", None, "no_face", 5.0),
        ("d", None, "changed", None),
    ]
    assert rows[2]["error"] == "this face is not found any more"
    plain = FACES.from_rows([{"unit": "u", "faces": [faces[0], faces[2]]}])
    assert picked(plain, np.array([1, 1])) is plain
