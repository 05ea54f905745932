"""Audits of photographs that show several people: `faces.several=all`."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from cluster.faults import IncompleteTable
from cluster.storage import Store
from operators.encoder import Encoder
from operators.faces import FacePreparation
from operators.records import embeddings, unnest
from operators.tables import CANDIDATES, UNITS
from pipeline.assess import assess
from pipeline.calibrate import set_columns
from pipeline.clean import CleanConfig, clean
from pipeline.config import AuditConfig, load
from pipeline.embed import embed, unit_store
from pipeline.face_units import face_numbers, face_units, images_among, seen
from pipeline.gathering import FURTHER, LISTED, gather
from pipeline.imagery import Imagery
from pipeline.layout import units_of
from pipeline.report import report
from pipeline.scan import scan
from pipeline.search import search
from pipeline.stage import Run
from pipeline.verify import verify
from seeds.demo.generator import Generator

PEOPLE = 16
BYSTANDER = "p00/photo.png#2"
TWO = ["s/two.png", "s/two.png#2"]


@pytest.fixture(scope="module")
def people() -> list[PIL.Image.Image]:
    latents_ND = np.random.default_rng(7).standard_normal((2 * PEOPLE + 1, 100)).astype(np.float32)
    return [PIL.Image.fromarray(face) for face in np.delete(Generator().faces(latents_ND), 9, axis=0)]


def photo(path: Path, *placed: tuple[PIL.Image.Image, int, int]) -> None:
    """A grey picture with people of some size at some place from the left."""
    picture = PIL.Image.new("RGB", (320, 192), (90, 90, 90))
    for face, side, left in placed:
        picture.paste(face.resize((side, side), PIL.Image.Resampling.BICUBIC), (left, 16))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


@pytest.fixture(scope="module")
def configured(
    tmp_path_factory: pytest.TempPathFactory, people: list[PIL.Image.Image], root: Path
) -> Callable[..., AuditConfig]:
    """Photographs of 8 training people, every second with a bystander, whom nobody names; the release shows the first
    bystander alone, and one synthetic picture of two. The last training photograph is a copy of the first.
    """
    folder = tmp_path_factory.mktemp("several")
    for role, start in (("training", 0), ("control", 8)):
        for at in range(8):
            beside = [(people[PEOPLE + start + at], 96, 200)] if at % 2 == 0 else []
            photo(folder / role / f"p{at:02d}/photo.png", (people[start + at], 160, 16), *beside)
    (folder / "training/p99").mkdir()
    (folder / "training/p99/photo.png").write_bytes((folder / "training/p00/photo.png").read_bytes())
    (folder / "training/p99/text.png").write_bytes(b"no image")
    photo(folder / "release/s/alone.png", (people[PEOPLE], 128, 100))
    photo(folder / "release/s/two.png", (people[-1], 150, 10), (people[-3], 100, 200))
    values = {
        "out": str(folder / "run"),
        "sets": {role: {"uri": str(folder / role)} for role in ("release", "training", "control")},
        "faces": {"detector": str(root / "models" / "yunet_2023mar.onnx"), "several": "all"},
        "embedder": {"path": str(root / "models" / "sface_2021dec.onnx"), "runtime": "onnxruntime"},
        "scan": {"unit_images": 4},
        "search": {"shards": {"workers": 1}},
        "assess": {"blend_images": 0, "evidence": {"near_duplicates": False}},
        "ray": {"cpus": 2, "object_store_mb": 256},
    }
    (folder / "audit.yaml").write_text(json.dumps(values))
    return lambda *overrides: load(str(folder / "audit.yaml"), overrides)


@pytest.fixture(scope="module")
def audited(session: None, configured: Callable[..., AuditConfig]) -> AuditConfig:
    config = configured()
    with Run(config) as run:
        for stage in (scan, embed, search, assess, report):
            stage(run)
    return config


def keys(run: Run, role: str) -> list[str]:
    listed = run.table("scan", role, UNITS)["members"].combine_chunks().flatten()
    return [str(key) for key in listed.field("key").to_pylist()]


def test_every_image_has_its_row_and_every_further_face_one_behind_it(audited: AuditConfig) -> None:
    run = Run(audited)
    found = set_columns(run, "training", ("key", "identity", "status"))
    listed = keys(run, "training")
    two = {f"p{at:02d}/photo.png" for at in (0, 2, 4, 6)} | {"p99/photo.png"}
    expected = [name for key in listed for name in ([key, f"{key}#2"] if key in two else [key])]
    assert found["key"].to_pylist() == expected
    identities = [None if key.endswith("#2") else key.split("/")[0] for key in expected]
    assert found["identity"].to_pylist() == identities
    assert found["status"].to_pylist().count("not_an_image") == 1
    units = face_units(run, "training")
    assert [member["key"] for own in units["members"].to_pylist() for member in own] == expected
    assert [member["identity"] for own in units["members"].to_pylist() for member in own] == identities
    rows = [unit.first_row for unit in units_of(run, "training")]
    assert rows == units["first_row"].to_pylist() and len(rows) > 1
    assert face_numbers(run, "training").tolist() == [2 if key.endswith("#2") else 1 for key in expected]


def test_the_first_rows_are_those_of_the_largest_faces(audited: AuditConfig) -> None:
    """Bit for bit, of every column; the others are the faces that are left when the largest is painted over."""
    run = Run(audited)
    plain = FacePreparation(replace(audited.faces, several="largest", isolate=False))
    encoder = Encoder(audited.embedder)
    for at in range(run.table("scan", "training", UNITS).num_rows):
        unit = run.table("scan", "training", UNITS).slice(at, 1)
        stored = unit_store(run).read(unit["unit"][0].as_py())
        first = stored.filter(pc.invert(pc.match_substring(stored["key"], "#2")))
        assert first.equals(unnest(encoder(plain(unit)), "images"))
    with Imagery(run, "training") as images:
        row = set_columns(run, "training", ("key",))["key"].to_pylist().index(BYSTANDER)
        shown = images(row)
        assert shown is not None and shown.key == BYSTANDER and shown.identity is None
    assert shown.box is not None and shown.box[0] > 180, "the bystander stands on the right"
    alone = np.where(np.arange(320)[None, :, None] < 190, 90, shown.image).astype(np.uint8)
    assert plain.detector is not None
    (face,) = plain.detector(alone)
    np.testing.assert_allclose(face.box_4, shown.box, atol=4)


def test_the_bystander_is_found_as_a_person_without_a_name(audited: AuditConfig) -> None:
    run = Run(audited)
    table = run.table("assess", "candidates", CANDIDATES)
    best = table.filter(pc.equal(table["arm"], "training")).slice(0, 2).to_pylist()
    assert {row["gallery_key"] for row in best} == {BYSTANDER, "p99/photo.png#2"}, "once in each copy of the photograph"
    assert {row["release_key"] for row in best} == {"s/alone.png"}
    assert {row["gallery_identity"] for row in best} == {None}
    assert min(row["cosine"] for row in best) > 0.7
    summary = json.loads((run.folder / "summary.json").read_bytes())
    sets = summary["sets"]
    assert (sets["training"]["images"], sets["training"]["audited"], sets["training"]["rejected"]) == (
        10,
        9,
        {"not_an_image": 1},
    )
    assert sets["training"]["faces"] == {"audited": 14, "images": 9, "passed_over": 0, "images_with_passed_over": 0}
    assert sets["release"]["faces"]["audited"] == 3 and sets["control"]["faces"]["audited"] == 12
    assert summary["arms"]["training"]["comparisons"] == 3 * 14
    assert summary["calibration"]["images"] == 9 and summary["calibration"]["labels"], "of the largest faces alone"


def test_release_images_are_counted_and_not_their_faces(audited: AuditConfig) -> None:
    run = Run(audited)
    rows = set_columns(run, "release", ("key",))["key"]
    assert images_among(run, "release", rows, pa.chunked_array([TWO])) == 1
    assert images_among(run, "release", rows, rows) == 2
    assert images_among(run, "release", rows, rows.slice(0, 0)) == 0
    found = run.table("assess", "candidates", CANDIDATES)
    for arm, told in json.loads((run.folder / "summary.json").read_bytes())["arms"].items():
        own = found.filter(pc.equal(found["arm"], arm))["release_key"].to_pylist()
        assert told["release_images"] == len({key.partition("#")[0] for key in own})


def test_people_are_not_joined_to_whom_they_stand_beside(audited: AuditConfig) -> None:
    run = Run(audited)
    gathered = gather(run)
    assert len(gathered.images.label_N) == gathered.columns.num_rows == 10 + 5 + 8 + 4
    further = np.array(["#2" in key for key in gathered.columns["key"].to_pylist()])
    assert (gathered.images.label_N[further] == -1).all() and (gathered.images.label_N[~further] >= 0).all()
    assert gathered.images.group_N is not None, "as many of them in each arm as of the others are compared"
    assert len(set(gathered.images.group_N[further])) == len(set(gathered.images.group_N[~further])) == 1
    assert gathered.group_names == [LISTED, FURTHER]


def test_verify_finds_every_face_again_and_notices_a_foreign_vector(audited: AuditConfig, tmp_path: Path) -> None:
    with Run(audited) as run:
        verify(run)
        done = run.ledger.record["stages"]["verify"]
    assert (done["outcome"], done["images"], done["embedded"], done["bit_equal"]) == ("equal", 3 + 15 + 12, 29, 29)
    shutil.copytree(audited.out, tmp_path / "run")
    with Run(replace(audited, out=str(tmp_path / "run"))) as run:
        store, units = unit_store(run), run.table("scan", "training", UNITS)
        keys = {name: store.read(name, ["key"])["key"].to_pylist() for name in units["unit"].to_pylist()}
        name = next(name for name, own in keys.items() if BYSTANDER in own)
        row, made, table = keys[name].index(BYSTANDER), store.find(name), store.read(name)
        assert made is not None
        order = list(range(table.num_rows))
        order[row] = row - 1  # the vector of the person beside
        changed = table.set_column(table.schema.get_field_index("vector"), "vector", table["vector"].take(order))
        store.commit(name, changed.cast(table.schema), contract=made.contract, key=made.key, facts=made.facts)
        first_row = sum(len(own) for own in list(keys.values())[: list(keys).index(name)])
        with pytest.raises(IncompleteTable, match=rf"embed: training row {first_row + row}: cosine"):
            verify(run)


def test_with_the_largest_only_the_others_are_counted(audited: AuditConfig, tmp_path: Path) -> None:
    config = replace(audited, faces=replace(audited.faces, several="largest"), out=str(tmp_path / "run"))
    encoder = Encoder(audited.embedder)
    prepare = FacePreparation(replace(config.faces, isolate=False))
    with Run(config) as run:
        scan(run)
        for role in config.sets.given():
            units = run.table("scan", role, UNITS)
            for at, name in enumerate(units["unit"].to_pylist()):
                made = unnest(encoder(prepare(units.slice(at, 1))), "images")
                facts = {"status": {"ok": made.num_rows}, "device": ""}
                unit_store(run).commit(name, made, contract=embeddings(128).contract, key=name, facts=facts)
        told = {role: seen(run, role) for role in ("release", "training", "control")}
        assert face_units(run, "training").equals(run.table("scan", "training", UNITS))
    assert told["training"] == {"audited": 9, "images": 9, "passed_over": 5, "images_with_passed_over": 5}
    assert told["release"] == {"audited": 2, "images": 2, "passed_over": 1, "images_with_passed_over": 1}
    assert told["control"] == {"audited": 8, "images": 8, "passed_over": 4, "images_with_passed_over": 4}


def test_what_stays_after_cleaning_is_audited_with_all_its_faces(audited: AuditConfig, tmp_path: Path) -> None:
    """The new unit is what `unveil run` with the manifest would embed: the rows of the audit, and their number."""
    with Run(audited) as run:
        clean(run, CleanConfig(findings="candidates", out=str(tmp_path / "clean")))
        before = set_columns(run, "release", ("key", "vector"))
    record = json.loads((tmp_path / "clean/clean.json").read_bytes())
    assert (record["removed"]["images"], record["removed"]["faces"], record["after"]["images"]) == (1, 1, 1)
    sets = replace(audited.sets, release=replace(audited.sets.release, list_file=str(tmp_path / "clean/manifest.csv")))
    config = replace(audited, out=str(tmp_path / "again"), store=str(Path(audited.out) / "store"), sets=sets)
    with Run(config) as again:
        scan(again)
        embed(again)
        assert again.ledger.record["stages"]["embed"]["embedded_now"] == 0
        after = set_columns(again, "release", ("key", "vector"))
        assert face_numbers(again, "release").tolist() == [1, 2]
        assert [member["key"] for member in face_units(again, "release")["members"][0].as_py()] == TWO
    assert after["key"].to_pylist() == TWO
    assert after.equals(before.filter(pc.is_in(before["key"], pa.array(TWO))))
    again_of = json.loads((tmp_path / "clean/audit/summary.json").read_bytes())
    assert again_of["arms"]["training"]["comparisons"] == 2 * 14
    assert again_of["sets"]["release"]["images"] == 1 and again_of["sets"]["release"]["faces"]["audited"] == 2


def test_models_that_have_other_faces_of_an_image_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows would be of different faces from there on, and a person whom both models see would be lost."""
    members: list[dict[str, Any]] = [
        {"key": key, "identity": None, "bytes": 1, "digest": key, "attributes": []} for key in ("a", "b")
    ]
    row = {"set": "release", "uri": "/", "format": "folder", "anonymous": False, "unit": "u", "first_row": 0}
    units, rows = UNITS.from_rows([row | {"members": members}]), pa.table({"key": ["a", "b", "b#2"]})
    stores = {name: Store(tmp_path / name) for name in ("first", "second")}
    monkeypatch.setattr("pipeline.face_units.unit_store", lambda _, model=None: stores[model or "first"])
    config = SimpleNamespace(faces=SimpleNamespace(several="all"), models=lambda: [Named("first"), Named("second")])
    run: Any = SimpleNamespace(config=config, table=lambda *_: units)
    stores["first"].commit("u", rows, contract="e/1", key="u", facts={"faces": {"1": 2}})
    stores["second"].commit("u", rows, contract="e/1", key="u", facts={"faces": {"1": 2}})
    assert [one["key"] for one in face_units(run, "release")["members"][0].as_py()] == ["a", "b", "b#2"]
    stores["second"].commit("u", rows.slice(0, 2), contract="e/1", key="u", facts={})
    with pytest.raises(IncompleteTable, match="second has other faces"):
        face_units(run, "release")


class Named(str):
    """A model that is its name."""

    @property
    def name(self) -> str:
        return str(self)
