"""The demo corpus: its files follow from the seed, its key is true, and nothing of the user is overwritten."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from operators.errors import ConfigError, ModelError
from seeds.demo import corpus as corpus_module
from seeds.demo import generator as generator_module
from seeds.demo import leaks
from seeds.demo.__main__ import main
from seeds.demo.corpus import make
from seeds.demo.generator import Generator
from seeds.demo.planting import make_plan, stream

SCALE = 0.02
SETS = ("training", "control", "anchor", "placebo", "release")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "corpus"
    make(out, scale=SCALE)
    return out


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same corpus, whose first making was interrupted."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path_factory.mktemp("again") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "_write_key", stop)
        with pytest.raises(KeyboardInterrupt):
            make(out, scale=SCALE)
    assert not out.exists()
    assert make(out, scale=SCALE).made
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def test_the_full_corpus_has_the_promised_size() -> None:
    plan = make_plan()
    counts = {name: len(pictures) for name, pictures in plan.pictures.items()}
    assert counts == pytest.approx(
        {"training": 1100, "control": 1100, "anchor": 600, "placebo": 600, "release": 1300}, rel=0.06
    )
    assert Counter(p.leak for p in plan.planted) == dict.fromkeys(leaks.LEAKS, 22)
    sources = [p.source.identity for p in plan.planted]
    assert len(set(sources)) == len(sources)


def test_counts_agree_with_the_files_and_the_marker(demo: Path) -> None:
    marker = json.loads((demo / "corpus.json").read_text())
    broken = rows(demo / "broken.csv")
    for name in SETS:
        extra = sum(row["set"] == name for row in broken)
        assert len(list((demo / name).glob("*/*"))) == marker["counts"][name] + extra
    assert len(rows(demo / "planted.csv")) == marker["counts"]["planted"] == len(leaks.LEAKS)
    assert (len(broken), marker["scale"]) == (marker["counts"]["broken"], SCALE)


def test_every_image_is_a_jpeg_of_the_same_size(demo: Path) -> None:
    broken = {(row["set"], row["key"]) for row in rows(demo / "broken.csv")}
    for name in SETS:
        for path in (demo / name).glob("*/*"):
            if (name, path.relative_to(demo / name).as_posix()) not in broken:
                with Image.open(path) as image:
                    assert (image.format, image.size, image.mode) == ("JPEG", (128, 128), "RGB")


def test_every_source_exists_and_only_blends_have_two_of_different_people(demo: Path) -> None:
    broken = {row["key"] for row in rows(demo / "broken.csv")}
    for row in rows(demo / "planted.csv"):
        assert (demo / "release" / row["release_key"]).is_file()
        assert (demo / "training" / row["source_key"]).is_file()
        assert row["source_key"].split("/")[0] == row["source_identity"]
        assert not {row["release_key"], row["source_key"]} & broken
        if row["leak"].startswith("blend"):
            assert (demo / "training" / row["second_source_key"]).is_file()
            assert row["second_source_identity"] not in ("", row["source_identity"])
        else:
            assert row["second_source_key"] == row["second_source_identity"] == ""


def test_names_do_not_betray_leaks(demo: Path) -> None:
    plan = make_plan(scale=SCALE)
    assert {p.release_key for p in plan.planted} <= {p.key for p in plan.pictures["release"]}
    names = {p.identity for p in plan.pictures["release"]}
    assert all(name.startswith("syn_") for name in names)
    assert not names & {p.identity for p in plan.pictures["training"]}
    same_number = [p for p in make_plan().planted if p.release_key.split("_")[1][:5] == p.source.identity[1:]]
    assert len(same_number) <= 5


def test_broken_files_are_what_the_list_says(demo: Path) -> None:
    kinds: dict[str, list[Path]] = {}
    for row in rows(demo / "broken.csv"):
        kinds.setdefault(row["kind"], []).append(demo / row["set"] / row["key"])
    assert all(path.read_bytes() == b"" for path in kinds["empty"])
    assert all(path.name == "notes.txt" for path in kinds["other_extension"])
    assert all(path.suffix == ".jpg" and path.read_bytes().startswith(b"Not an image") for path in kinds["text"])
    assert all(pixels(path).shape == (128, 256, 3) for path in kinds["two_faces"])
    assert all(pixels(path).shape == (128, 128, 3) for path in kinds["no_face"])
    for path in kinds["truncated"]:
        with pytest.raises(OSError, match="truncated"):
            pixels(path)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(demo: Path, again: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", scale=SCALE, seed=1)
    assert digests(again) == digests(demo)
    images = [{d for k, d in digests(p).items() if k.endswith(".jpg")} for p in (demo, tmp_path / "other")]
    constant = {hashlib.sha256(b"").hexdigest(), *(d for d in images[0] & images[1])}
    assert len(constant) <= 2


def test_a_person_looks_the_same_at_every_scale(demo: Path, tmp_path: Path) -> None:
    make(tmp_path / "larger", scale=5 * SCALE)
    found, expected = digests(tmp_path / "larger" / "anchor"), digests(demo / "anchor")
    assert len(found) > len(expected)
    assert {key: found[key] for key in expected} == expected


def test_a_complete_corpus_is_reused_and_another_one_never_overwritten(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (demo / "corpus.json").stat().st_mtime_ns
    assert main(["make", str(demo), "--scale", str(SCALE)]) == 0
    assert "already complete, nothing done" in capsys.readouterr().out
    assert (demo / "corpus.json").stat().st_mtime_ns == before
    assert main(["make", str(demo), "--scale", "0.03"]) == 1
    told = capsys.readouterr().err
    assert "another seed, scale or version" in told
    assert len(told.splitlines()) == 1


def test_a_folder_that_is_no_corpus_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    with pytest.raises(ConfigError, match="holds no complete corpus"):
        make(tmp_path, scale=SCALE)
    assert [p.name for p in tmp_path.iterdir()] == ["training"]


def test_an_interrupted_make_leaves_nothing_visible_and_is_made_again(demo: Path, again: Path) -> None:
    assert [p.name for p in again.parent.iterdir()] == ["corpus"]
    assert digests(again) == digests(demo)


@pytest.mark.parametrize("scale", [0.0, -1.0, 101.0, float("nan")])
def test_an_impossible_scale_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match="scale: must be above 0 and at most 100"):
        make_plan(scale=scale)


def test_leaks_of_pixels_are_nearer_to_their_source_than_to_other_images(demo: Path) -> None:
    training = {p.relative_to(demo / "training").as_posix(): p for p in (demo / "training").glob("*/*.jpg")}
    for row in rows(demo / "planted.csv"):
        if row["leak"] in ("near_copy", "blur", "dial_01"):
            leaked = pixels(demo / "release" / row["release_key"])
            others = [p for k, p in training.items() if k.split("/")[0] != row["source_identity"] and usable(p)]
            distance = np.abs(leaked - pixels(training[row["source_key"]])).mean()
            assert distance < min(np.abs(leaked - pixels(p)).mean() for p in others)


def usable(path: Path) -> bool:
    try:
        return pixels(path).shape == (128, 128, 3)
    except OSError:
        return False


@pytest.mark.parametrize("transform", leaks.COPIES.values(), ids=leaks.COPIES)
def test_every_copy_keeps_shape_and_type_and_changes_pixels(
    transform: Callable[[leaks.Image, np.random.Generator], leaks.Image],
) -> None:
    image = np.random.default_rng(3).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    made = transform(image, stream(1, "test"))
    assert (made.shape, made.dtype) == (image.shape, np.uint8)
    assert (made != image).any()


def test_a_moved_latent_keeps_its_spread_and_has_the_stated_cosine() -> None:
    latent = (0.8 * np.random.default_rng(0).standard_normal(40_000)).astype(np.float32)
    moved = leaks.moved(latent, 0.5, np.random.default_rng(1), 0.8)
    assert moved.std() == pytest.approx(0.8, rel=0.02)
    cosine = latent @ moved / np.linalg.norm(latent) / np.linalg.norm(moved)
    assert cosine == pytest.approx(np.sqrt(0.75), abs=0.02)


def test_a_blend_is_the_weighted_mean() -> None:
    first, second = np.full((1, 1, 3), 200, np.uint8), np.full((1, 1, 3), 100, np.uint8)
    assert leaks.blend(first, second, 0.7).tolist() == [[[170, 170, 170]]]


def test_a_face_does_not_depend_on_how_many_are_made() -> None:
    latents = np.random.default_rng(2).standard_normal((66, 100)).astype(np.float32)
    faces = Generator().faces(latents)
    assert (faces.shape, faces.dtype) == ((66, 64, 64, 3), np.uint8)
    assert (Generator().faces(latents[:3]) == faces[:3]).all()
    assert Generator().faces(latents[:0]).shape == (0, 64, 64, 3)


def test_missing_weights_are_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generator_module, "PACKAGE", "no_such_package")
    assert main(["make", str(tmp_path / "demo"), "--scale", str(SCALE)]) == 1
    told = capsys.readouterr().err
    assert told.rstrip().endswith("Run: pip install --no-deps gan-face-generate==1.1.1")
    assert len(told.splitlines()) == 1


def test_altered_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_module, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="must have SHA-256 0000"):
        Generator()
