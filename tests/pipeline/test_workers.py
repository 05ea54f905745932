from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.storage import Store
from operators.backbones import BackboneConfig
from operators.faces import FaceConfig
from operators.records import embedded_unit, embeddings, nest
from operators.tables import UNITS
from operators.vectors import to_arrow
from pipeline.workers import MOST_ATTEMPTS, Attempts, Task, UnitCommit, by_image

UNIT = pa.table({"unit": ["u"], "members": [[{"key": "a"}, {"key": "b"}]]})


def test_a_unit_that_ended_too_many_workers_is_not_tried_again(tmp_path: Path) -> None:
    """Each attempt is by another worker, which knows of the others by the store alone."""
    assert [Attempts(Store(tmp_path), "embed").begin(UNIT) for _ in range(MOST_ATTEMPTS)] == [None] * MOST_ATTEMPTS
    assert Attempts(Store(tmp_path), "prepare").begin(UNIT) is None
    refused = Attempts(Store(tmp_path), "embed").begin(UNIT)
    assert refused == f"{MOST_ATTEMPTS} workers died one after the other in the step embed of unit u, 2 images."
    Store(tmp_path).sweep()
    assert Attempts(Store(tmp_path), "embed").begin(UNIT) is None


def test_a_unit_that_was_survived_starts_afresh(tmp_path: Path) -> None:
    attempts = Attempts(Store(tmp_path), "embed")
    for _ in range(2 * MOST_ATTEMPTS):
        assert attempts.begin(UNIT) is None
        attempts.end(UNIT)
    assert list(tmp_path.iterdir()) == []


def test_images_are_counted_where_rows_are_faces() -> None:
    rows = ["ok", "ok", "no_face", "bad_embedding", "ok", "bad_embedding", "bad_embedding", "ok"]
    assert by_image(rows, {"0": 2, "2": 2, "3": 2}, 5) == {"ok": 3, "no_face": 1, "bad_embedding": 1}
    assert by_image(["ok", "no_face", "ok"], {}, 3) == {"ok": 2, "no_face": 1}


def test_a_committed_unit_is_counted_by_images_and_its_faces_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images: one with three faces, the second of which has no embedding; and one without a face."""
    told: dict[str, Any] = {}
    monkeypatch.setattr("ray.util.metrics.Counter.inc", lambda self, value=1, tags=None: told.update(
        {(self.info["name"], *(tags or {}).values()): value}))  # fmt: skip
    status = ["ok", "bad_embedding", "ok", "no_face"]
    contract = embeddings(128)
    good_N = np.array([one == "ok" for one in status])
    known = {"key": ["a", "a#2", "a#3", "b"], "digest": ["a", "a", "a", "b"], "status": status}
    images = contract.from_rows([dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)])
    vectors = to_arrow(np.ones((4, 128), np.float16), good_N)
    images = images.set_column(images.schema.get_field_index("vector"), contract.schema.field("vector"), vectors)
    made = nest(images.cast(contract.schema), embedded_unit(128), "images", unit="u", device="cpu")
    members = [{"key": key, "identity": None, "bytes": 1, "digest": key, "attributes": []} for key in ("a", "b")]
    row = {"set": "release", "uri": "/", "format": "folder", "anonymous": False, "unit": "u", "first_row": 0}
    unit = UNITS.from_rows([row | {"members": members}]).append_column("lost", pa.array([None], pa.string()))
    unit = unit.append_column("ordinals", pa.array([[1, 2, 3, 1]]))
    for name in ("device", "images"):
        unit = unit.append_column(f"{name}_0", made[name])
    task = Task(faces=FaceConfig(), models=(BackboneConfig(width=128),), roots=(str(tmp_path),))
    counts = UnitCommit(task)(unit).to_pylist()
    assert [(one["images"], one["failed"], one["copies"], one["fault"]) for one in counts] == [(2, 1, 0, None)]
    assert Store(tmp_path).find("u").facts == {
        "status": {"ok": 2, "bad_embedding": 1, "no_face": 1},
        "device": "cpu",
        "faces": {"0": 3},
    }
    told = {name: value for name, value in told.items() if name[0] in ("unveil_embed_images", "unveil_embed_faces")}
    assert told == {
        ("unveil_embed_images", "ok"): 1,
        ("unveil_embed_images", "no_face"): 1,
        ("unveil_embed_faces",): 2,
    }
