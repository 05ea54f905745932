"""Ready vectors become the embeddings that NumPy makes of them, and bad ones become rows that say why."""

import hashlib
import json
from io import BytesIO

import numpy as np
import pyarrow as pa
import pytest

from operators import ready
from operators.formats.reading import Reader
from operators.ready import embedded
from operators.records import unnest
from operators.tables import UNITS


class Given(Reader):
    """Serves bytes from a dict."""

    def __init__(self, records: dict[str, bytes]) -> None:
        super().__init__(None)
        self.records = records

    def open(self, place: str, version: str | None = None) -> BytesIO:
        if place not in self.records:
            raise OSError("gone")
        return BytesIO(self.records[place])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch):
    def make(records: dict[str, bytes], width: int = 4, **changes: dict) -> list[dict]:
        monkeypatch.setattr(ready, "reader", lambda *_: Given(records))
        names = sorted({*records, *changes})
        rows = [
            {"key": name, "digest": hashlib.sha256(records.get(name, b"")).hexdigest(), "identity": f"p-{name}"}
            | changes.get(name, {})
            for name in names
        ]
        row = {"set": "release", "uri": "x", "format": "vectors", "anonymous": False, "unit": "u", "first_row": 0}
        unit = embedded(UNITS.from_rows([row | {"members": rows}]), width)
        assert unit["device"].to_pylist() == ["given"]
        return unnest(unit, "images").to_pylist()

    return make


def raw(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def test_vectors_are_scaled_to_unit_length_and_rounded(made) -> None:
    values = np.random.default_rng(0).normal(0, 3, (5, 4)).astype("<f4")
    rows = made({f"{at}": one.tobytes() for at, one in enumerate(values)})
    lengths = np.sqrt((values.astype(np.float64) ** 2).sum(1))
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert [row["identity"] for row in rows] == [f"p-{at}" for at in range(5)]
    np.testing.assert_array_equal(
        np.array([row["vector"] for row in rows], np.float16),
        (values.astype(np.float64) / lengths[:, None]).astype(np.float16),
    )
    np.testing.assert_allclose([row["norm"] for row in rows], lengths, rtol=1e-7)
    assert {row["box"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (raw(1, 2, 3), "3 components; the model gives 4"),
        (raw(1, 2, 3, 4, 5), "more than 4 components; the model gives 4"),
        (b"", "0 components"),
        (raw(0, 0, 0, 0), "not finite or is zero"),
        (raw(1, np.nan, 0, 0), "not finite or is zero"),
        (raw(1, np.inf, 0, 0), "not finite or is zero"),
    ],
)
def test_a_vector_that_cannot_be_used_is_a_row_that_says_why(made, data: bytes, error: str) -> None:
    bad, good = made({"a": data, "b": raw(0, 0, 2, 0)})
    assert bad["status"] == "bad_embedding"
    assert error in bad["error"]
    assert (bad["vector"], bad["norm"]) == (None, None)
    assert (good["status"], good["vector"], good["norm"]) == ("ok", [0, 0, 1, 0], 2)


def test_vectors_that_changed_or_cannot_be_read_are_rows(made) -> None:
    rows = made(
        {"a": raw(1, 0, 0, 0), "b": raw(0, 1, 0, 0)}, a={"digest": "0" * 64}, c={}, d={"error": "its name is empty"}
    )
    assert [row["status"] for row in rows] == ["changed", "ok", "unreadable", "unreadable"]
    assert rows[2]["error"] == "cannot be read: gone"
    assert rows[3]["error"] == "its name is empty"


def test_a_unit_of_another_contract_is_refused() -> None:
    with pytest.raises(Exception, match="units/2"):
        embedded(pa.table({"unit": ["u"]}), 4)


def test_vectors_are_read_as_they_lie_in_their_files(made, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    plain = Given.open
    monkeypatch.setattr(Given, "open", lambda self, place, version=None: order.append(place) or plain(self, place))
    places = [f'["a{at % 2}.npz","raw",{at}]' for at in range(12)]
    rows = made({place: raw(at + 1, 0, 0, 0) for at, place in enumerate(places)})
    assert order == sorted(places, key=json.loads)
    assert [row["norm"] for row in rows] == [float(places.index(row["key"]) + 1) for row in rows]
