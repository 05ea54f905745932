"""Contracts of faces and embeddings: nested images come back as they went in, and what is known of a face is kept."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.errors import SchemaMismatch
from operators.records import FACE, FACES, embedded_unit, embeddings, nest, unnest
from operators.tables import MEMBER, UNITS

words = st.none() | st.text(max_size=6)
members = st.lists(
    st.fixed_dictionaries({"key": st.text(max_size=6), "identity": words, "digest": words, "error": words}), max_size=6
)


@settings(max_examples=60, deadline=None)
@given(first=members, second=members, third=members)
def test_images_come_out_of_any_row_of_a_table_as_they_went_in(
    first: list[dict], second: list[dict], third: list[dict]
) -> None:
    rows = [[{"bytes": len(m["key"])} | m for m in unit] for unit in (first, second, third)]
    whole = UNITS.from_rows([{"unit": str(at), "members": unit} for at, unit in enumerate(rows)])
    chunked = pa.concat_tables([whole.slice(0, 2), whole.slice(2)])
    for table in (whole, chunked):
        for at, expected in enumerate(rows):
            images = unnest(table.slice(at, 1), "members")
            assert images.schema.equals(pa.schema(list(MEMBER)))
            assert images.to_pylist() == [dict.fromkeys(MEMBER.names) | member for member in expected]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nesting_keeps_nulls_order_and_values_of_sliced_and_chunked_rows(data: st.DataObject) -> None:
    crops = {"crop": bytes(range(256)) * 147, "crop_dlib150": b"other pixels"}
    rows = [
        {"key": str(at), "status": "ok", **crops, "box": [1.0, 2.0, 3.0, at]} if whole else {"key": str(at)}
        for at, whole in enumerate(data.draw(st.lists(st.booleans(), max_size=8)))
    ]
    expected = [dict.fromkeys(f.name for f in FACE) | row for row in rows]
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(FACE)))
    start = data.draw(st.integers(0, len(rows)))
    cut = data.draw(st.integers(start, len(rows)))
    sliced = pa.concat_tables([table.slice(start, cut - start), table.slice(cut)])
    nested = nest(sliced, FACES, "faces", unit="u")
    assert FACES.check(nested)["unit"].to_pylist() == ["u"]
    assert unnest(nested, "faces").to_pylist() == expected[start:]


@pytest.mark.parametrize("count", [0, 2, 3])
def test_a_table_that_is_not_one_unit_cannot_be_opened(count: int) -> None:
    with pytest.raises(SchemaMismatch, match=f"a unit is one row; found {count}.*batch_size=1"):
        unnest(UNITS.from_rows([{"unit": "u", "members": []}] * count), "members")


@pytest.mark.parametrize("width", [1, 128, 512])
def test_vectors_of_the_embeddings_contract_have_the_declared_width_in_fp16(width: int) -> None:
    contract = embeddings(width)
    assert contract.schema.field("vector").type.equals(pa.list_(pa.float16(), width))
    assert contract.schema.field("norm").type == pa.float32()
    images = embedded_unit(width).schema.field("images").type.value_type
    assert pa.schema(list(images)).equals(contract.schema)


def test_embeddings_of_another_width_are_refused() -> None:
    with pytest.raises(SchemaMismatch, match=r"vector: expected fixed_size_list.*\[128\], found fixed_size.*\[512\]"):
        embeddings(128).check(embeddings(512).from_rows([{"key": "a"}]))


def test_what_is_known_of_a_face_is_kept_with_its_embedding() -> None:
    """All columns of FACE but the pixels and the number of the face, under the same names and types."""
    stored, face = embeddings(128).schema, pa.schema(list(FACE))
    assert set(face.names) - set(stored.names) == {"crop", "crop_dlib150", "face"}
    assert set(stored.names) - set(face.names) == {"norm", "vector"}
    assert all(stored.field(name).equals(face.field(name)) for name in set(stored.names) & set(face.names))
    assert {"landmarks", "face_size", "sharpness", "detector_score"} < set(stored.names)


def test_a_face_without_crops_takes_no_room_for_them() -> None:
    """An alignment that no embedder needs must cost nothing: a unit holds thousands of faces."""
    blank = pa.Table.from_pylist([{"key": "a"}] * 1000, schema=pa.schema(list(FACE)))
    assert blank.nbytes < 200_000
