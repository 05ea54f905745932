"""What the terminal shows of the catalogue."""

from pathlib import Path

import pytest
import yaml

from pipeline import catalogue

ENTRIES = catalogue.entries()


def test_the_table_lists_all_entries_in_columns() -> None:
    head, rule, *lines = catalogue.table().splitlines()
    assert head.split()[0] == "name" and set(rule) == {"-", " "}
    assert [line.split()[0] for line in lines if line] == [one.name for one in ENTRIES]
    assert lines.count("") == 1  # between releases and real sets
    assert all(line == line.rstrip() for line in lines)
    (dcface,) = [line for line in lines if line.startswith("dcface ")]
    assert dcface.split() == ["dcface", "550,000", "10,000", "ffhq,", "casia_webface", "recordio", "2304.07060"]
    (webface600k,) = [line for line in lines if line.startswith("webface600k")]
    assert webface600k.split() == ["webface600k", "?", "~600,000", "webface12m", "?", "2103.04098"]
    (digiface,) = [line for line in lines if line.startswith("digiface_1m")]
    assert "no real face" in digiface


@pytest.mark.parametrize("one", ENTRIES, ids=lambda one: one.name)
def test_the_text_of_an_entry_gives_every_group_with_its_source(one: catalogue.Entry) -> None:
    shown = catalogue.text(one)
    flat = " ".join(shown.split())
    assert one.title in shown.splitlines()[0]
    groups = [one.paper, *one.sizes, one.form, one.crop, one.people, one.licence, *one.leakage, *one.relations]
    groups += [one.generator, *one.generator.trained_on] if one.generator else []
    for fact in groups:
        assert f"[{fact.certainty}] {fact.source}" in flat
        assert " ".join(fact.note.split()) in flat
    assert shown.count("\n    [") == len(groups)
    long = [line for line in shown.splitlines() if len(line) > 100 and "https://" not in line and "uri:" not in line]
    assert long == []


def test_configuration_of_a_real_set_puts_it_into_the_training_role() -> None:
    made = yaml.safe_load(catalogue.config_lines(catalogue.entry("ms1mv3")))
    assert made == {
        "sets": {
            "training": {"uri": "/path/to/training", "catalogue": "ms1mv3", "format": "recordio", "identity": "auto"}
        },
        "faces": {"mode": "aligned"},
    }


def test_configuration_says_which_part_may_be_the_control_and_what_is_missing() -> None:
    lines = catalogue.config_lines(catalogue.entry("hsface10k")).splitlines()
    (control,) = [line for line in lines if line.startswith("  control:")]
    assert control.endswith("# only people outside the released mask of 50,000")
    assert "# any real set" in catalogue.config_lines(catalogue.entry("digiface_1m"))


def test_the_page_shows_the_table_as_it_is(root: Path) -> None:
    page = (root / "docs" / "catalogue.md").read_text()
    assert catalogue.table() in page, "docs/catalogue.md is out of date: put the output of `unveil catalogue` into it"
