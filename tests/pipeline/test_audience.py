"""The public report: nothing in it names an image, a person or a place, whatever their names are."""

import hmac
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.errors import ConfigError
from operators.tables import FINDINGS, PAIR_EVIDENCE, REJECTS, UNITS
from operators.vectors import normalise
from pipeline.assess import assess
from pipeline.audience import (
    IDS,
    KEY,
    Names,
    name_of,
    public_findings,
    public_manifest,
    public_rejects,
    public_summary,
    run_key,
)
from pipeline.report import ReportConfig, report
from pipeline.search import search
from pipeline.stage import Run
from pipeline.summary_schema import summary_schema

WIDTH = 128
SIZES = {"release": 60, "training": 60, "control": 60, "anchor": 60}
OPTIONS = (
    "assess.controlled=true", "assess.evidence.source=hold_out", "assess.evidence.neutral=true", "assess.fmr=0.01",
    "assess.evidence.alphas=[0.05]", "search.k=10", "report.audience=public", "assess.limit=3",
)  # fmt: skip
HOSTILE = (
    "zqxj{}k/{}.jpg", "=zqxj{}k+{}", "<script>zqxj{}k{}</script>", "zqxj{}k\u202e{}\x1b[31m", "../../zqxj{}k/{}",
    "file:///home/zqxj{}k/{}", "zqxj{}k\u0000{}",
)  # fmt: skip
"""Each holds `zqxj`, by which it is found again in whatever way it was escaped."""


def keys(role: str, count: int) -> tuple[str, ...]:
    return tuple(HOSTILE[at % len(HOSTILE)].format(role, at) for at in range(count))


@pytest.fixture(scope="module")
def world(planted_unit: Callable, planted_sets: Callable):
    """Hostile names of images and people; thirty training people are in the release."""
    rng = np.random.default_rng(3)
    vectors = {role: rng.standard_normal((size, WIDTH)) for role, size in SIZES.items()}
    vectors["release"][:30] = vectors["training"][:30] + 0.3 * rng.standard_normal((30, WIDTH))

    class Labelled(type(planted_unit("x", 0, np.zeros((1, WIDTH), np.float16), np.zeros(1, bool)))):
        @property
        def labels(self) -> list[str]:
            return [f"person {key}" for key in self.keys]

        @property
        def members(self):
            pairs = zip(super().members, self.labels, strict=True)
            return [replace(one, identity=label) for one, label in pairs]

        def table(self) -> pa.Table:
            made = super().table()
            at = made.schema.get_field_index("identity")
            return made.set_column(at, made.schema.field(at), pa.array(self.labels, pa.string()))

    units: dict[str, Any] = {}
    for role, own in vectors.items():
        stored, failed = normalise(own)[0], np.zeros(len(own), bool)
        failed[-2:] = True
        named = keys(role, len(own))
        units[role] = tuple(
            Labelled(keys=named[a:b], vectors=stored[a:b], failed=failed[a:b]) for a, b in pairwise((0, 20, len(own)))
        )
    return planted_sets(units)


@pytest.fixture(scope="module")
def published(session: None, world, committed: Callable[..., Run]) -> Run:
    """A run with names in every text that it keeps, reported for the public."""
    run = committed(world, *OPTIONS)
    search(run)
    assess(run)
    key = run.commit("assess", "candidates").key
    rejects = [
        {"set": role, "key": one, "digest": "zqxjdigest", "status": "no_face", "error": f"no face in /home/zqxj/{one}"}
        for role in SIZES
        for one in keys(role, 60)[-2:]
    ]
    run.save("assess", "rejects", REJECTS, REJECTS.from_rows(rejects), key=key)
    pixels = run.table("assess", "pair_evidence", PAIR_EVIDENCE).to_pylist()
    pixels[0] |= {"blend_partner_key": keys("training", 2)[1], "ncc": 0.98765, "second_z": 3.2567}
    run.save("assess", "pair_evidence", PAIR_EVIDENCE, PAIR_EVIDENCE.from_rows(pixels), key=key)
    summary = json.loads((run.folder / "summary.json").read_bytes())
    summary["title"] = "Audit of /home/zqxj/faces"
    summary["warnings"] = ["a model at /home/zqxj/model.onnx"]
    for one in summary["sets"].values():
        one |= {
            "notes": ["listed zqxjnote.jpg twice"],
            "unlisted": {".zqxjsuffix": 2, ".txt": 1},
            "uri": "s3://zqxj/set",
        }
    summary["zqxjunknown"] = "zqxj"
    (run.folder / "summary.json").write_text(json.dumps(summary))
    run.ledger.record["zqxjunknown"] = {"zqxj": "zqxj"}
    run.ledger.record["config"]["assess"]["zqxj"] = "zqxj"
    report(run)
    return run


def texts(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of a folder, Parquet also as the text that is in it."""
    for root, _, names in os.walk(folder):
        for name in names:
            data = (Path(root) / name).read_bytes()
            yield f"{root}/{name}", data
            if name.endswith(".parquet"):
                table = pq.read_table(io.BytesIO(data))
                yield f"{root}/{name}", repr((table.to_pylist(), table.schema.metadata)).encode()


def test_no_name_and_no_place_is_in_any_byte_of_the_public_folder(published: Run) -> None:
    folder = published.folder / "public"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    figures = {
        f"figures/{name}.{kind}" for name in ("scores", "best-match", "exceedance", "roc") for kind in ("svg", "png")
    }
    assert found == {"report.html", "findings.csv", "findings.parquet", "summary.json", *figures}
    places = [str(published.folder), str(published.folder.parent), str(Path.home()), os.path.expanduser("~/.config")]
    for path, data in texts(folder):
        assert b"zqxj" not in data, path
        assert b"data:image" not in data, path
        assert not [place for place in places if len(place) > 5 and place.encode() in data], path
    private = (published.folder / "report.html").read_text()
    assert "zqxjtrainingk" in private and "zqxjnote" in private and "zqxjreleasek" in private


def test_the_public_summary_follows_the_schema_and_so_does_the_private_one(published: Run) -> None:
    check = jsonschema.Draft202012Validator(summary_schema())
    public = json.loads((published.folder / "public" / "summary.json").read_bytes())
    assert public["evidence"]["claim"] and public["evidence"]["listed"] > 20 and public["audience"] == "public"
    assert [one.message for one in check.iter_errors(public)] == []
    private = json.loads((published.folder / "summary.json").read_bytes())
    assert [one.validator for one in check.iter_errors(private)] == ["additionalProperties"], "what this test added"


def test_every_kept_name_is_found_again_and_is_its_keyed_hash(published: Run) -> None:
    findings = published.table("assess", "findings", FINDINGS).to_pylist()
    public = pq.read_table(published.folder / "public" / "findings.parquet").to_pylist()
    ids = {row["id"]: row for row in pq.read_table(published.folder / IDS).to_pylist()}
    key = (published.folder / KEY).read_bytes()
    assert len(findings) == len(public) >= 25
    for real, shown in zip(findings, public, strict=True):
        for column in ("training_identity", "training_key", "release_identity", "release_key"):
            role, what = column.split("_")
            kind = "image" if what == "key" else "identity"
            assert ids[shown[column]] == {"id": shown[column], "set": role, "kind": kind, "name": real[column]}
            by_hand = hmac.new(key, f"{kind}\0{role}\0{real[column]}".encode(), "sha256").hexdigest()[:32]
            assert shown[column] == by_hand
        assert shown["cosine"] == round(real["cosine"], 2) and shown["tier"] == real["tier"]
    page = (published.folder / "public" / "report.html").read_text()
    assert public[0]["training_identity"] in page and public[0]["release_identity"] in page
    csv = (published.folder / "public" / "findings.csv").read_text()
    assert [row["training_key"] for row in public if row["training_key"] not in csv] == []


def test_what_is_not_public_is_the_owners_alone(published: Run) -> None:
    for path in [published.folder / KEY, published.folder / IDS, *(published.folder / "public").rglob("*")]:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    for _, data in texts(published.folder / "public"):
        key = (published.folder / KEY).read_bytes()
        assert key not in data and key.hex().encode() not in data


def test_ids_last_as_long_as_the_key_and_another_run_has_others(published: Run) -> None:
    before = (published.folder / "public" / "findings.csv").read_bytes()
    report(published)
    assert (published.folder / "public" / "findings.csv").read_bytes() == before
    kept = (published.folder / KEY).read_bytes()
    (published.folder / KEY).unlink()
    report(published)
    assert (published.folder / "public" / "findings.csv").read_bytes() != before
    (published.folder / KEY).write_bytes(kept)


def test_scores_of_the_public_figures_are_rounded(published: Run) -> None:
    """The exceedance curve has a corner for every best match: in the private one at 60 places, here at fewer."""
    corners = [
        (published.folder / place / "figures" / "exceedance.svg").read_text().count("\nL ") for place in ("", "public")
    ]
    assert corners[1] < corners[0] * 0.8


def test_equal_names_of_two_sets_or_kinds_have_different_ids() -> None:
    key = bytes(range(32))
    made = [name_of(key, "a", role, kind) for role in ("training", "release") for kind in ("image", "identity")]
    assert len(set(made)) == 4 and all(len(one) == 32 for one in made)
    assert name_of(key, "a", "training", "image") == made[0] != name_of(bytes(32), "a", "training", "image")
    assert name_of(key, "\udcff", "training", "image") != name_of(key, "\xff", "training", "image")


def test_a_key_is_made_once_and_refused_where_others_could_have_read_it(tmp_path: Path) -> None:
    made = run_key(tmp_path)
    assert len(made) == 32 and run_key(tmp_path) == made != run_key_of(tmp_path / "other")
    assert stat.S_IMODE((tmp_path / KEY).stat().st_mode) == 0o600
    (tmp_path / KEY).chmod(0o640)
    with pytest.raises(ConfigError, match="nobody else may read"):
        run_key(tmp_path)
    (tmp_path / KEY).chmod(0o600)
    (tmp_path / KEY).write_bytes(b"short")
    with pytest.raises(ConfigError, match="32 bytes"):
        run_key(tmp_path)
    (tmp_path / KEY).unlink()
    (tmp_path / KEY).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be read"):
        run_key(tmp_path)


def run_key_of(folder: Path) -> bytes:
    folder.mkdir()
    return run_key(folder)


def test_measurements_of_one_pair_are_left_out() -> None:
    row = {"training_identity": None, "training_key": "k", "cosine": 0.98765, "hub": "sharpness 12.345 is below 20"}
    row |= {"reasons": "correlation 0.98765", "p": 0.0123456, "q": 0.5, "anchor_cosine": None, "rank": 1}
    (made,) = public_findings(FINDINGS.from_rows([row]), Names(bytes(32))).to_pylist()
    assert (made["cosine"], made["p"], made["q"], made["reasons"]) == (0.99, 0.012, 0.5, None)
    assert made["training_identity"] is None and made["anchor_cosine"] is None and "12" not in made["hub"]


def test_rejects_are_not_in_the_order_of_their_names_and_have_no_digests() -> None:
    rows = [
        {"set": "training", "key": f"{at:03d}", "digest": "d", "status": "no_face", "error": "e"} for at in range(50)
    ]
    names = Names(bytes(32))
    made = public_rejects(REJECTS.from_rows(rows), names).to_pylist()
    assert [row["key"] for row in made] == sorted(row["key"] for row in made)
    assert {(row["digest"], row["error"], row["status"]) for row in made} == {(None, None, "no_face")}
    back = {row["id"]: row["name"] for row in names.table().to_pylist()}
    assert sorted(back[row["key"]] for row in made) == [row["key"] for row in rows]


def test_text_that_is_not_utf8_is_hashed_and_kept() -> None:
    names = Names(bytes(32))
    made = names("\udcff.jpg", "release", "image")
    (name,) = names.table()["name"].cast(pa.binary()).to_pylist()
    assert name == b"\xff.jpg" and made == name_of(bytes(32), "\udcff.jpg", "release", "image")
    assert Names(bytes(32)).table().num_rows == 0


def test_names_of_small_groups_are_numbers() -> None:
    rates = [{"group": "Jane Doe", "members": 1, "controls": 30}, {"group": "adults", "members": 30, "controls": 30}]
    summary = {"title": "x", "sets": {}, "arms": {}, "evidence": {"grade": "A", "groups": {"rates": rates}}}
    made = public_summary(summary)
    assert [one["group"] for one in made["evidence"]["groups"]["rates"]] == ["group 1", "adults"]
    assert summary["evidence"]["groups"]["rates"][0]["group"] == "Jane Doe"


def test_bars_which_are_scores_of_single_people_are_rounded() -> None:
    evidence = {"grade": "A", "excess": [{"threshold": 0.1269716, "p": 1e-9}], "operating": [{"threshold": None}]}
    made = public_summary({"title": "x", "sets": {}, "arms": {}, "evidence": evidence})["evidence"]
    assert made["excess"] == [{"threshold": 0.13, "p": 1e-9}] and made["operating"] == [{"threshold": None}]


def test_a_manifest_of_any_version_is_cut_to_what_is_known() -> None:
    assert not any(public_manifest({})["config"].values()) and public_manifest({})["stages"] == {"search": {}}
    made = public_manifest({"unveil": "1", "config": {"out": "/x", "sets": {"a": 1}, "search": {"k": 3, "new": "/x"}}})
    assert made["unveil"] == "1" and made["config"]["search"] == {"k": 3} and "/x" not in json.dumps(made)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"audience": "friends"}, "^audience"), ({"audience": "public", "faces": "clear"}, "^faces.*public")],
)
def test_what_cannot_be_published_is_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ReportConfig(**options)


def test_real_labels_of_people_are_not_in_the_public_folder(audited: Path) -> None:
    """Made-up faces in folders by person: all keys and labels of all sets, as the tables of the sets have them."""
    from pipeline.audit import audit
    from pipeline.config import load

    audit(load(str(audited), ["report.audience=public"]), "report")
    names = set()
    with Run(load(str(audited))) as run:
        for role in run.config.sets.given():
            members = pa.Table.from_struct_array(run.table("scan", role, UNITS)["members"].combine_chunks().flatten())
            names |= {name for column in ("key", "identity") for name in members[column].to_pylist() if name}
    assert len(names) > 100
    for path, data in texts(audited.parent / "run" / "public"):
        text = data.decode("utf-8", "replace")
        assert not [name for name in names if name in text], path
        assert str(audited.parent) not in text and "corpus" not in text
