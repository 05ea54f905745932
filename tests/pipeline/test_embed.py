import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from cluster.faults import IncompleteTable, StorageError
from operators.backbones import BackboneConfig
from operators.encoder import Encoder
from operators.errors import FormatError, ModelError
from operators.faces import FaceConfig, FacePreparation
from operators.records import embeddings, unnest
from operators.tables import REJECTS, UNITS
from pipeline.config import AuditConfig
from pipeline.embed import embed, embedding_key, unit_store
from pipeline.repeats import with_sources
from pipeline.scan import scan
from pipeline.stage import Run

pytestmark = pytest.mark.ray
Configured = Callable[..., AuditConfig]


def embedded(config: AuditConfig) -> dict[str, bytes]:
    """Scan and embed; the bytes of every committed unit by name."""
    with Run(config) as run:
        scan(run)
        embed(run)
        return unit_bytes(run)


def unit_bytes(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(unit_store(run).root.glob("*.parquet"))}


def test_every_listed_image_has_a_row_and_failures_say_why(session: None, configured: Configured, corpus: Path) -> None:
    config = configured()
    embedded(config)
    broken = {line.split(",")[1]: line.split(",")[2] for line in (corpus / "broken.csv").read_text().splitlines()[1:]}
    expected = {"empty": "not_an_image", "text": "not_an_image", "truncated": "corrupt", "no_face": "no_face"}
    with Run(config) as run:
        status: dict[str, str] = {}
        for role in config.sets.given():
            units = run.table("scan", role, UNITS)
            for name, members in zip(units["unit"].to_pylist(), units["members"].to_pylist(), strict=True):
                table = embeddings(128).check(unit_store(run).read(name))
                assert table["key"].to_pylist() == [member["key"] for member in members]
                assert [v is None for v in table["vector"].to_pylist()] == [
                    s != "ok" for s in table["status"].to_pylist()
                ]
                if role == "release":
                    status |= dict(zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True))
        rejects = run.table("embed", "release", REJECTS)
        assert set(rejects["key"].to_pylist()) == {key for key, value in status.items() if value != "ok"}
        assert all(rejects["error"].to_pylist())
    seen = {kind: status[key] for key, kind in broken.items() if key in status and kind in expected}
    assert seen and all(expected[kind] == value for kind, value in seen.items())


def test_a_second_run_embeds_nothing_and_says_so(
    session: None, configured: Configured, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured()
    first = embedded(config)
    caplog.set_level("INFO")
    monkeypatch.setattr("pipeline.embed._embed_units", lambda *_: pytest.fail("nothing should be embedded"))
    assert embedded(config) == first
    assert "embed: nothing to do" in caplog.text


def test_an_audit_that_shares_the_store_embeds_nothing_again(
    session: None, configured: Configured, tmp_path: Path
) -> None:
    first = embedded(configured(f"store={tmp_path}/store"))
    with Run(configured(f"store={tmp_path}/store", f"out={tmp_path}/other")) as run:
        scan(run)
        embed(run)
        assert run.ledger.record["stages"]["embed"]["embedded_now"] == 0
        assert unit_bytes(run) == first


def test_neither_worker_counts_nor_the_chain_change_a_byte(
    session: None, configured: Configured, tmp_path: Path
) -> None:
    one = ("embed.prepare.workers=1", "embed.encode.workers=1", "embed.chain=steps", f"out={tmp_path}/one")
    assert embedded(configured("embed.chain=whole")) == embedded(configured(*one))


def test_images_of_other_units_are_embedded_once_and_keep_their_rows(
    session: None, configured: Configured, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the training set also lies in the release; the tables are those of a run that copies nothing."""
    release = tmp_path / "release"
    shutil.copytree(corpus / "release", release / "other")
    for path in sorted(path for path in (corpus / "training").rglob("*") if path.is_file())[::2]:
        target = release / "own" / path.relative_to(corpus / "training")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    sets = (f"sets.release.uri={release}", "embed.prepare.workers=1")
    config = configured(*sets, f"out={tmp_path}/copied")
    copied = embedded(config)
    with Run(config) as run:
        facts = run.ledger.record["stages"]["embed"]
        tables = [run.table("scan", role, UNITS) for role in config.sets.given()]
    first: dict[str, str] = {}
    expected = 0
    for table in tables:
        for name, members in zip(table["unit"].to_pylist(), table["members"].to_pylist(), strict=True):
            expected += sum(first.setdefault(m["digest"], name) != name for m in members if m["digest"])
    assert facts["copied_now"] == expected > 10
    monkeypatch.setattr("pipeline.embed.with_sources", with_sources_off)
    assert embedded(configured(*sets, f"out={tmp_path}/computed")) == copied


def with_sources_off(pending: pa.Table, wanted: pa.Table, *, copies: bool) -> pa.Table:
    assert copies, "both runtimes of the tests place faces alike"
    return with_sources(pending, wanted, copies=False)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(
    session: None, configured: Configured, config_file: Path, tmp_path: Path
) -> None:
    undisturbed = embedded(configured())
    command = [sys.executable, "-m", "pipeline"]
    overrides = [str(config_file), f"out={tmp_path}/killed", "embed.prepare.workers=1", "embed.encode.workers=1"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    subprocess.run([*command, "scan", *overrides], check=True, capture_output=True, env=environment)
    run = Run(configured(*overrides[1:]))  # which only looks until it is entered
    process = subprocess.Popen(
        [*command, "embed", *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
    deadline = time.monotonic() + 90
    while not unit_bytes(run) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    survived = unit_bytes(run)
    assert 0 < len(survived) < len(undisturbed), "the kill must fall into the middle of the work"
    with run:
        with pytest.raises(IncompleteTable):
            run.table("embed", "release", REJECTS)
        embed(run)
        assert unit_bytes(run) == undisturbed
        assert not list(unit_store(run).root.glob(".aside-*"))


def test_the_key_covers_what_changes_an_embedding_and_nothing_else() -> None:
    base = embedding_key(BackboneConfig(), FaceConfig())
    assert base == embedding_key(BackboneConfig(), FaceConfig(most_faces=2)), "only `all` takes several"
    assert base == "0ab5dd86a729fcf3e423b7498c0da2ae", "another name makes users embed all again"
    same = BackboneConfig(path="other/place.onnx", name="alias", runtime="openvino", batch=4, licence="any", url="any")
    assert base == embedding_key(same, FaceConfig(detector="x.onnx", isolate=False))
    changed = [
        embedding_key(BackboneConfig(sha256="0"), FaceConfig()),
        embedding_key(BackboneConfig(channels="bgr"), FaceConfig()),
        embedding_key(BackboneConfig(dtype="bfloat16"), FaceConfig()),
        embedding_key(BackboneConfig(flip=True), FaceConfig()),
        embedding_key(BackboneConfig(), FaceConfig(mode="aligned")),
        embedding_key(BackboneConfig(), FaceConfig(detector_sha256="0")),
        embedding_key(BackboneConfig(), FaceConfig(several="reject")),
        embedding_key(BackboneConfig(), FaceConfig(several="all")),
        embedding_key(BackboneConfig(), FaceConfig(several="all", most_faces=2)),
    ]
    assert len({base, *changed}) == len(changed) + 1


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("embedder.width=64", r"output shape is \(8, 128\), declared is \(8, 64\)"),
        ("embedder.path=nowhere.onnx", "model file cannot be read"),
        ("faces.detector=nowhere.onnx", "model file cannot be read"),
        (f"embedder.sha256={'f' * 64}", f"pinned is {'f' * 64}"),
    ],
)
def test_a_wrong_model_is_refused_before_any_work(
    session: None, configured: Configured, override: str, complaint: str
) -> None:
    with pytest.raises(ModelError, match=complaint):
        embedded(configured(override))


def test_a_set_without_a_usable_image_is_refused_and_its_reasons_are_kept(
    session: None, configured: Configured, tmp_path: Path
) -> None:
    (tmp_path / "blank").mkdir()
    for shade in range(3):
        sink = io.BytesIO()
        PIL.Image.fromarray(np.full((64, 64, 3), 80 * shade, np.uint8)).save(sink, "PNG")
        (tmp_path / "blank" / f"{shade}.png").write_bytes(sink.getvalue())
    config = configured(f"sets.training.uri={tmp_path}/blank")
    with pytest.raises(FormatError, match=r"sets\.training: none of its 3 images could be audited \(no_face 3\)"):
        embedded(config)
    with Run(config) as run:
        assert run.table("embed", "training", REJECTS).num_rows == 3


def test_a_unit_that_a_worker_cannot_write_is_a_clear_error(session: None, configured: Configured) -> None:
    with Run(configured()) as run:
        scan(run)
        name = run.table("scan", "anchor", UNITS)["unit"][0].as_py()
        (unit_store(run).root / f"{name}.parquet").mkdir(parents=True)  # in the place of the file
        with pytest.raises(StorageError, match=rf"{name}\.parquet: cannot be written"):
            embed(run)


def test_a_model_added_later_embeds_the_same_rows_and_leaves_the_first_alone(
    session: None, configured: Configured
) -> None:
    first = embedded(configured())
    config = configured("embedders=[sface_2021dec,dlib_resnet_v1]")
    with Run(config) as run:
        stores = [unit_store(run, model) for model in config.models()]
        times = {path: path.stat().st_mtime_ns for path in stores[0].root.glob("*.parquet")}
        scan(run)
        embed(run)
        assert unit_bytes(run) == first and {path: path.stat().st_mtime_ns for path in times} == times
        unit = run.table("scan", "release", UNITS).slice(0, 1)
        made = stores[1].read(unit["unit"][0].as_py())
        prepared = FacePreparation(replace(config.faces, isolate=False), ("dlib150",))(unit)
        expected = unnest(Encoder(replace(config.models()[1], runtime="onnxruntime"))(prepared), "images")
        assert made["key"].equals(expected["key"]) and made["status"].equals(expected["status"])
        pairs = [(a, b) for a, b in zip(made["vector"].to_pylist(), expected["vector"].to_pylist(), strict=True) if a]
        cosines = [np.dot(a, b) for a, b in pairs]
        assert len(cosines) > 5 and min(cosines) > 0.999
        second = run.ledger.record["stages"]["embed"]["model dlib_resnet_v1"]["release"]
        assert second["status"]["ok"]
        rejects = run.table("embed", second["rejects"], REJECTS)
        assert rejects.num_rows == sum(second["status"].values()) - second["status"]["ok"] > 0
        embed(run)
        assert run.ledger.record["stages"]["embed"]["embedded_now"] == 0


def test_a_resumed_store_keeps_the_runtime_that_it_was_begun_with(session: None, configured: Configured) -> None:
    config = configured("embedder.runtime=auto")
    with Run(config) as run:
        scan(run)
        root = unit_store(run).root
        root.mkdir(parents=True)
        (root / "runtime.json").write_text(json.dumps({"runtime": "openvino"}))
        embed(run)
        facts = run.ledger.record["stages"]["embed"]["release"]
        assert facts["devices"] == ["openvino CPU"]
