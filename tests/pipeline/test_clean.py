"""The release without its findings: policies against plain sets, files read back, the audit of what stays."""

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.faults import IncompleteTable, StorageError
from operators.errors import ConfigError
from operators.formats import SetConfig, listed, reader
from operators.formats.listing import name_fault
from operators.leakage import findings
from operators.records import embeddings
from operators.tables import CANDIDATES, CLOSEST, FINDINGS, IMAGE_UNITS, PEOPLE, REJECTS, UNITS
from operators.vectors import normalise
from pipeline.assess import assess, assess_key
from pipeline.calibrate import set_columns
from pipeline.clean import CleanConfig, clean, reaudit
from pipeline.clean_images import Images, by_image, near_images
from pipeline.clean_names import Names, class_numbers
from pipeline.clean_policy import Links, Near, Release, Step, removal
from pipeline.clean_record import clean_lines, cleaned
from pipeline.clean_sinks import record_parts
from pipeline.config import load
from pipeline.coverage import COVERAGE, coverage_key
from pipeline.embed import closing_key, unit_store
from pipeline.merge import parts
from pipeline.scan import scan_sets
from pipeline.search import comparisons, results, search
from pipeline.stage import Run

MAGIC = b"\x0a\x23\xd7\xce"


# ---- policies against plain Python sets


def plainly(identities, contents, audited, edges, selected, near, policy, unaudited):
    """The rows that go, by plain set operations."""

    def same(values, gone):
        return {row for row, value in enumerate(values) if value >= 0 and value in {values[one] for one in gone}}

    gone = {row for (row, _), chosen in zip(edges, selected, strict=True) if chosen}
    gone |= same(contents, gone)
    if policy == "identity":
        gone |= same(identities, gone)
        gone |= same(contents, gone)
    while policy == "cluster":
        people = {person for row, person in edges if row in gone}
        more = gone | {row for row, person in edges if person in people} | same(contents, gone)
        more |= {b for a, b in near if a in gone} | {a for a, b in near if b in gone}
        if more == gone:
            break
        gone = more
    return gone | {row for row, seen in enumerate(audited) if not seen and unaudited == "remove"}


@pytest.mark.parametrize("policy", ["image", "identity", "cluster"])
@pytest.mark.parametrize("unaudited", ["keep", "remove"])
def test_what_goes_is_what_plain_sets_say(policy: str, unaudited: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(150):
        rows = int(rng.integers(1, 25))
        identities, contents = rng.integers(-1, 8, rows), rng.integers(-1, 20, rows)
        audited = rng.random(rows) < 0.8
        edges = sorted({(int(rng.integers(rows)), int(rng.integers(6))) for _ in range(int(rng.integers(0, 12)))})
        rng.shuffle(edges)
        selected = rng.random(len(edges)) < 0.5
        near = [tuple(rng.integers(0, rows, 2).tolist()) for _ in range(int(rng.integers(0, 6)))]
        pairs = np.array(edges, np.int64).reshape(-1, 2)
        ends = np.array(near, np.int64).reshape(-1, 2)
        release = Release(identity_N=identities, content_N=contents, audited_N=audited)
        links = Links(pairs[:, 0], pairs[:, 1], selected)
        made = removal(release, links, Near(ends[:, 0], ends[:, 1]), policy, unaudited)
        expected = plainly(identities.tolist(), contents.tolist(), audited, edges, selected, near, policy, unaudited)
        assert set(np.flatnonzero(made.step_N != Step.KEPT).tolist()) == expected
        for row in expected:
            step, link, cause = made.step_N[row], made.link_N[row], made.cause_N[row]
            if step == Step.NOT_AUDITED:
                assert (link, cause) == (-1, -1)
                continue
            assert selected[link]
            assert edges[link][0] == row if cause < 0 else cause in expected
            if step == Step.LINK:
                assert link == next(at for at, (one, _) in enumerate(edges) if one == row and selected[at])


def test_cluster_without_a_search_within_the_release_has_no_near_copies() -> None:
    release = Release(identity_N=np.array([-1] * 3), content_N=np.array([0, 1, 2]), audited_N=np.ones(3, bool))
    links = Links(np.array([0, 1]), np.array([5, 5]), np.array([True, False]))
    assert removal(release, links, None, "cluster", "keep").step_N.tolist() == [Step.LINK, Step.CLUSTER, Step.KEPT]


def test_an_image_goes_if_any_of_its_faces_does() -> None:
    """Of images with one to three faces, against plain sets and loops over faces."""
    rng = np.random.default_rng(11)
    for _ in range(150):
        counts = rng.integers(1, 4, int(rng.integers(1, 12)))
        image_N = np.repeat(np.arange(len(counts)), counts)
        face_N = np.concatenate([np.arange(1, count + 1) for count in counts])
        edges = [(int(rng.integers(len(image_N))), int(rng.integers(5))) for _ in range(int(rng.integers(0, 14)))]
        edges = list(dict.fromkeys(edges))
        persons = rng.random(5) < 0.5
        chosen = np.array([persons[person] for _, person in edges], bool)
        pairs = np.array(edges, np.int64).reshape(-1, 2)
        close = rng.integers(0, len(image_N), (int(rng.integers(0, 6)), 2))
        images = Images(pa.table({"key": image_N[face_N == 1]}), pa.chunked_array([image_N]), image_N, face_N)
        found = pa.table({"release_row": pairs[:, 0], "person": pairs[:, 1]})
        leading = by_image(images, found, chosen)
        told = [(image_N[face], person, face_N[face], one) for (face, person), one in zip(edges, chosen, strict=True)]
        first = {}  # the strongest link of an image and a person
        for image, person, face, one in told:
            first.setdefault((image, person), (face, one))
        columns = [leading.found[name].to_pylist() for name in ("release_row", "person", "face")]
        assert [*zip(*columns, leading.selected_L, strict=True)] == [(*pair, *own) for pair, own in first.items()]
        leads = {face for (face, _), one in zip(edges, chosen, strict=True) if one}
        assert leading.faces_N.tolist() == [sum(image_N[face] == at for face in leads) for at in range(len(counts))]
        near = near_images(images, Near(close[:, 0], close[:, 1]))
        assert [*zip(near.left_P, near.right_P, strict=True)] == [
            (image_N[a], image_N[b]) for a, b in close if image_N[a] != image_N[b]
        ]


# ---- a finished audit by hand: files that are no images, embeddings that nobody computed, no Ray

FILES = {
    "release": {
        "ann/1.jpg": b"\xff\xd8\xff ann one", "ann/2.jpg": b"\xff\xd8\xff ann two", "ann/3.jpg": b"\xff\xd8\xffno face",
        "bob/1.a.jpg": b"\xff\xd8\xff bob one" + MAGIC * 3, "bob/1.b.jpg": MAGIC + b"bob two" + MAGIC + b"xyz" + MAGIC,
        "bob/3.jpg": b"\xff\xd8\xff ann two", "=cmd,\"x\".jpg": b"\x89PNG\r\n\x1a\n top", "dee/NA.jpg": b"BM dee",
    },
    "training": {f"p{at}/{at}.jpg": b"real %d" % at for at in range(5)},
}  # fmt: skip
KEYS = {role: sorted(own) for role, own in FILES.items()}
UNSEEN = "ann/3.jpg"
PAIRS = [("ann/1.jpg", "p0/0.jpg", 0.95), ("bob/1.a.jpg", "p0/0.jpg", 0.9), ("ann/2.jpg", "p1/1.jpg", 0.8)]
BEST = [*PAIRS, ("dee/NA.jpg", "p3/3.jpg", 0.4)]
FACES_OF = {"ann/1.jpg": 2, "bob/1.b.jpg": 3}
"""With `faces.several=all`."""
OF_FACES = [("ann/1.jpg", "p0/0.jpg", 0.95), ("bob/1.b.jpg#3", "p0/0.jpg", 0.92), ("bob/1.b.jpg#2", "p1/1.jpg", 0.9)]
OF_FACES += [("ann/1.jpg#2", "p0/0.jpg", 0.85)]
Q = {"p0": 0.01, "p1": 0.2, "p3": 0.04}


def identity_of(key: str) -> str | None:
    return key.rpartition("/")[0] or None


def audit_by_hand(folder: Path, root: Path, *, claim: bool | None, overrides: tuple[str, ...] = ()) -> Run:
    """A finished audit: candidates as in PAIRS, or OF_FACES with `faces.several=all`; with a `claim` people p0, p1 and
    p3 with the q-values of Q.
    """
    for role, files in FILES.items():
        for key, data in files.items():
            path = folder / role / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    values = {
        "out": str(folder / "run"),
        "sets": {role: {"uri": str(folder / role), "format": "folder"} for role in FILES},
        "embedder": {"path": str(root / "models" / "sface_2021dec.onnx")},
    }
    (folder / "audit.yaml").write_text(yaml.safe_dump(values))
    run = Run(load(str(folder / "audit.yaml"), overrides))
    run.__enter__()
    scan_sets(run, list(FILES))
    rng = np.random.default_rng(1)
    for role in FILES:
        units = run.table("scan", role, UNITS)
        for unit in units.to_pylist():
            embed_by_hand(run, unit, rng)
        seen = sum(key != UNSEEN for key in KEYS[role])
        run.save("embed", role, REJECTS, REJECTS.from_rows([]), key=closing_key(run, units), status={"ok": seen})
    (comparison,) = comparisons(run, 0.5)
    key = coverage_key(run, parts(run, comparison))
    run.save("search", "coverage", COVERAGE, COVERAGE.from_rows([]), key=key, floor=0.5)
    assess_by_hand(run, claim)
    return run


def embed_by_hand(run: Run, unit: dict, rng: np.random.Generator) -> None:
    rows = []
    several = FACES_OF if run.config.faces.several == "all" else {}
    members = [
        member | {"key": f"{member['key']}#{face}" if face > 1 else member["key"]}
        for member in unit["members"]
        for face in range(1, several.get(member["key"], 1) + 1)
    ]
    for member in members:
        status = "no_face" if member["key"] == UNSEEN else "ok"
        vector = normalise(rng.standard_normal((1, 128)))[0][0] if status == "ok" else None
        rows.append(
            {name: member[name] for name in ("key", "identity", "digest")} | {"status": status, "vector": vector}
        )
    contract = embeddings(128)
    facts = {"status": {"ok": sum(row["status"] == "ok" for row in rows)}, "device": "test"}
    facts["faces"] = {str(at): several[one["key"]] for at, one in enumerate(unit["members"]) if one["key"] in several}
    unit_store(run).commit(unit["unit"], contract.from_rows(rows), contract=contract.contract, key="-", facts=facts)


def assess_by_hand(run: Run, claim: bool | None) -> None:
    key = assess_key(run, 0.7)
    rows = [
        {"rank": rank, "arm": "training", "release_key": left, "release_identity": identity_of(left),
         "gallery_key": right, "gallery_identity": identity_of(right), "cosine": cosine, "same_bytes": False}
        for rank, (left, right, cosine) in enumerate(OF_FACES if run.config.faces.several == "all" else PAIRS, 1)
    ]  # fmt: skip
    candidates = CANDIDATES.from_rows(rows)
    run.save("assess", "candidates", CANDIDATES, candidates, key=key)
    found = findings(candidates)
    evidence = None
    if claim is not None:
        evidence = {"claim": claim, "grade": "A" if claim else "C", "q": 0.05, "listed": 2, "excess": []}
        units = [{"arm": "training", "unit": at} for at in range(5)]
        run.save("assess", "image_units", IMAGE_UNITS, IMAGE_UNITS.from_rows(units), key=key)
        people = [
            {"unit": int(right[1]), "arm": "training", "identity": identity_of(right), "key": right,
             "release_key": left, "cosine": cosine, "q": Q[right[:2]]}
            for left, right, cosine in BEST if (left, right) != ("bob/1.a.jpg", "p0/0.jpg")
        ]  # fmt: skip
        run.save("assess", "people", PEOPLE, PEOPLE.from_rows(people), key=key)
        tiers = {"p0": "same photo", "p1": "same person", "p3": "look-alike"}
        rows = [
            {
                "rank": rank,
                "training_identity": name,
                "training_key": f"{name}/{name[1]}.jpg",
                "q": Q[name],
                "tier": tier,
            }
            for rank, (name, tier) in enumerate(sorted(tiers.items(), key=lambda one: Q[one[0]]), 1)
        ]
        found = FINDINGS.from_rows(rows)
    run.save("assess", "findings", FINDINGS, found, key=key)
    arm = {
        "candidates": 3,
        "persons": 2,
        "release_images": 3,
        "highest": 0.95,
        "comparisons": 35,
        "expected_false": 0.1,
    }
    summary = {"calibration": {"threshold": 0.7}, "arms": {"training": arm}, "findings": 2, "evidence": evidence}
    (run.folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Run:
    return audit_by_hand(tmp_path_factory.mktemp("plain"), root, claim=None)


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Run:
    return audit_by_hand(tmp_path_factory.mktemp("controlled"), root, claim=True)


def done(run: Run, out: Path, **options) -> dict:
    clean(run, CleanConfig(out=str(out), **{"reaudit": False, **options}))
    record = cleaned(out)
    assert record is not None
    return record


def kept(out: Path) -> set[str]:
    return {row["key"] for row in pq.read_table(out / "manifest.parquet").to_pylist() if row["kept"]}


BY_POLICY = [
    ({"findings": "candidates"}, {"ann/1.jpg", "ann/2.jpg", "bob/1.a.jpg", "bob/3.jpg"}),
    ({"findings": "candidates", "unaudited": "remove"}, {"ann/1.jpg", "ann/2.jpg", "bob/1.a.jpg", "bob/3.jpg", UNSEEN}),
    (
        {"findings": "candidates", "policy": "identity"},
        {"ann/1.jpg", "ann/2.jpg", "ann/3.jpg", "bob/1.a.jpg", "bob/1.b.jpg", "bob/3.jpg"},
    ),
]


@pytest.mark.parametrize(("options", "gone"), BY_POLICY)
def test_candidates_of_a_plain_audit_go(plain: Run, tmp_path: Path, options: dict, gone: set[str]) -> None:
    record = done(plain, tmp_path / "out", **options)
    assert kept(tmp_path / "out") == set(KEYS["release"]) - gone
    assert record["removed"]["images"] == len(gone)
    assert (record["before"]["images"], record["before"]["audited"], record["before"]["identities"]) == (8, 7, 3)
    assert record["after"]["images"] == 8 - len(gone)
    assert record["removed"]["training_persons"] == 2
    assert "look-alikes and chance pairs" in record["notes"][0]


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({}, {"ann/1.jpg", "bob/1.a.jpg", "dee/NA.jpg"}),  # p3 is listed by a best match below the threshold
        ({"q": 0.02}, {"ann/1.jpg", "bob/1.a.jpg"}),
        ({"q": 0.3}, {"ann/1.jpg", "bob/1.a.jpg", "dee/NA.jpg", "ann/2.jpg", "bob/3.jpg"}),
        ({"q": 0.02, "policy": "cluster"}, {"ann/1.jpg", "bob/1.a.jpg"}),
    ],
)
def test_listed_persons_go_by_their_q(controlled: Run, tmp_path: Path, options: dict, gone: set[str]) -> None:
    record = done(controlled, tmp_path / "out", **options)
    assert kept(tmp_path / "out") == set(KEYS["release"]) - gone
    assert any("looser than the list" in note for note in record["notes"]) == (options.get("q") == 0.3)
    assert any("near copies within the release are not available" in n for n in record["notes"]) == (
        "policy" in options
    )
    assert "1 images stay that could not be audited: nothing is known of them" in record["notes"]


def test_removed_images_come_with_finding_cosine_q_and_tier(controlled: Run, tmp_path: Path) -> None:
    done(controlled, tmp_path, policy="identity")
    with (tmp_path / "removed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["path"], row["finding"], row["cosine"], row["q"], row["tier"], row["because_of"]) for row in rows] == [
        ("ann/1.jpg", "1", "0.95", "0.01", "same photo", ""),
        ("ann/2.jpg", "1", "0.95", "0.01", "same photo", "ann/1.jpg"),
        ("ann/3.jpg", "1", "0.95", "0.01", "same photo", "ann/1.jpg"),
        ("bob/1.a.jpg", "1", "0.9", "0.01", "same photo", ""),
        ("bob/1.b.jpg", "1", "0.9", "0.01", "same photo", "bob/1.a.jpg"),
        ("bob/3.jpg", "1", "0.9", "0.01", "same photo", "bob/1.a.jpg"),
        ("dee/NA.jpg", "2", "0.4", "0.04", "look-alike", ""),
    ]
    assert [row["why"] for row in rows if not row["because_of"]] == ["close to a training person of a finding"] * 3


def test_an_audit_of_faces_takes_out_images_and_says_how_many_faces_led_to_it(root: Path, tmp_path: Path) -> None:
    run = audit_by_hand(tmp_path, root, claim=None, overrides=("faces.several=all",))
    record = done(run, tmp_path / "out", findings="candidates", write="folder")
    gone = {"ann/1.jpg", "bob/1.b.jpg"}
    stays = pq.read_table(tmp_path / "out/manifest.parquet").to_pylist()
    assert [row["key"] for row in stays] == KEYS["release"]
    assert kept(tmp_path / "out") == set(KEYS["release"]) - gone
    assert (record["before"]["images"], record["before"]["audited"], record["after"]["images"]) == (8, 7, 6)
    assert (record["removed"]["images"], record["removed"]["faces"], record["removed"]["training_persons"]) == (2, 4, 2)
    assert ("", "4 faces in these images led to it") in clean_lines(record)
    with (tmp_path / "out/removed.csv").open(newline="") as file:
        rows = [(row["path"], row["faces"], row["face"], row["cosine"]) for row in csv.DictReader(file)]
    assert rows == [("ann/1.jpg", "2", "1", "0.95"), ("bob/1.b.jpg", "2", "3", "0.92")]
    written = {str(path.relative_to(tmp_path / "out/release")) for path in (tmp_path / "out/release").rglob("*.*")}
    assert record["written"]["images"] == 6 and len(written) == 6 and not written & gone
    options = SetConfig(uri=str(tmp_path / "release"), list_file=str(tmp_path / "out/manifest.csv"))
    assert {entry.key for entry in listed(options)[1].entries} == set(KEYS["release"]) - gone
    record = done(run, tmp_path / "by identity", findings="candidates", policy="identity", unaudited="remove")
    assert kept(tmp_path / "by identity") == {'=cmd,"x".jpg', "dee/NA.jpg"}
    assert record["removed"]["faces"] == 4


def test_an_audit_of_single_faces_speaks_of_no_faces(plain: Run, tmp_path: Path) -> None:
    record = done(plain, tmp_path, findings="candidates")
    assert "faces" not in record["removed"] and not [text for _, text in clean_lines(record) if "face" in text]


def test_spreadsheets_get_no_formula_and_machines_the_names_as_they_are(plain: Run, tmp_path: Path) -> None:
    hostile = '=cmd,"x".jpg'
    done(plain, tmp_path, findings="candidates", unaudited="remove")
    options = SetConfig(uri=plain.config.sets.release.uri, list_file=str(tmp_path / "manifest.csv"))
    _, listing = listed(options)
    assert {entry.key for entry in listing.entries} == kept(tmp_path) == {hostile, "bob/1.b.jpg", "dee/NA.jpg"}
    assert {entry.key: entry.identity for entry in listing.entries} == {key: identity_of(key) for key in kept(tmp_path)}
    assert not [entry for entry in listing.entries if entry.error]


def test_results_are_private(plain: Run, tmp_path: Path) -> None:
    done(plain, tmp_path / "new" / "out", findings="candidates", write="folder")
    paths = list((tmp_path / "new").rglob("*"))
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o700}


# ---- images written anew


@pytest.mark.parametrize("form", ["folder", "webdataset", "recordio"])
def test_images_written_anew_are_read_back_by_our_readers(plain: Run, tmp_path: Path, form: str) -> None:
    record = done(plain, tmp_path, findings="candidates", unaudited="keep", write=form, shard_images=2)
    stay = kept(tmp_path)
    assert (record["written"]["images"], record["written"]["not_written"]) == (len(stay), {}) == (4, {})
    with (tmp_path / "written.csv").open(newline="") as file:
        key_of = {row["path"]: row["key"] for row in csv.DictReader(file)}
    found, listing = listed(SetConfig(uri=str(tmp_path / "release"), list_file=str(tmp_path / "written.csv")))
    assert found == form
    assert not listing.notes
    with reader(form, str(tmp_path / "release")) as opened:
        for entry in listing.entries:
            assert entry.error is None
            with opened.open(entry.place or entry.key) as stream:
                assert stream.read() == FILES["release"][key_of[entry.key]]
    assert {key_of[entry.key]: entry.identity for entry in listing.entries if identity_of(key_of[entry.key])} == {
        key: identity_of(key) for key in stay if identity_of(key)
    }
    assert not list(tmp_path.glob(".aside*"))


def test_shards_are_read_by_the_webdataset_library(plain: Run, tmp_path: Path) -> None:
    library = pytest.importorskip("webdataset")
    done(plain, tmp_path, findings="candidates", unaudited="remove", write="webdataset", shard_images=2)
    shards = sorted(map(str, (tmp_path / "release").glob("*.tar")))
    assert len(shards) == 2
    samples = []
    for shard in shards:
        with open(shard, "rb") as stream:
            members = library.tariterators.tar_file_expander([{"url": shard, "stream": stream}])
            samples += list(library.tariterators.group_by_keys(members))
    decoder = library.autodecode.Decoder([])
    told = [decoder({name: one[name] for name in ("__key__", "json", "cls") if name in one}) for one in samples]
    assert {one["json"]["identity"]: one.get("cls") for one in told} == {None: None, "bob": 0, "dee": 1}
    images = {one["json"]["key"]: sample["jpg"] for one, sample in zip(told, samples, strict=True)}
    assert images == {key: FILES["release"][key] for key in kept(tmp_path)}


def test_a_record_is_cut_where_the_magic_stands_at_a_multiple_of_four() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        whole = b"".join(rng.choice([MAGIC, b"a", b"bcd", MAGIC[:2]], int(rng.integers(0, 12))).tolist())
        cut = list(record_parts(whole))
        assert MAGIC.join(data for _, data in cut) == whole
        assert not any(data[at : at + 4] == MAGIC for _, data in cut for at in range(0, len(data), 4))
        assert all(len(data) % 4 == 0 for _, data in cut[:-1])
        flags = [flag for flag, _ in cut]
        assert flags == ([0] if len(cut) == 1 else [1, *[2] * (len(cut) - 2), 3])


def test_images_that_changed_or_went_are_told_and_not_copied(root: Path, tmp_path: Path) -> None:
    run = audit_by_hand(tmp_path, root, claim=None)
    (tmp_path / "release/dee/NA.jpg").write_bytes(b"another")
    (tmp_path / "release/bob/1.b.jpg").unlink()
    record = done(run, tmp_path / "out", findings="candidates", write="folder")
    assert record["written"]["images"] == 2
    assert sum(record["written"]["not_written"].values()) == 2
    told = (tmp_path / "out/not_written.csv").read_text()
    assert '"dee/NA.jpg","has changed since it was audited"' in told
    assert '"bob/1.b.jpg","cannot be read' in told
    assert not (tmp_path / "out/release/dee").exists()


def test_nothing_of_others_is_overwritten(plain: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/manifest.csv").write_text("mine")
    with pytest.raises(ConfigError, match="holds other things"):
        done(plain, tmp_path / "mine", findings="candidates")
    assert (tmp_path / "mine/manifest.csv").read_text() == "mine"
    inside = Path(plain.config.sets.release.uri) / "out"
    with pytest.raises(ConfigError, match="lies inside the release set"):
        done(plain, inside, findings="candidates")
    assert not inside.exists()
    out = tmp_path / "out"
    first = done(plain, out, findings="candidates", write="folder")
    before = {path: path.stat().st_mtime_ns for path in (out / "release").rglob("*.jpg")}
    assert done(plain, out, findings="candidates", write="folder")["written"] == first["written"]
    assert done(plain, out, findings="candidates")["written"] == first["written"]
    assert {path: path.stat().st_mtime_ns for path in (out / "release").rglob("*.jpg")} == before
    for other in ({"write": "recordio"}, {"write": "folder", "policy": "identity"}, {"policy": "identity"}):
        with pytest.raises(ConfigError, match="images of another `clean`"):
            done(plain, out, findings="candidates", **other)
    assert cleaned(out) is not None


def test_a_full_disk_leaves_nothing_under_the_final_name(
    plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.clean_sinks.FolderSink.add", full)
    with pytest.raises(StorageError, match="No space left"):
        done(plain, tmp_path / "out", findings="candidates", write="folder")
    assert not (tmp_path / "out/release").exists()
    assert cleaned(tmp_path / "out") is None
    monkeypatch.undo()
    (tmp_path / "out/.aside-release-of-a-killed-run").mkdir()
    assert done(plain, tmp_path / "out", findings="candidates", write="folder")["written"]["images"] == 4
    assert not list((tmp_path / "out").glob(".aside*"))


HOSTILE = [
    "../up.jpg",
    "/abs.jpg",
    "a//b.jpg",
    "~x.jpg",
    "C:x.jpg",
    "new\nline.jpg",
    ".hidden.jpg",
    "",
    "x" * 300 + ".jpg",
]


@pytest.mark.parametrize("dotless", [False, True])
def test_names_are_plain_different_and_have_an_ending(dotless: bool) -> None:
    names = Names(dotless=dotless)
    keys = ["a/b.jpg", "a/b.png", "a", "a.jpg", "a/b.jpg/c.jpg", "no ending", "x.y.jpg", "x_y.jpg", *HOSTILE]
    made = [names(key, hashlib.sha256(key.encode()).hexdigest(), b"\xff\xd8\xff") for key in keys]
    assert len(set(made)) == len(keys)
    assert made[0] == "a/b.jpg"
    assert made[5] == "no ending.jpg"
    assert all(name_fault(name) is None and not Path(name).name.startswith(".") for name in made)
    assert dotless or all(name.startswith("renamed/") for name in made[-len(HOSTILE) :])
    files = set(made)
    assert not [name for name in made if any(name.startswith(f"{other}/") for other in files)]
    if dotless:
        assert all(name.rpartition("/")[2].count(".") == 1 for name in made)
        assert len({name.rpartition(".")[0] for name in made}) == len(made)


def test_labels_are_the_identities_where_those_are_numbers() -> None:
    assert class_numbers(["7", "3", None, "7"]) == {"7": 7, "3": 3}
    assert class_numbers(["07", "3"]) == {"07": 0, "3": 1}
    assert class_numbers(["16777216"]) == {"16777216": 0}
    assert class_numbers([None]) == {}


# ---- what cannot be done is refused


def test_a_list_needs_a_claim(plain: Run, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no control set.*findings=candidates"):
        done(plain, tmp_path / "out")
    without = audit_by_hand(tmp_path / "c", root, claim=False)
    with pytest.raises(ConfigError, match="of grade C and claims no list"):
        done(without, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert done(without, tmp_path / "out", findings="candidates")["removed"]["images"] == 4


def test_an_audit_of_another_search_is_refused(root: Path, tmp_path: Path) -> None:
    run = audit_by_hand(tmp_path, root, claim=None)
    run.save("assess", "candidates", CANDIDATES, run.table("assess", "candidates", CANDIDATES), key="old")
    with pytest.raises(IncompleteTable, match="of another search"):
        done(run, tmp_path / "out", findings="candidates")
    done(audit_by_hand(tmp_path / "b", root, claim=None), tmp_path / "out", findings="candidates")


def test_where_nothing_can_be_audited_again_it_is_said(plain: Run, tmp_path: Path) -> None:
    record = done(plain, tmp_path, findings="candidates")
    assert record["audit_again"] == {"why_not": "clean.reaudit is false"}
    assert ("audit again", "not made: clean.reaudit is false") in clean_lines(record)
    table = pq.read_table(tmp_path / "manifest.parquet")
    for value, why in ((True, "nothing was removed"), (False, "no image that was audited is left")):
        at = table.schema.get_field_index("kept")
        pq.write_table(table.set_column(at, table.schema.field(at), [[value] * 8]), tmp_path / "manifest.parquet")
        assert why in reaudit(plain, CleanConfig(out=str(tmp_path)))["why_not"]
    pq.write_table(table.slice(1), tmp_path / "manifest.parquet")
    with pytest.raises(IncompleteTable, match="of another release"):
        reaudit(plain, CleanConfig(out=str(tmp_path)))


@pytest.mark.parametrize(
    ("option", "value"),
    [("policy", "x"), ("findings", "x"), ("q", 0.0), ("q", 1.0), ("unaudited", "x"), ("near", 0.0), ("near", 1.1),
     ("write", "zip"), ("shard_images", 0)],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{option} .*Got "):
        CleanConfig(**{option: value})


# ---- the audit of what stays, by Ray, against all cosines

OPTIONS = (
    "assess.controlled=true", "assess.evidence.source=hold_out", "assess.evidence.neutral=true", "assess.fmr=0.01",
    "assess.evidence.alphas=[0.05]", "search.k=5", "search.columns=1", "search.within=[release]",
)  # fmt: skip
SIZES = {"release": 90, "training": 60, "control": 60, "anchor": 40}
LEAKED = 30


@pytest.fixture(scope="module")
def world(planted_unit: Callable, planted_sets: Callable):
    """Images 0 to 29 of the training set are in the release; 60 to 64 of the release are near copies of its 0 to 4."""
    rng = np.random.default_rng(3)
    vectors = {role: rng.standard_normal((size, 128)) for role, size in SIZES.items()}
    vectors["release"][:LEAKED] = vectors["training"][:LEAKED] + 0.3 * rng.standard_normal((LEAKED, 128))
    vectors["release"][60:65] = vectors["release"][:5] + 0.2 * rng.standard_normal((5, 128))
    units = {}
    for role, own in vectors.items():
        stored, failed = normalise(own)[0], np.zeros(len(own), bool)
        failed[50:52] = role == "release"
        cuts = enumerate(pairwise((0, len(own) // 3, len(own))))
        units[role] = tuple(planted_unit(role, at, stored[a:b], failed[a:b]) for at, (a, b) in cuts)
    return planted_sets(units)


@pytest.fixture(scope="module")
def audited_run(session: None, world, committed: Callable[..., Run]) -> Run:
    run = committed(world, *OPTIONS)
    search(run)
    assess(run)
    return run


@pytest.mark.ray
def test_the_audit_of_what_stays_is_that_of_all_cosines_without_the_removed(audited_run: Run, world) -> None:
    run = audited_run
    tables = {path: path.read_bytes() for path in (run.folder / "assess").iterdir()}
    clean(run)
    record = cleaned(run.folder / "clean")
    assert record is not None
    assert {path: path.read_bytes() for path in (run.folder / "assess").iterdir()} == tables
    keys = set_columns(run, "release", ("key",))["key"].to_pylist()
    rows = [at for at, key in enumerate(keys) if key in kept(run.folder / "clean")]
    assert 0 < len(rows) < len(keys)
    sets = replace(run.config.sets, release=replace(run.config.sets.release, list_file="-"))
    inner = Run(replace(run.config, out=str(run.folder / "clean/audit"), sets=sets, store=str(run.folder / "store")))
    assert set_columns(inner, "release", ("key",))["key"].to_pylist() == [keys[row] for row in rows]
    stages = json.loads((inner.folder / "run.json").read_bytes())["stages"]
    assert stages["embed"]["embedded_now"] == 0
    assert stages["search"]["anchor-training-control"]["tiles_now"] == 0
    threshold = record["audit_again"]["after"]["threshold"]
    for arm in ("training", "control"):
        cosines = world.cosines("release", arm)[rows]
        with np.errstate(invalid="ignore"):
            over = int((cosines >= threshold).sum())
        found = inner.table("assess", "candidates", CANDIDATES).to_pylist()
        assert sum(row["arm"] == arm for row in found) == over
        best = np.nanmax(cosines, axis=0)
        told = {row["gallery_row"]: row["cosine"] for block in results(inner, CLOSEST) for row in block.to_pylist()
                if row["arm"] == arm}  # fmt: skip
        assert [told[at] for at in range(SIZES[arm])] == best.tolist()
    assert record["audit_again"]["before"]["listed"] >= LEAKED
    assert record["audit_again"]["after"]["listed"] < record["audit_again"]["before"]["listed"]


@pytest.mark.ray
def test_cluster_takes_near_copies_along_where_the_release_was_searched_against_itself(
    audited_run: Run, world, tmp_path: Path
) -> None:
    image = done(audited_run, tmp_path / "image", policy="image")
    record = done(audited_run, tmp_path / "cluster", policy="cluster")
    assert record["removed"]["images"] >= image["removed"]["images"]
    gone = {row["key"] for row in pq.read_table(tmp_path / "cluster/manifest.parquet").to_pylist() if not row["kept"]}
    keys = set_columns(audited_run, "release", ("key",))["key"].to_pylist()
    within = world.cosines("release", "release")
    with np.errstate(invalid="ignore"):
        near = [(keys[a], keys[b]) for a, b in np.argwhere(within >= 0.9).tolist()]
    assert len(near) >= 10
    assert all(b in gone for a, b in near if a in gone)
    assert {keys[at] for at in range(60, 65)} <= gone
    with pytest.raises(ConfigError, match="below the cosine"):
        done(audited_run, tmp_path / "low", policy="cluster", near=0.01)
