import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from operators.errors import ConfigError
from pipeline.config import AuditConfig, load, to_dict, to_yaml


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for role in ("release", "training", "control"):
        (tmp_path / role).mkdir()
    return tmp_path


@pytest.fixture
def write(folders: Path) -> Callable[..., str]:
    def build(**changes: object) -> str:
        values: dict[str, object] = {
            "out": str(folders / "run"),
            "sets": {role: {"uri": str(folders / role)} for role in ("release", "training")},
        }
        path = folders / "a.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return str(path)

    return build


def test_a_file_holds_differences_only(write: Callable[..., str], folders: Path) -> None:
    config = load(write(search={"k": 7}))
    assert config.search.k == 7
    assert config.search.block_images == AuditConfig.__dataclass_fields__["search"].default_factory().block_images
    assert config.sets.control is None and list(config.sets.given()) == ["release", "training"]


def test_overrides_come_last_and_the_right_one_wins(write: Callable[..., str], folders: Path) -> None:
    overrides = [
        "search.k=8",
        "search.k=9",
        f"sets.control.uri={folders}/control",
        "report.faces=clear",
        "assess.fmr=1e-5",
    ]
    config = load(write(search={"k": 7}), overrides)
    assert config.search.k == 9 and config.report.faces == "clear" and config.assess.fmr == 1e-5
    assert list(config.sets.given()) == ["release", "training", "control"]


def test_the_resolved_configuration_loads_again_to_the_same(write: Callable[..., str], folders: Path) -> None:
    config = load(write(), [f"sets.control.uri={folders}/control"])
    again = folders / "again.yaml"
    again.write_text(to_yaml(config))
    assert load(str(again)) == config
    assert to_dict(config)["sets"]["anchor"] is None


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("faces.moode=aligned", r"unknown key 'faces\.moode'\. Did you mean faces\.mode\?"),
        ("serach.k=3", r"unknown key 'serach'\. Did you mean search\?"),
        ("sets.control.url=x", r"unknown key 'sets\.control\.url'\. Did you mean sets\.control\.uri\?"),
        ("sets.zzz.uri=x", r"unknown key 'sets\.zzz'\. Known here: release, training, control, anchor, placebo"),
        ("faces.limits.max_byte=1", r"Did you mean faces\.limits\.max_bytes\?"),
        ("search.k=many", r"could not be converted to Integer \(key 'search\.k'\)"),
        ("search.k=0", r"search\.k must be at least 1\. Got 0\."),
        ("faces.mode=find", r"faces\.mode must be 'detect' or 'aligned'\. Got 'find'\."),
        ("faces.min_score=2", r"faces\.min_score must be between 0 and 1"),
        ("embed.encode.workers=0", r"embed\.encode\.workers must be at least 1"),
        ("embedder.channels=hsv", r"embedder\.channels must be one of rgb, bgr"),
        ("assess.fmr=0", r"assess\.fmr must be between 0 and 1"),
        ("report.faces=blurred", r"report\.faces must be 'covered' or 'clear'"),
        ("ray.object_store_mb=1", r"ray\.object_store_mb must be at least 128"),
        ("scan.unit_images=0", r"scan\.unit_images must be between"),
        ("sets.release.format=rar", r"sets\.release\.format must be 'auto' or one of zip, .*folder\. Got 'rar'\."),
        ("search", r"'search': overrides are written key=value"),
        ("search.k=[", r"not a valid override"),
    ],
)
def test_a_wrong_override_is_refused_by_name(write: Callable[..., str], override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(write(), [override])


@pytest.mark.parametrize(
    "override",
    [
        "set.release.uri=https://me:SECRET@h/a.zip?sig=SECRET",
        "sets.release.uri=https://h/a.zip?sig=${SECRET",
        "sets.release.uri=[https://h/a.zip?sig=SECRET",
        "sets.release=https://h/a.zip?sig=SECRET",
        "sets.release.anonymous=https://me:SECRET@h/a.zip",
        "out=https://h/a.zip?sig=SECRET",
        "https://h/a.zip?sig-SECRET",
    ],
)
def test_no_complaint_repeats_what_is_secret_in_an_address(write: Callable[..., str], override: str) -> None:
    with pytest.raises(ConfigError, match="https://") as error:
        load(write(), [override])
    assert "SECRET" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"out: [1", "not valid YAML"),
        (b"out: \xff\xfe", "not valid YAML"),
        (b"- a\n- b\n", "must hold `key: value` lines"),
        (b"", "out is missing"),
        (b"out: x\n", "sets is missing"),
        (b"out: x\nsets: {release: {uri: a}}\n", r"sets\.training is missing"),
        (b"out: x\nsets: {release: {format: folder}, training: {uri: b}}\n", r"sets\.release\.uri is missing"),
        (b"out: x\nsets: 3\n", "sets"),
    ],
)
def test_a_broken_file_is_refused_with_the_reason(folders: Path, content: bytes, complaint: str) -> None:
    path = folders / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        load(str(path))


def test_a_missing_file_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such configuration file"):
        load("nowhere.yaml")


@pytest.mark.parametrize("second", ["release", "release/", "release/../release", "release/inner", "."])
def test_two_sets_in_one_folder_are_refused(write: Callable[..., str], folders: Path, second: str) -> None:
    (folders / "release" / "inner").mkdir()
    with pytest.raises(ConfigError, match=r"sets\.release and training overlap .* a set compared\s+with itself"):
        load(write(), [f"sets.training.uri={folders}/{second}"])


def test_a_link_to_the_same_folder_is_the_same_folder(write: Callable[..., str], folders: Path) -> None:
    (folders / "alias").symlink_to(folders / "release")
    with pytest.raises(ConfigError, match="overlap"):
        load(write(), [f"sets.training.uri={folders}/alias"])


def test_a_run_folder_inside_a_set_is_refused(write: Callable[..., str], folders: Path) -> None:
    with pytest.raises(ConfigError, match="out lies inside the training set"):
        load(write(), [f"out={folders}/training/run"])
