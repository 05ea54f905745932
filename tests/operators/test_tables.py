"""Contracts of tables: what is refused and how, and that nested images come back as they went in."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.errors import SchemaMismatch
from operators.tables import (
    CANDIDATES,
    FACE,
    FACE_BYTES,
    FACES,
    FINDINGS,
    MEMBER,
    NEIGHBOURS,
    PAIRS,
    REJECTS,
    STATUSES,
    UNITS,
    Table,
    embedded_unit,
    embeddings,
    nest,
    unnest,
)

COLOURS = Table(name="colours", version=3, schema=pa.schema([("name", pa.string()), ("hue", pa.int32())]))
GOOD = pa.table({"name": ["red"], "hue": pa.array([0], pa.int32())})


def test_statuses_are_the_documented_ten() -> None:
    failures = {"unreadable", "changed", "not_an_image", "corrupt", "too_large", "not_aligned"}
    assert STATUSES[0] == "ok"
    assert set(STATUSES[1:]) == failures | {"no_face", "several_faces", "bad_embedding"}
    assert len(STATUSES) == 10


def test_a_table_under_its_contract_is_returned_itself() -> None:
    assert COLOURS.check(GOOD) is GOOD
    assert COLOURS.contract == "colours/3"


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (GOOD.drop_columns(["hue"]), "hue: expected int32, found nothing"),
        (GOOD.set_column(1, "hue", pa.array([0.5])), "hue: expected int32, found double"),
        (GOOD.append_column("size", pa.array([1])), "size: not part of the contract"),
        (GOOD.select(["hue", "name"]), "columns are in another order"),
        (pa.table({"x": [1]}), "name: expected string, found nothing; hue: expected int32, found nothing; x: not part"),
    ],
    ids=["missing", "type", "extra", "order", "all"],
)
def test_a_mismatch_names_the_contract_the_column_and_both_types(table: pa.Table, expected: str) -> None:
    with pytest.raises(SchemaMismatch) as caught:
        COLOURS.check(table)
    message = str(caught.value)
    assert message.startswith("table colours/3: ")
    assert expected in message
    assert "run the stage again" in message


def test_a_column_that_occurs_twice_is_not_called_a_wrong_order() -> None:
    twice = pa.Table.from_arrays([GOOD["name"], GOOD["hue"], GOOD["hue"]], names=["name", "hue", "hue"])
    with pytest.raises(SchemaMismatch) as caught:
        COLOURS.check(twice)
    assert "another order" not in str(caught.value)
    assert "hue" in str(caught.value)


def test_columns_missing_from_rows_become_null() -> None:
    table = COLOURS.from_rows([{"name": "red"}, {"hue": 120}])
    assert table.to_pylist() == [{"name": "red", "hue": None}, {"name": None, "hue": 120}]
    assert COLOURS.from_rows([]).num_rows == 0


@pytest.mark.parametrize(
    "contract", [UNITS, FACES, NEIGHBOURS, PAIRS, CANDIDATES, FINDINGS, REJECTS, embeddings(128), embedded_unit(4)]
)
def test_every_contract_survives_parquet(contract: Table) -> None:
    file = io.BytesIO()
    pq.write_table(contract.from_rows([{}]), file)
    back = contract.check(pq.read_table(file))
    assert back.to_pylist() == [dict.fromkeys(contract.schema.names)]


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
            assert images.to_pylist() == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nesting_keeps_nulls_order_and_values_of_sliced_and_chunked_rows(data: st.DataObject) -> None:
    crop = bytes(range(256)) * (FACE_BYTES // 256)
    rows = [
        {"key": str(at), "status": "ok", "crop": crop, "box": [1.0, 2.0, 3.0, at]} if whole else {"key": str(at)}
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
