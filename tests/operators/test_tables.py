"""Contracts of tables: what is refused and how."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.errors import SchemaMismatch
from operators.records import FACES, embedded_unit, embeddings
from operators.tables import CANDIDATES, FINDINGS, NEIGHBOURS, PAIRS, REJECTS, STATUSES, UNITS, Table

COLOURS = Table(name="colours", version=3, schema=pa.schema([("name", pa.string()), ("hue", pa.int32())]))
GOOD = pa.table({"name": ["red"], "hue": pa.array([0], pa.int32())})


def test_statuses_are_the_documented_ones() -> None:
    failures = {"unreadable", "changed", "not_an_image", "corrupt", "too_large", "not_aligned"}
    assert STATUSES[0] == "ok"
    faces = {"no_face", "too_small", "several_faces"}
    assert set(STATUSES[1:]) == failures | faces | {"timed_out", "crashed", "bad_embedding"}
    assert len(STATUSES) == len(set(STATUSES))


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
