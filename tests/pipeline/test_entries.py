"""Files of the catalogue are refused, with file and key, if they state less, more or something else than the schema."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from operators.errors import ConfigError
from pipeline.entries import Entry, build, read


@pytest.fixture
def stated(root: Path) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((root / "seeds" / "catalogue" / "dcface.yaml").read_text())
    return made


def refusal(stated: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        build(Entry, stated, Path("x/dcface.yaml"))
    message = str(raised.value)
    assert message.startswith("x/dcface.yaml: ")
    return message.removeprefix("x/dcface.yaml: ")


def test_a_file_becomes_an_entry(stated: dict[str, Any]) -> None:
    one = build(Entry, stated, Path("dcface.yaml"))
    assert one.paper.arxiv == "2304.07060" and one.sizes[0].images == 550_000
    assert [t.set for t in one.generator.trained_on] == ["ffhq", "casia_webface"]
    assert isinstance(one.sizes, tuple) and one.note == ""


def change(stated: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    at: Any = stated
    for part in path:
        at = at[int(part)] if part.isdigit() else at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("imgs", 3, "unknown key 'imgs'. "),
        ("papre", {}, "unknown key 'papre'. Did you mean paper?"),
        ("sizes.1.image", 3, "unknown key 'sizes[1].image'. Did you mean sizes[1].images?"),
        ("licence", ..., "licence is missing. Write null, and why in the note, if not known."),
        ("paper.venue", ..., "paper.venue is missing."),
        ("generator.trained_on.0.source", ..., "generator.trained_on[0].source is missing."),
        ("sizes.0.images", "550k", "sizes[0].images must be a whole number. Got '550k'."),
        ("sizes.0.images", 5.5, "sizes[0].images must be a whole number. Got 5.5."),
        ("sizes.0.images", True, "sizes[0].images must be a whole number. Got True."),
        ("sizes.0.images", 0, "sizes[0].images must be positive. Got 0."),
        ("sizes.0.rounded", "no", "sizes[0].rounded must be true or false. Got 'no'."),
        ("sizes", [], "sizes must hold at least one version."),
        ("sizes", {}, "sizes must be a list ([] if empty). Got {}."),
        ("paper", "2304.07060", "paper must hold `key: value` lines. Got '2304.07060'."),
        ("paper.arxiv", 2304.0706, "paper.arxiv must be a text in quotes. Got 2304.0706."),
        ("paper.arxiv", None, "paper.arxiv is null and nothing says why. Write it in the note."),
        ("paper.source", "a friend", "paper.source must be an address (https://...). Got 'a friend'."),
        (
            "paper.certainty",
            "sure",
            "paper.certainty must be one of primary, abstract, secondary, computed, unverified.",
        ),
        ("form.format", "rar", "form.format must be null or one of "),
        ("crop.mode", "cut", "crop.mode must be 'detect' or 'aligned'. Got 'cut'."),
        ("crop.width", 128, "crop.mode is 'aligned' for 112 x 112 pixels only. Got 128 x 112."),
        ("people.option", "folder", "people.option must be one of auto, parent, label, none, or attribute:NAME."),
        ("leakage.0.value", "high", "leakage[0].value must be a number. Got 'high'."),
        ("relations", [{"kind": "like"}], "relations[0].set is missing."),
        ("kind", "fake", "kind must be one of release, real. Got 'fake'."),
        ("kind", "real", "generator must be stated for a release and null for a real set. Got 'real'."),
        ("audit", None, "audit must be stated for a release and null for a real set. Got 'release'."),
        ("name", None, "name must be a text in quotes. Got None."),
    ],
)
def test_every_mistake_is_named_with_its_key(stated: dict[str, Any], key: str, value: Any, said: str) -> None:
    change(stated, key, value)
    if key == "relations":
        value[0]["source"], value[0]["certainty"] = "https://example.org/", "primary"
    assert refusal(stated).startswith(said)


def test_a_null_with_a_note_is_allowed(stated: dict[str, Any]) -> None:
    change(stated, "paper.venue", None)
    change(stated, "paper.note", "Not published yet.")
    assert build(Entry, stated, Path("dcface.yaml")).paper.venue is None


def test_a_file_that_is_no_mapping_is_refused() -> None:
    assert refusal(["dcface"]) == "the file must hold `key: value` lines. Got ['dcface']."


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1\nb: }")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not valid YAML \("):
        read(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file"):
        read(tmp_path / "none.yaml")


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read(tmp_path / "evil.yaml")
