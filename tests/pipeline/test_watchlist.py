from pathlib import Path
from typing import Any

import pytest
import yaml

from operators.errors import ConfigError
from pipeline.watchlist import audit_config, read_watchlist

AUDIT = {"name": "faces", "config": "audit.yaml"}


def written(folder: Path, **given: Any) -> str:
    path = folder / "lists" / "watch.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({"out": "watched", "audits": [AUDIT], **given}))
    return str(path)


def test_paths_are_relative_to_the_watchlist_and_defaults_are_filled_in(tmp_path: Path) -> None:
    made = read_watchlist(written(tmp_path))
    base = tmp_path / "lists"
    assert (made.out, made.store) == (str(base / "watched"), str(base / "watched" / "store"))
    assert made.audits[0].config == str(base / "audit.yaml")
    assert (made.every, made.when, made.rehash_days, bool(made.notify)) == ("1d", "changed", 7.0, False)
    assert read_watchlist(written(tmp_path, store="s3://bucket/x")).store == "s3://bucket/x"


def test_values_change_by_key_and_those_of_an_audit_by_its_name(tmp_path: Path) -> None:
    overrides = ["every=0", "audits.faces.limit=3", "audits.faces.notify.command=[tell, me]", "notify.retries=1"]
    made = read_watchlist(written(tmp_path, audits=[AUDIT, {**AUDIT, "name": "other"}]), overrides)
    assert made.every == "0" and made.notify.retries == 1
    assert made.audits[0].limit == 3 and made.audits[0].notify is not None
    assert made.audits[0].notify.command == ["tell", "me"] and made.audits[1].limit is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"evry": "1d"}, r"unknown key 'evry'\. Did you mean every\?"),
        ({"xyz": 1}, r"unknown key 'xyz'\. Known here: out, audits, store"),
        ({"audits": [{**AUDIT, "cofig": "x"}]}, r"unknown key 'audits\[0\]\.cofig'\. Did you mean audits\[0\]\.config"),
        ({"notify": {"web_hook": "x"}}, r"unknown key 'notify\.web_hook'\. Did you mean notify\.webhook"),
        ({"audits": [{"name": "a"}]}, r"audits\[0\]\.config is missing"),
        ({"audits": []}, "audits must name at least one"),
        ({"audits": [AUDIT, AUDIT]}, "audits must have different names. Got 'faces' twice"),
        ({"audits": [{**AUDIT, "name": "../up"}]}, r"audits\[0\]\.name must be letters"),
        ({"audits": [{**AUDIT, "name": "store"}]}, "must not be called like a folder"),
        ({"audits": [{**AUDIT, "overrides": ["out=x"]}]}, r"audits\[0\]\.overrides must leave out alone"),
        ({"audits": [{**AUDIT, "limit": -1}]}, r"audits\[0\]\.limit must not be negative"),
        ({"audits": [{**AUDIT, "limit": True}]}, r"audits\[0\]\.limit must be a whole number. Got True"),
        ({"audits": {"name": "a"}}, "audits must be a list"),
        ({"audits": ["a"]}, r"audits\[0\] must hold `key: value` lines"),
        ({"every": "daily"}, "every must be a number of min, h, d, w"),
        ({"when": "never"}, "when must be changed or always"),
        ({"rehash_days": "long"}, "rehash_days must be a number"),
        ({"rehash_days": -1}, "rehash_days must not be negative"),
        ({"out": "s3://x/y"}, "out must be a folder on this machine"),
        ({"notify": {"webhook": "http://example.org"}}, "notify.webhook must begin with https"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_watchlist(written(tmp_path, **given))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("every", "written key=value"),
        ("audits.nobody.limit=1", "has no 'nobody'"),
        ("audits.limit=1", "name an audit"),
        ("every=[", "not a valid value"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_watchlist(written(tmp_path), [override])


@pytest.mark.parametrize(("text", "told"), [("- a", "must hold `key: value`"), ("a: [", "not valid YAML")])
def test_a_file_that_is_no_watchlist_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_watchlist(str(path))
    with pytest.raises(ConfigError, match="no such watchlist"):
        read_watchlist(str(tmp_path / "gone.yaml"))


def test_the_audit_gets_folder_store_and_limit_of_the_watch(tmp_path: Path, root: Path) -> None:
    path = Path(written(tmp_path, rehash_days=3))
    sets = {role: {"uri": f"/{role}"} for role in ("release", "training")}
    (path.parent / "audit.yaml").write_text(yaml.safe_dump({"out": "elsewhere", "sets": sets}))
    watch = read_watchlist(str(path), ["audits.faces.limit=2", "audits.faces.overrides=[title=Nightly]"])
    made = audit_config(watch, watch.audits[0])
    assert made.out == str(path.parent / "watched" / "faces") and made.store == watch.store
    assert (made.assess.limit, made.title, made.scan.rehash_days) == (2, "Nightly", 3.0)


def test_the_example_is_valid(root: Path) -> None:
    example = read_watchlist(str(root / "configs" / "watch" / "demo.yaml"))
    assert audit_config(example, example.audits[0]).title == "Demo audit"
