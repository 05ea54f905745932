import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from operators.errors import FormatError
from operators.records import unnest
from operators.tables import UNITS
from pipeline.config import AuditConfig
from pipeline.scan import scan
from pipeline.stage import Run

Configured = Callable[..., AuditConfig]


def scanned(config: AuditConfig) -> dict[str, list[str]]:
    with Run(config) as run:
        scan(run)
        return {role: run.table("scan", role, UNITS)["unit"].to_pylist() for role in config.sets.given()}


@pytest.mark.parametrize("whole", [2**24, 1000], ids=["in one piece", "streamed"])
def test_every_image_is_listed_once_with_its_digest_in_key_order(
    configured: Configured, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr("pipeline.scan.WHOLE", whole)
    config = configured()
    scanned(config)
    with Run(config) as run:
        table = run.table("scan", "training", UNITS)
    members = [m for at in range(table.num_rows) for m in unnest(table.slice(at, 1), "members").to_pylist()]
    root = Path(config.sets.training.uri)
    truth = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in (".jpg", ".png"))
    assert [m["key"] for m in members] == truth
    assert all(m["digest"] == hashlib.sha256((root / m["key"]).read_bytes()).hexdigest() for m in members)
    assert all(m["identity"] == m["key"].split("/")[0] for m in members)
    sizes = [len(entry) for entry in table["members"].to_pylist()]
    assert table["first_row"].to_pylist() == [sum(sizes[:at]) for at in range(len(sizes))]


def test_units_do_not_depend_on_where_the_set_is_or_when_it_was_copied(
    configured: Configured, corpus: Path, tmp_path: Path
) -> None:
    here = scanned(configured())
    shutil.copytree(corpus / "training", tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*.jpg"):
        os.utime(path, (0, 0))
    there = scanned(configured(f"sets.training.uri={tmp_path}/elsewhere", f"out={tmp_path}/run2"))
    assert there == here


def test_one_changed_image_changes_one_unit(configured: Configured, corpus: Path, tmp_path: Path) -> None:
    """Same name, same size, same time: only the bytes differ."""
    copied = tmp_path / "copied"
    shutil.copytree(corpus / "training", copied)
    chosen = sorted(copied.rglob("*.jpg"))[7]
    before = chosen.stat()
    data = bytearray(chosen.read_bytes())
    data[-3] ^= 1
    chosen.write_bytes(data)
    os.utime(chosen, ns=(before.st_atime_ns, before.st_mtime_ns))
    old = scanned(configured())["training"]
    new = scanned(configured(f"sets.training.uri={copied}", f"out={tmp_path}/run2"))["training"]
    assert len(old) == len(new) > 2
    assert sum(a != b for a, b in zip(old, new, strict=True)) == 1


def test_a_second_scan_of_the_same_set_keeps_the_table(
    configured: Configured, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured()
    scanned(config)
    caplog.set_level("INFO")
    scanned(config)
    assert "training unchanged" in caplog.text


def test_files_that_are_no_images_by_name_are_counted(configured: Configured) -> None:
    config = configured()
    scanned(config)
    with Run(config) as run:
        facts = run.commit("scan", "release").facts
    root = Path(config.sets.release.uri)
    others = [p for p in root.rglob("*") if p.is_file() and p.suffix != ".jpg"]
    assert facts["unlisted"] == {".txt": len(others)}


@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "no file of a known form"),
        (lambda path: path.write_text("x"), "no file of a known form"),
    ],
)
def test_a_set_that_is_not_there_is_refused_by_name(
    configured: Configured, tmp_path: Path, prepare: Callable[[Path], None], complaint: str
) -> None:
    prepare(tmp_path / "wrong")
    with pytest.raises(FormatError, match=f"wrong: {complaint}"):
        scanned(configured(f"sets.training.uri={tmp_path}/wrong"))


def test_the_run_folder_is_private(configured: Configured) -> None:
    config = configured()
    scanned(config)
    for path in [Path(config.out), *Path(config.out).rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_two_list_files_of_one_place_must_not_share_images(configured: Configured, tmp_path: Path) -> None:
    root = Path(configured().sets.training.uri)
    keys = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))
    lists = {}
    for role, own in (("training", keys[:10]), ("control", keys[10:14])):
        lists[role] = tmp_path / f"{role}.csv"
        lists[role].write_text("\n".join(["path", *own]))
    options = [
        f"sets.{role}.{name}={value}"
        for role, file in lists.items()
        for name, value in (("uri", root), ("list_file", file))
    ]
    scanned(configured(*options, f"out={tmp_path}/run2"))
    lists["control"].write_text("\n".join(["path", *keys[9:14]]))
    with pytest.raises(
        FormatError, match=r"sets.training and sets.control share 1 images of .*Correct their list files"
    ):
        scanned(configured(*options, f"out={tmp_path}/run3"))


def test_what_differs_from_the_catalogue_is_said(configured: Configured, tmp_path: Path) -> None:
    config = configured("sets.training.catalogue=casia_webface", f"out={tmp_path}/run2")
    with Run(config) as run:
        scan(run)
        notes = run.commit("scan", "training").facts["notes"]
    assert any("490,623" in note for note in notes)
