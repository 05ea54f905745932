"""The catalogue's files: all that were asked for, each by the schema, each number with a source, nothing dangling."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import catalogue
from pipeline.config import load as load_config
from pipeline.entries import CERTAINTIES, EmbedderFaces, Entry, Fact
from pipeline.models import known_models

RELEASES = [
    "sface",
    "sface2",
    "idnet",
    "dcface",
    "gandiffface",
    "idiff_face_uniform",
    "idiff_face_two_stage",
    "synface",
    "digiface_1m",
    "exfacegan",
    "hsface10k",
    "cemiface",
    "hyperface",
    "langevin",
    "langevin_dispersion",
    "langevin_disco",
    "digi2real",
    "morphface",
    "syn_multi_pie",
    "arc2face",
    "vigface",
]
REAL = [
    "casia_webface",
    "ffhq",
    "webface4m",
    "webface12m",
    "webface42m",
    "ms1mv2",
    "ms1mv3",
    "vggface2",
    "celeba",
    "celeba_hq",
    "lfw",
    "webface260m",
    "webface600k",
    "ms_celeb_1m",
    "glint360k",
    "vggface",
    "facescrub",
    "arc2face_webface42m",
]
ENTRIES = catalogue.entries()
TOP_1 = {  # arXiv 2510.17372, released lists of the 100 highest pairs against CASIA-WebFace
    "cemiface": 0.9618,
    "hsface10k": 0.9420,
    "gandiffface": 0.8142,
    "sface": 0.7736,
    "digi2real": 0.7637,
    "digiface_1m": 0.7231,
    "hyperface": 0.7217,
    "idnet": 0.7094,
    "sface2": 0.6874,
    "dcface": 0.6865,
    "morphface": 0.6853,
    "langevin_disco": 0.6613,
    "synface": 0.6556,
    "syn_multi_pie": 0.5985,
}
COUNTS = {  # images and people, None: not known
    "sface": (1_885_877, None),
    "dcface": (550_000, 10_000),
    "idiff_face_uniform": (502_500, 10_050),
    "digiface_1m": (1_219_995, 109_999),
    "hyperface": (640_000, 10_000),
    "casia_webface": (490_623, 10_572),
    "ffhq": (70_000, None),
    "webface42m": (42_474_558, 2_059_906),
    "ms1mv3": (5_179_510, 93_431),
    "lfw": (13_233, 5_749),
}


def facts(value: Any) -> Iterator[Fact]:
    """All groups of facts within a value, by walking its fields."""
    if isinstance(value, Fact):
        yield value
    if dataclasses.is_dataclass(value):
        for one in dataclasses.fields(value):
            yield from facts(getattr(value, one.name))
    if isinstance(value, tuple):
        for one in value:
            yield from facts(one)


def test_the_catalogue_holds_these() -> None:
    assert {one.name for one in ENTRIES if one.kind == "release"} == set(RELEASES)
    assert {one.name for one in ENTRIES if one.kind == "real"} == set(REAL)


def test_every_file_is_an_entry_that_the_loader_found(root: Path) -> None:
    stems = {path.stem for path in (root / "seeds" / "catalogue").iterdir()}
    assert stems == {one.name for one in ENTRIES} | {"embedders"}


@pytest.mark.parametrize("one", ENTRIES, ids=lambda one: one.name)
def test_every_number_and_statement_has_a_source_and_a_certainty(one: Entry, root: Path) -> None:
    found = list(facts(one))
    assert len(found) >= 6
    for fact in found:
        assert re.fullmatch(r"https?://[\w.-]+\.\w+/\S+", fact.source) and fact.certainty in CERTAINTIES

    def numbers(value: Any, sourced: bool) -> Iterator[bool]:
        if isinstance(value, dict):
            for below in value.values():
                yield from numbers(below, "source" in value)
        elif isinstance(value, list):
            for below in value:
                yield from numbers(below, sourced)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield sourced

    stated = yaml.safe_load((root / "seeds" / "catalogue" / f"{one.name}.yaml").read_text())
    assert all(numbers(stated, False))


@pytest.mark.parametrize("one", ENTRIES, ids=lambda one: one.name)
def test_papers_are_known_by_number_or_venue(one: Entry) -> None:
    assert one.paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{5}|\d{4}\.\d{4}", one.paper.arxiv)
    assert one.paper.arxiv or one.paper.venue


def test_published_figures_are_those_of_the_sources() -> None:
    for name, value in TOP_1.items():
        (figure,) = [one for one in catalogue.entry(name).leakage if one.what == "highest cosine of any pair"]
        assert (figure.value, figure.against, figure.certainty) == (value, "casia_webface", "primary")
    for name, counts in COUNTS.items():
        size = catalogue.entry(name).sizes[0]
        assert (size.images, size.identities) == counts


@pytest.mark.parametrize("name", RELEASES)
def test_what_is_proposed_for_an_audit_fits(name: str) -> None:
    """Training sets hold what the generator saw; no control does, unless a part is named; no anchor's generator did."""
    one = catalogue.entry(name)
    assert one.audit is not None and one.generator is not None
    saw = {t.set for t in one.generator.trained_on}
    wholes = {whole for at in saw for whole in catalogue._wholes(at)}
    assert set(one.audit.training) <= wholes
    assert bool(one.audit.training) == bool(saw) == bool(one.audit.controls) == bool(one.audit.anchors)
    for arm in one.audit.controls:
        assert catalogue.entry(arm.set).kind == "real" and arm.set != name
        inside = {whole for at in (arm.set,) for whole in catalogue._wholes(at)} | {arm.set}
        assert arm.part or not inside & set(one.audit.training), arm.set
        assert arm.part or arm.set not in wholes
    for arm in one.audit.anchors:
        anchor = catalogue.entry(arm.set)
        assert anchor.generator is not None
        for seen in anchor.generator.trained_on:
            assert not set(catalogue._wholes(seen.set)) & set(one.audit.training), (name, arm.set)


@pytest.mark.parametrize("name", RELEASES)
def test_the_proposed_configuration_is_plain_yaml_of_the_sets(name: str) -> None:
    made = yaml.safe_load(catalogue.config_lines(catalogue.entry(name)))
    assert set(made["sets"]) <= {"release", "training", "control", "anchor"}
    assert {"release", "training"} <= set(made["sets"]) and made["sets"]["release"]["catalogue"] == name
    assert made["faces"]["mode"] in ("detect", "aligned")
    assert len({one["uri"] for one in made["sets"].values()}) == len(made["sets"])


def test_the_proposed_configuration_loads(tmp_path: Path) -> None:
    """Without the key `catalogue`, which is the configuration's to resolve."""
    made = yaml.safe_load(catalogue.config_lines(catalogue.entry("dcface")))
    for one in made["sets"].values():
        del one["catalogue"]
    (tmp_path / "audit.yaml").write_text(yaml.safe_dump({"out": str(tmp_path / "run"), **made}))
    config = load_config(str(tmp_path / "audit.yaml"))
    assert config.sets.release.format == "recordio" and config.faces.mode == "detect"


def test_every_shipped_model_says_which_sets_it_was_trained_on() -> None:
    listed = catalogue._embedders()
    assert set(listed) == set(known_models())
    for one in listed.values():
        assert isinstance(one, EmbedderFaces) and one.sets
