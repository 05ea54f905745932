"""The catalogue: entries by name, differences of found sets, warnings about embedders that saw the audited people."""

from dataclasses import replace
from pathlib import Path

import pytest

from operators.errors import ConfigError
from pipeline import catalogue
from pipeline.catalogue import defaults, differences, embedder_sets, entries, entry, load, mentioned, overlaps, version

ENDS_WITH_A_REMEDY = "take an embedder that saw neither, or a control set that it saw as well."


def test_entries_are_found_however_they_are_written() -> None:
    assert entry("dcface").title == "DCFace"
    assert entry("DCFace") is entry(" dcface ") is entry("dcface")
    assert entry("DigiFace-1M").name == "digiface_1m" and entry("IDiff-Face-two-stage").name == "idiff_face_two_stage"


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("dcfaces", "Did you mean dcface"),
        ("casia", "Did you mean casia_webface"),
        ("faces_emore", "Did you mean ms1mv2"),
        ("webface_4m", "webface4m"),
    ],
)
def test_an_unknown_name_gets_its_near_ones(wrong: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"catalogue has no entry '{wrong}'.*{hint}.*`unveil catalogue` lists all"):
        entry(wrong)


def test_a_name_like_no_other_gets_no_hint() -> None:
    with pytest.raises(ConfigError, match=r"no entry 'xyzzy'\. `unveil catalogue` lists"):
        entry("xyzzy")


def test_releases_come_first_in_the_order_of_names() -> None:
    kinds = [one.kind for one in entries()]
    assert kinds == sorted(kinds, key=lambda kind: kind != "release")
    names = [one.name for one in entries() if one.kind == "release"]
    assert names == sorted(names)


def test_a_set_as_published_differs_in_nothing() -> None:
    found = {"images": 490_623, "identities": 10_572, "format": "recordio", "pixels": (112, 112)}
    assert differences(entry("casia_webface"), **found) == []
    assert differences(entry("casia_webface")) == []


def test_differences_give_both_numbers() -> None:
    assert differences(entry("lfw"), images=13_200, identities=5_750, format="folder", pixels=(112, 112)) == [
        "13,200 images were found, 33 fewer than the 13,233 of LFW (all).",
        "5,750 identities were found, 1 more than the 5,749 of LFW (all).",
        "The set is a folder; LFW is published as tar: this is a converted copy.",
        "The images are 112 x 112 pixels; those of LFW are 250 x 250: this is another version or a resized copy.",
    ]


def test_a_found_set_is_compared_with_the_nearest_version() -> None:
    one = entry("dcface")
    assert version(one).images == 550_000
    assert version(one, 499_000).images == 500_000 and version(one, 1_500_000).images == 1_200_000
    (said,) = differences(one, images=500_001)
    assert said == "500,001 images were found, 1 more than the 500,000 of DCFace (0.5M, each image once)."


@pytest.mark.parametrize(("images", "differs"), [(3_310_000, False), (3_200_000, False), (3_100_000, True)])
def test_rounded_numbers_may_be_off_by_a_few_percent(images: int, differs: bool) -> None:
    said = differences(entry("vggface2"), images=images)
    assert bool(said) == differs
    if differs:
        assert said == [
            "3,100,000 images were found, 210,000 fewer than the about 3,310,000 of VGGFace2 (training and test)."
        ]


def test_what_is_not_known_differs_from_nothing() -> None:
    one = entry("synface")  # form and pixels are not known, people only of another version
    assert differences(one, images=999_994, identities=3, format="zip", pixels=(7, 7)) == []


def test_defaults_leave_an_unknown_form_open() -> None:
    assert defaults(entry("dcface")) == {"format": "recordio", "identity": "auto", "mode": "aligned"}
    assert defaults(entry("synface")) == {"identity": "parent", "mode": "detect"}
    assert defaults(entry("ffhq"))["identity"] == "none"


@pytest.mark.parametrize(
    ("trained", "audited", "said"),
    [
        ("casia_webface", "casia_webface", "trained on CASIA-WebFace itself. CASIA-WebFace is the audited set."),
        ("webface4m", "webface42m", "trained on WebFace4M, a part of WebFace42M. WebFace42M is"),
        ("webface4m", "webface12m", "trained on WebFace4M, a part of WebFace12M (unverified)."),
        ("webface12m", "webface42m", "trained on WebFace12M, a part of WebFace42M."),
        ("webface42m", "webface4m", "trained on WebFace42M, which contains WebFace4M."),
        ("webface260m", "webface4m", "trained on WebFace260M, which contains WebFace4M."),
        ("ms1mv3", "ms1mv2", "trained on MS1MV3, taken from MS-Celeb-1M as MS1MV2 was."),
        ("ms_celeb_1m", "ms1mv3", "trained on MS-Celeb-1M, which contains MS1MV3."),
        ("celeba_hq", "celeba", "trained on CelebA-HQ, a part of CelebA."),
        ("celeba", "celeba_hq", "trained on CelebA, which contains CelebA-HQ."),
        (
            "webface12m",
            "ms1mv2",
            "which may hold some of the same people as MS1MV2: WebFace260M shares people with MS-Celeb-1M.",
        ),
        (
            "ms1mv3",
            "casia_webface",
            "same people as CASIA-WebFace: CASIA-WebFace shares people with MS-Celeb-1M (unverified).",
        ),
        ("webface12m", "hyperface", "a part of WebFace42M. WebFace42M was seen by the generator of HyperFace."),
        ("ffhq", "dcface", "trained on FFHQ itself. FFHQ was seen by the generator of DCFace."),
    ],
)
def test_an_embedder_that_saw_the_audited_people_is_warned_of(trained: str, audited: str, said: str) -> None:
    (warning,) = overlaps([trained], audited)
    assert warning.startswith("The embedder was trained on ") and said in warning
    assert warning.endswith(ENDS_WITH_A_REMEDY)


@pytest.mark.parametrize(
    ("trained", "audited"),
    [
        ("ms1mv3", "ffhq"),
        ("webface42m", "ffhq"),
        ("ffhq", "casia_webface"),
        ("casia_webface", "digiface_1m"),
        ("ffhq", "sface"),
    ],
)
def test_unrelated_sets_give_no_warning(trained: str, audited: str) -> None:
    assert overlaps([trained], audited) == []


def test_each_set_that_an_embedder_saw_is_named_once_and_words_do_as_names() -> None:
    words = "WebFace12M and WebFace4M, photographs scraped from the web (parts of WebFace260M)"
    assert mentioned(words) == ["webface12m", "webface4m"]
    assert overlaps([words, "webface12m"], "webface42m") == overlaps(["webface12m", "webface4m"], "webface42m")
    assert len(overlaps([words], "webface42m")) == 2
    assert overlaps([], "webface42m") == [] and overlaps(["nothing that is known"], "webface42m") == []
    with pytest.raises(ConfigError, match="no entry"):
        overlaps(["webface4m"], "no_such_set")


def test_names_within_other_names_are_not_mistaken() -> None:
    assert mentioned("MS1M-RetinaFace") == ["ms1mv3"] and mentioned("MS1M-ArcFace, VGG Face") == ["ms1mv2", "vggface"]
    assert mentioned("VGGFace2-HQ") == [] and mentioned("WebFace42M") == ["webface42m"]


def test_shipped_models_are_looked_up_and_others_read() -> None:
    text = "about 3 million faces of 7,485 people from FaceScrub, VGG Face and the web; people of LFW left out"
    assert embedder_sets("dlib_resnet_v1", text) == ["facescrub", "vggface"]
    assert embedder_sets("my_own", "MS1MV3, 93 thousand identities") == ["ms1mv3"]
    assert embedder_sets("my_own") == []
    assert overlaps(embedder_sets("adaface_ir101_webface12m"), "webface4m")


def test_entries_that_name_one_another_wrongly_are_refused(tmp_path: Path, root: Path) -> None:
    folder = root / "seeds" / "catalogue"
    (tmp_path / "celeba_hq.yaml").write_text((folder / "celeba_hq.yaml").read_text())
    with pytest.raises(
        ConfigError, match=r"celeba_hq\.yaml: relations names 'celeba', which has no entry\. Add celeba\.yaml"
    ):
        load(tmp_path)
    (tmp_path / "celeba_hq.yaml").rename(tmp_path / "other.yaml")
    with pytest.raises(ConfigError, match=r"other\.yaml: name must be that of the file\. Got 'celeba_hq'"):
        load(tmp_path)


def test_relations_may_form_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = {name: replace(entry(name), relations=()) for name in ("celeba", "celeba_hq")}
    (there,) = entry("celeba_hq").relations
    ring["celeba_hq"] = replace(ring["celeba_hq"], relations=(there,))
    ring["celeba"] = replace(ring["celeba"], relations=(replace(there, set="celeba_hq"),))
    monkeypatch.setattr(catalogue, "_all", lambda: ring)
    assert "a part of CelebA." in overlaps(["celeba_hq"], "celeba")[0]
