"""The per-image boundary: every image is one row in its place, with a face or with the reason why there is none."""

import ctypes
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from operators import faces as module
from operators.alignment import align, realign
from operators.detectors import YuNet
from operators.errors import ConfigError, FormatError, ModelError, SchemaMismatch
from operators.faces import FaceConfig, FacePreparation, crops
from operators.images import ImageFault, ImageLimits
from operators.quality import sharpness
from operators.records import FACE, FACES, unnest
from operators.sandbox import Sandbox
from operators.tables import STATUSES, UNITS

ALIGNED = FaceConfig(mode="aligned", isolate=False)
Encode = Callable[..., bytes]
UnitTable = Callable[..., pa.Table]


@pytest.fixture(scope="module")
def prepare(face_config: FaceConfig) -> FacePreparation:
    return FacePreparation(face_config)


@pytest.fixture(scope="module")
def two_faces(portraits: list[np.ndarray], canvas: Callable[..., np.ndarray]) -> dict[str, np.ndarray]:
    """The first portrait large and the second small, on either side."""
    big, small = portraits[0], portraits[1]
    return {
        "big left": canvas(192, 320, (big, 160, 8, 8), (small, 96, 200, 40)),
        "big right": canvas(192, 320, (small, 96, 8, 40), (big, 160, 144, 8)),
    }


def results(prepared: pa.Table) -> dict[str, dict]:
    return {row["key"]: row for row in unnest(FACES.check(prepared), "faces").to_pylist()}


def test_every_bad_image_is_a_row_with_its_reason_and_the_good_ones_are_prepared(
    face_config: FaceConfig,
    portraits: list[np.ndarray],
    two_faces: dict[str, np.ndarray],
    encode: Encode,
    unit_table: UnitTable,
    tmp_path: Path,
) -> None:
    good = encode(portraits[0], "JPEG", quality=95)
    files = {
        "ann/good.jpg": good,
        "ann/png_named.jpg": encode(portraits[1]),
        "ben/text.png": b"not an image",
        "ben/empty.jpg": b"",
        "ben/gif.jpg": encode(portraits[2], "GIF"),
        "cy/cut.jpg": good[: len(good) // 2],
        "cy/heavy.png": encode(np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)),
        "cy/wide.png": encode(np.zeros((100, 700, 3), np.uint8)),
        "cy/blank.png": encode(np.full((128, 128, 3), 128, np.uint8)),
        "dan/changed.jpg": good,
        "dan/two.png": encode(two_faces["big left"], "WEBP", quality=90),
        "zoe/last.bmp": encode(portraits[3], "WEBP", lossless=True),
    }
    for key, data in files.items():
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(data)
    extra = {"bytes": 3, "digest": None, "identity": "cy"}
    unit = unit_table(
        tmp_path,
        {
            "cy/listed.jpg": extra | {"error": "the file name is not valid UTF-8; rename the file"},
            "cy/gone.jpg": extra | {"digest": "00" * 32},
            "../outside.jpg": extra | {"digest": "00" * 32},
        },
    )
    (tmp_path / "dan/changed.jpg").write_bytes(encode(portraits[4], "JPEG"))
    limits = ImageLimits(max_bytes=60_000, max_pixels=192 * 320)
    prepared = FacePreparation(replace(face_config, several="reject", limits=limits))(unit)
    expected = {
        "../outside.jpg": ("unreadable", "cannot be read: not a regular file inside the set's folder"),
        "ann/good.jpg": ("ok", None),
        "ann/png_named.jpg": ("ok", None),
        "ben/empty.jpg": ("not_an_image", "empty"),
        "ben/gif.jpg": ("not_an_image", "not one of JPEG, PNG, WEBP, BMP, PPM"),
        "ben/text.png": ("not_an_image", "not one of JPEG, PNG, WEBP, BMP, PPM"),
        "cy/blank.png": ("no_face", "no face with a score of 0.6 or more"),
        "cy/cut.jpg": ("corrupt", "truncated"),
        "cy/gone.jpg": ("unreadable", "cannot be read: "),
        "cy/heavy.png": ("too_large", "the limit is 60,000 (faces.limits.max_bytes)"),
        "cy/listed.jpg": ("unreadable", "the file name is not valid UTF-8; rename the file"),
        "cy/wide.png": ("too_large", "700 x 100 pixels; the limit is 61,440 pixels (faces.limits.max_pixels)"),
        "dan/changed.jpg": ("changed", "changed after it was listed; run the audit again"),
        "dan/two.png": ("several_faces", "2 faces; faces.several is 'reject'"),
        "zoe/last.bmp": ("ok", None),
    }
    found = results(prepared)
    assert list(found) == list(expected) == [m["key"] for m in unit["members"][0].as_py()]
    assert prepared["unit"].to_pylist() == unit["unit"].to_pylist()
    listed = {m["key"]: m for m in unit["members"][0].as_py()}
    for key, (status, reason) in expected.items():
        row = found[key]
        assert (key, row["status"]) == (key, status)
        assert status in STATUSES
        assert (row["identity"], row["digest"]) == (listed[key]["identity"], listed[key]["digest"])
        if status == "ok":
            assert row["error"] is None
            assert len(row["crop"]) == 112 * 112 * 3
            assert row["faces_found"] == 1
            assert 0.6 < row["detector_score"] < 1
            assert row["face_size"] == min(row["box"][2:])
            assert row["crop_dlib150"] is None
        else:
            assert reason in row["error"]
            kept = ("key", "identity", "digest", "status", "error", "face")
            assert {name for name in row if row[name] is not None} <= set(kept)


def test_a_portrait_is_aligned_as_opencv_aligns_it(
    prepare: FacePreparation, portraits: list[np.ndarray], models: Path, encode: Encode
) -> None:
    """Detection and alignment by `cv2.FaceDetectorYN` and `cv2.FaceRecognizerSF`, which use the same template."""
    detector = cv2.FaceDetectorYN.create(str(models / "yunet_2023mar.onnx"), "", (128, 128), 0.6, 0.3)
    aligner = cv2.FaceRecognizerSF.create(str(models / "sface_2021dec.onnx"), "")
    for portrait in portraits:
        blue_first = np.ascontiguousarray(portrait[:, :, ::-1])
        row = detector.detect(blue_first)[1][0]
        found = prepare.prepare(encode(portrait))
        theirs = aligner.alignCrop(blue_first, row)[:, :, ::-1]
        ours = np.frombuffer(found["crop"], np.uint8).reshape(112, 112, 3)
        assert np.abs(ours.astype(int) - theirs).max() <= 2
        np.testing.assert_allclose(found["box"], row[:4], atol=1e-3)
        np.testing.assert_allclose(found["landmarks"], row[4:14], atol=1e-3)
        grey = cv2.cvtColor(ours.astype(np.float32), cv2.COLOR_RGB2GRAY)
        assert found["sharpness"] == pytest.approx(cv2.Laplacian(grey, cv2.CV_32F)[1:-1, 1:-1].var(), rel=1e-3)
        assert found["detector_score"] == pytest.approx(float(row[-1]), abs=1e-4)


@pytest.mark.parametrize(("side", "left"), [("big left", 8), ("big right", 144)])
def test_of_two_faces_the_larger_is_taken(
    prepare: FacePreparation,
    two_faces: dict[str, np.ndarray],
    portraits: list[np.ndarray],
    canvas: Callable[..., np.ndarray],
    encode: Encode,
    side: str,
    left: int,
) -> None:
    found = prepare.prepare(encode(two_faces[side]))
    alone = prepare.prepare(encode(canvas(192, 320, (portraits[0], 160, left, 8))))
    assert (found["faces_found"], alone["faces_found"]) == (2, 1)
    x, _, width, _ = found["box"]
    assert left < x < x + width < left + 160
    np.testing.assert_allclose(found["box"], alone["box"], atol=3)
    crops_of_it = (np.frombuffer(result["crop"], np.uint8).astype(int) for result in (found, alone))
    assert np.abs(np.subtract(*crops_of_it)).mean() < 6


def test_the_larger_face_is_taken_even_if_the_smaller_is_surer(face_config: FaceConfig, encode: Encode) -> None:
    """The detector is replaced by one whose answers are known."""
    preparation = FacePreparation(face_config)
    marks = np.array([[38, 52], [74, 52], [56, 72], [42, 92], [71, 92]], np.float32)
    sure = module.Detection(np.array([0, 0, 50, 60], np.float32), marks + 500, 0.99)
    large = module.Detection(np.array([10, 20, 60, 60], np.float32), marks, 0.61)
    preparation.detector = lambda image: [sure, large]
    found = preparation.prepare(encode(np.full((112, 112, 3), 200, np.uint8)))
    assert (found["detector_score"], found["box"], found["faces_found"]) == (0.61, [10, 20, 60, 60], 2)
    assert min(found["crop"][len(found["crop"]) // 2 :][: 112 * 3]) == 200


def planted(face_config: FaceConfig, *boxes: tuple[float, float, float, float], **options: object) -> FacePreparation:
    """A preparation that finds faces with these boxes, the first the surest."""
    marks = np.array([[38, 52], [74, 52], [56, 72], [42, 92], [71, 92]], np.float32)
    found = [module.Detection(np.array(box, np.float32), marks, 0.9 - at / 100) for at, box in enumerate(boxes)]
    preparation = FacePreparation(replace(face_config, **options))
    preparation.detector = lambda image: found
    return preparation


@pytest.mark.parametrize(
    ("boxes", "chosen"),
    [
        ([(130, 80, 40, 40)], 0),
        ([(0, 0, 60, 60), (130, 80, 40, 40)], 1),  # 3600 - 2 (120^2 + 70^2) < 1600, the centre is (149.5, 99.5)
        ([(120, 70, 60, 60), (130, 80, 40, 40)], 0),
        ([(180, 80, 40, 40), (120, 80, 40, 40)], 1),  # alike in size, 50 and 10 pixels from the centre
        ([(60, 70, 100, 100), (130, 80, 40, 40)], 0),  # 10,000 - 2 (39.5^2 + 20.5^2) > 1,600
        ([(50, 50, 100, 100), (130, 80, 40, 40)], 0),  # 10,000 - 2 (49.5^2 + 0.5^2) > 1,600
        ([(30, 50, 100, 100), (130, 80, 40, 40)], 1),  # 10,000 - 2 (69.5^2 + 0.5^2) < 1,600
        ([(130, 80, 40, 40), (130, 80, 40, 40)], 0),  # the surer one
    ],
)
def test_the_largest_central_face_weighs_its_area_against_its_distance_from_the_centre(
    face_config: FaceConfig, encode: Encode, boxes: list, chosen: int
) -> None:
    """InsightFace's rule, by hand for a picture of 300 x 200: area less twice the squared distance."""
    photo = encode(np.zeros((200, 300, 3), np.uint8))
    found = planted(face_config, *boxes, several="largest_central").prepare(photo)
    assert (found["box"], found["faces_found"]) == (list(boxes[chosen]), len(boxes))
    assert found["detector_score"] == pytest.approx(0.9 - chosen / 100)


@pytest.mark.parametrize("factor", [1, 3])
def test_the_choice_of_the_central_face_does_not_hang_on_the_resolution(
    face_config: FaceConfig, encode: Encode, factor: int
) -> None:
    boxes = [tuple(side * factor for side in box) for box in [(0, 0, 60, 60), (30, 50, 100, 100), (130, 80, 40, 40)]]
    photo = encode(np.zeros((200 * factor, 300 * factor, 3), np.uint8))
    assert planted(face_config, *boxes, several="largest_central").prepare(photo)["box"] == list(boxes[2])


@pytest.mark.parametrize("several", ["largest", "largest_central", "reject"])
def test_faces_that_are_too_small_are_passed_over(face_config: FaceConfig, encode: Encode, several: str) -> None:
    """The shorter side counts, also where it is the height; 40 pixels are enough for a limit of 40."""
    photo = encode(np.zeros((200, 300, 3), np.uint8))
    boxes = [(130, 80, 39.5, 300), (0, 0, 40, 41), (145, 95, 10, 10), (100, 50, 200, 39)]
    found = planted(face_config, *boxes, several=several, min_face=40).prepare(photo)
    assert (found["box"], found["face_size"], found["faces_found"]) == ([0, 0, 40, 41], 40, 4)
    with pytest.raises(ImageFault, match=r"face of 40\.0 pixels; the limit is 41 \(faces\.min_face\)") as caught:
        planted(face_config, *boxes, several=several, min_face=41).prepare(photo)
    assert caught.value.status == "too_small"
    assert caught.value.status in STATUSES
    with pytest.raises(ImageFault) as caught:
        planted(face_config, several=several, min_face=41).prepare(photo)
    assert caught.value.status == "no_face"


def test_a_face_is_found_once_and_cut_out_for_every_alignment(
    face_config: FaceConfig, portraits: list[np.ndarray], encode: Encode, unit_table: UnitTable, tmp_path: Path
) -> None:
    """The crops are those of preparations for one alignment each, and the columns not asked for stay empty."""
    for name, data in {"a": encode(portraits[0]), "b": b"", "c": encode(portraits[1])}.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    made = {}
    for alignments in [("arcface112",), ("dlib150",), ("arcface112", "dlib150"), ("dlib150", "arcface112")]:
        preparation = FacePreparation(face_config, alignments)
        detector, calls = preparation.detector, []
        preparation.detector = lambda image, detector=detector, calls=calls: calls.append(1) or detector(image)
        made[alignments] = unnest(FACES.check(preparation(unit_table(tmp_path))), "faces")
        assert len(calls) == 2
    arcface, dlib, both, swapped = made.values()
    assert both.equals(swapped)
    assert arcface["crop_dlib150"].null_count == dlib["crop"].null_count == 3
    assert both["crop"].equals(arcface["crop"])
    assert both["crop_dlib150"].equals(dlib["crop_dlib150"])
    others = [name for name in both.column_names if not name.startswith("crop")]
    assert both.select(others).equals(arcface.select(others))
    assert both.select(others).equals(dlib.select(others))
    assert crops(both).shape == (2, 112, 112, 3)
    assert crops(both, "dlib150").shape == (2, 150, 150, 3)
    for at, portrait in ((0, portraits[0]), (1, portraits[1])):
        landmarks = np.array(both["landmarks"].drop_null()[at].as_py()).reshape(5, 2)
        np.testing.assert_array_equal(crops(both, "dlib150")[at], align(portrait, landmarks, "dlib150"))


@pytest.mark.parametrize(("most", "kept"), [(32, [1, 0, 3, 4]), (2, [1, 0]), (1, [1])])
def test_of_all_faces_the_first_is_the_largest_and_the_rest_follow_by_size(
    face_config: FaceConfig, encode: Encode, most: int, kept: list[int]
) -> None:
    """Box 2 is under `min_face`; 0 and 3 are alike in size, so the surer one comes first; 4 cannot be aligned."""
    boxes = [(0, 0, 50, 50), (100, 80, 70, 60), (10, 10, 19, 90), (200, 100, 50, 50), (200, 0, 20, 20)]
    photo = encode(np.full((200, 300, 3), 7, np.uint8))
    preparation = planted(face_config, *boxes, several="all", most_faces=most, min_face=20)
    found = preparation.prepare(photo)
    alone = planted(face_config, *boxes, several="largest", min_face=20).prepare(photo)
    assert {name: value for name, value in found.items() if name != "further"} == alone
    made = [found, *found.get("further", [])]
    assert [one["box"] for one in made] == [list(boxes[at]) for at in kept]
    assert [one["faces_found"] for one in made] == [5] * len(kept)
    assert "further" not in alone


def test_faces_that_cannot_be_aligned_are_passed_over_if_another_can(face_config: FaceConfig, encode: Encode) -> None:
    preparation = planted(face_config, (0, 0, 90, 90), (0, 0, 50, 50), (0, 0, 20, 20), several="all")
    found = preparation.detector(None)  # type: ignore[misc,arg-type]
    point = np.full((5, 2), 7, np.float32)
    preparation.detector = lambda image: [found[0]._replace(landmarks_52=point), found[1], found[2]]
    made = preparation.prepare(encode(np.zeros((100, 100, 3), np.uint8)))
    assert (made["box"], [one["box"] for one in made["further"]]) == ([0, 0, 50, 50], [[0, 0, 20, 20]])
    preparation.detector = lambda image: [one._replace(landmarks_52=point) for one in found]
    with pytest.raises(ImageFault, match="cannot be aligned: the landmarks coincide"):
        preparation.prepare(encode(np.zeros((100, 100, 3), np.uint8)))


@pytest.mark.parametrize("isolate", [False, True])
def test_every_face_of_an_image_has_a_row_behind_that_of_the_image(
    face_config: FaceConfig,
    two_faces: dict[str, np.ndarray],
    portraits: list[np.ndarray],
    encode: Encode,
    unit_table: UnitTable,
    tmp_path: Path,
    isolate: bool,
) -> None:
    """Two people in one picture, listed for the larger; a copy of it under another name; one person; no image."""
    (tmp_path / "ann").mkdir()
    both = encode(two_faces["big left"])
    for key, data in {"ann/1": both, "ann/2": encode(portraits[2]), "ann/3": b"", "ann/4": both}.items():
        (tmp_path / f"{key}.png").write_bytes(data)
    unit = unit_table(tmp_path)
    config = replace(face_config, isolate=isolate)
    made = unnest(FACES.check(FacePreparation(replace(config, several="all"))(unit)), "faces")
    rows = made.to_pylist()
    keys = ["ann/1.png", "ann/1.png#2", "ann/2.png", "ann/3.png", "ann/4.png", "ann/4.png#2"]
    assert [(row["key"], row["face"]) for row in rows] == list(zip(keys, [1, 2, 1, 1, 1, 2], strict=True))
    assert [row["identity"] for row in rows] == ["ann", None, "ann", "ann", "ann", None]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "not_an_image", "ok", "ok"]
    left, _, width, _ = rows[1]["box"]
    assert 200 < left < left + width < 296, "the small one, on the right"
    assert (
        made["crop"][0] == made["crop"][4] and made["crop"][1] == made["crop"][5] and made["crop"][0] != made["crop"][1]
    )
    plain = unnest(FacePreparation(config)(unit), "faces")
    assert made.filter(pc.equal(made["face"], 1)).equals(plain), "the first row is that of `largest`"


def test_a_detection_without_extent_is_no_face(face_config: FaceConfig, encode: Encode) -> None:
    preparation = FacePreparation(face_config)
    point = module.Detection(np.array([5, 5, 1, 1], np.float32), np.full((5, 2), 7, np.float32), 0.9)
    preparation.detector = lambda image: [point]
    with pytest.raises(ImageFault, match="cannot be aligned: the landmarks coincide") as caught:
        preparation.prepare(encode(np.zeros((64, 64, 3), np.uint8)))
    assert caught.value.status == "no_face"


def test_a_rotated_photograph_gives_the_same_face_as_the_upright_one(
    prepare: FacePreparation, portraits: list[np.ndarray], encode: Encode
) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    stored = np.ascontiguousarray(portraits[2].transpose(1, 0, 2)[::-1])
    assert prepare.prepare(encode(stored, exif=exif)) == prepare.prepare(encode(portraits[2]))


def test_aligned_faces_pass_unchanged_and_others_are_refused(
    encode: Encode, unit_table: UnitTable, tmp_path: Path
) -> None:
    face = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    grey = face[:, :, 0]
    for name, picture in {"a": face, "b": grey, "c": face[:, :111], "d": np.zeros((112, 224, 3), np.uint8)}.items():
        (tmp_path / f"{name}.png").write_bytes(encode(picture))
    found = results(FacePreparation(ALIGNED)(unit_table(tmp_path)))
    assert found["a.png"]["crop"] == face.tobytes()
    assert found["b.png"]["crop"] == grey[:, :, None].repeat(3, 2).tobytes()
    assert {name: row["status"] for name, row in found.items()} == {
        "a.png": "ok",
        "b.png": "ok",
        "c.png": "not_aligned",
        "d.png": "not_aligned",
    }
    assert found["c.png"]["error"] == "111 x 112 pixels; `aligned` takes 112 x 112. Use faces.mode=detect"
    assert found["d.png"]["error"].startswith("224 x 112 pixels")
    unknown = ("detector_score", "box", "landmarks", "face_size")
    assert [found["a.png"][name] for name in ("faces_found", *unknown)] == [1, None, None, None, None]
    assert found["a.png"]["sharpness"] == pytest.approx(sharpness(face))


def test_an_aligned_face_gives_the_other_alignments_too(encode: Encode) -> None:
    face = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    found = FacePreparation(ALIGNED, ("dlib150",)).prepare(encode(face))
    assert "crop" not in found
    assert found["crop_dlib150"] == realign(face, "dlib150").tobytes()
    assert FacePreparation(ALIGNED, ("dlib150", "arcface112")).prepare(encode(face))["crop"] == face.tobytes()


def test_an_unknown_alignment_is_refused_before_any_image_is_read() -> None:
    with pytest.raises(ConfigError, match="'arcface' is not known"):
        FacePreparation(ALIGNED, ("arcface112", "arcface"))


def test_the_kind_of_the_detector_decides_how_its_file_is_read(face_config: FaceConfig) -> None:
    with pytest.raises(ModelError, match="no SCRFD with landmarks"):
        FacePreparation(replace(face_config, kind="scrfd"))
    assert type(module.open_detector(face_config)) is YuNet


def test_aligned_mode_needs_no_detector_file() -> None:
    assert FacePreparation(replace(ALIGNED, detector="nowhere.onnx")).detector is None
    with pytest.raises(ModelError, match=r"nowhere\.onnx"):
        FacePreparation(FaceConfig(detector="nowhere.onnx"))


@pytest.mark.parametrize(
    "surprise",
    [RuntimeError("wrong turn"), MemoryError(), KeyError("x"), TypeError("no"), AssertionError("no"), Warning("old")],
    ids=lambda error: type(error).__name__,
)
def test_a_surprise_of_a_decoder_is_a_row_and_the_others_go_on(
    surprise: Exception,
    encode: Encode,
    unit_table: UnitTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pictures = {name: np.full((112, 112, 3), at, np.uint8) for at, name in enumerate(["first", "secret_name", "third"])}
    (tmp_path / "secret_person").mkdir()
    for name, picture in pictures.items():
        (tmp_path / f"secret_person/{name}.png").write_bytes(encode(picture))
    bad = (tmp_path / "secret_person/secret_name.png").read_bytes()
    real = module.decode

    def decode(data: bytes, limits: ImageLimits) -> np.ndarray:
        if data == bad:
            raise surprise
        return real(data, limits)

    monkeypatch.setattr(module, "decode", decode)
    with caplog.at_level(logging.DEBUG):
        found = results(FacePreparation(ALIGNED)(unit_table(tmp_path)))
    assert [row["status"] for row in found.values()] == ["ok", "corrupt", "ok"]
    assert found["secret_person/secret_name.png"]["error"].startswith(type(surprise).__name__)
    assert type(surprise).__name__ in caplog.text
    assert "secret" not in caplog.text
    assert str(tmp_path) not in caplog.text


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_request_to_stop_is_obeyed(
    stop: type[BaseException], encode: Encode, unit_table: UnitTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(encode(np.zeros((112, 112, 3), np.uint8)))

    def decode(*_: object) -> None:
        raise stop

    monkeypatch.setattr(module, "decode", decode)
    with pytest.raises(stop):
        FacePreparation(ALIGNED)(unit_table(tmp_path))


def test_no_log_line_of_a_whole_unit_holds_a_name(
    face_config: FaceConfig,
    portraits: list[np.ndarray],
    encode: Encode,
    unit_table: UnitTable,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "secret_person").mkdir()
    files = {
        "face": encode(portraits[0]),
        "text": b"x",
        "cut": encode(portraits[1])[:2000],
        "blank": encode(portraits[0] * 0),
    }
    for name, data in files.items():
        (tmp_path / f"secret_person/secret_{name}.jpg").write_bytes(data)
    with caplog.at_level(logging.DEBUG):
        found = results(FacePreparation(face_config)(unit_table(tmp_path)))
    assert [row["status"] for row in found.values()] == ["no_face", "corrupt", "ok", "not_an_image"]
    assert "secret" not in caplog.text
    assert str(tmp_path) not in caplog.text


def test_an_error_text_that_is_no_unicode_is_still_a_row(
    encode: Encode, unit_table: UnitTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder may quote the file's bytes; Arrow holds UTF-8 only."""
    (tmp_path / "a.png").write_bytes(encode(np.zeros((112, 112, 3), np.uint8)))

    def decode(*_: object) -> None:
        raise RuntimeError("bad tag " + os.fsdecode(b"\xff\xfe"))

    monkeypatch.setattr(module, "decode", decode)
    (row,) = results(FacePreparation(ALIGNED)(unit_table(tmp_path))).values()
    assert row["status"] == "corrupt"
    assert row["error"].startswith("RuntimeError: bad tag")


def test_a_pipe_in_the_place_of_an_image_is_unreadable(unit_table: UnitTable, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    unit = unit_table(tmp_path, {"a.png": {"identity": None, "bytes": 0, "digest": "00" * 32}})
    assert results(FacePreparation(ALIGNED)(unit))["a.png"]["status"] == "unreadable"


def test_an_empty_unit_gives_no_faces(unit_table: UnitTable, tmp_path: Path) -> None:
    prepared = FACES.check(FacePreparation(ALIGNED)(unit_table(tmp_path)))
    assert prepared["faces"].to_pylist() == [[]]
    assert crops(unnest(prepared, "faces")).shape == (0, 112, 112, 3)


def test_a_table_that_is_no_unit_is_refused(unit_table: UnitTable, tmp_path: Path) -> None:
    with pytest.raises(SchemaMismatch, match="units/2"):
        FacePreparation(ALIGNED)(FACES.from_rows([{"unit": "u", "faces": []}]))


@pytest.mark.parametrize("count", [0, 2])
def test_a_table_of_several_units_is_refused(unit_table: UnitTable, tmp_path: Path, count: int) -> None:
    units = pa.concat_tables([unit_table(tmp_path)] * 2).slice(0, count)
    with pytest.raises(SchemaMismatch, match=f"one row; found {count}"):
        FacePreparation(ALIGNED)(units)


def test_a_unit_of_an_unknown_format_is_refused(unit_table: UnitTable, tmp_path: Path) -> None:
    (row,) = unit_table(tmp_path).to_pylist()
    with pytest.raises(FormatError, match="'rar' is not known"):
        FacePreparation(ALIGNED)(UNITS.from_rows([row | {"format": "rar"}]))


def test_crops_are_those_of_the_ok_rows_in_order() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)
    rows = [
        {"key": "a", "status": "corrupt"},
        {"key": "b", "status": "ok", "crop": pictures[0].tobytes()},
        {"key": "c", "status": "ok", "crop": pictures[1].tobytes()},
        {"key": "d", "status": "no_face"},
        {"key": "e", "status": "ok", "crop": pictures[2].tobytes()},
    ]
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(FACE)))
    np.testing.assert_array_equal(crops(table), pictures)
    np.testing.assert_array_equal(crops(pa.concat_tables([table.slice(0, 2), table.slice(2)])), pictures)
    np.testing.assert_array_equal(crops(table.slice(2)), pictures[1:])
    with pytest.raises(SchemaMismatch, match="3 faces have no dlib150 crop"):
        crops(table, "dlib150")
    with pytest.raises(ConfigError, match="'dlib' is not known"):
        crops(table, "dlib")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "x"}, "mode.*'x'"),
        ({"several": "first"}, "several.*'first'"),
        ({"most_faces": 0}, "most_faces must be at least 1. Got 0"),
        ({"kind": "mtcnn"}, "kind must be one of yunet, scrfd. Got 'mtcnn'"),
        ({"min_face": -1}, "min_face must be 0 or more. Got -1"),
        ({"min_score": 0.0}, "between 0 and 1"),
        ({"min_score": 1.0}, "between 0 and 1"),
        ({"longest_side": 63}, "at least 64"),
    ],
)
def test_impossible_configurations_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaceConfig(**wrong)


POISON = b"BM"
"""How the images of the tests below begin that their decoder does not survive: BMP, so that they are let in."""


def deadly(data: bytes, limits: object) -> np.ndarray:
    """A decoder that some images crash, some hang, and some ask for all memory."""
    what = data[2:6].decode()
    if what == "dead":
        ctypes.string_at(0)
    if what == "hang":
        time.sleep(60)
    if what == "more":
        return np.ones((1 << 36,), np.uint8)
    return np.full((112, 112, 3), 90, np.uint8)


def deadly_preparation(config: FaceConfig) -> Callable[[bytes], dict[str, object]]:
    module.decode = deadly
    preparation = FacePreparation(config)
    preparation.confined = True
    return preparation.guarded


def test_images_that_crash_hang_or_eat_memory_become_rows_and_cost_nothing_else(
    unit_table: UnitTable, tmp_path: Path
) -> None:
    names = [b"fine", b"dead", b"fine", b"hang", b"more", b"dead", b"fine"]
    for i, what in enumerate(names):
        (tmp_path / f"{i}.bmp").write_bytes(POISON + what + bytes([i]))
    unit = unit_table(tmp_path)
    preparation = FacePreparation(replace(ALIGNED, isolate=True, limits=ImageLimits(seconds=1.0, memory_mb=512)))
    preparation.sandbox = Sandbox(partial(deadly_preparation, ALIGNED), seconds=1.0, memory_bytes=1 << 29)
    rows = unnest(preparation(unit), "faces").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "crashed", "ok", "timed_out", "crashed", "crashed", "ok"]
    assert "signal 11" in rows[1]["error"] and "1 second" in rows[3]["error"]
    assert [row["crop"] is None for row in rows] == [row["status"] != "ok" for row in rows]


def test_an_isolated_worker_gives_the_rows_of_one_that_is_not(
    face_config: FaceConfig, portraits: list[np.ndarray], encode: Encode, unit_table: UnitTable, tmp_path: Path
) -> None:
    files = {f"{i}.png": encode(portrait) for i, portrait in enumerate(portraits)} | {
        "x.jpg": b"no image",
        "y.png": b"",
    }
    files["copy.png"] = files["0.png"]
    for key, data in files.items():
        (tmp_path / key).write_bytes(data)
    unit = unit_table(tmp_path)
    plain = FacePreparation(face_config)
    calls: list[bytes] = []
    guarded = plain.guarded
    plain.guarded = lambda data: calls.append(data) or guarded(data)  # type: ignore[method-assign]
    expected = unnest(plain(unit), "faces")
    assert len(calls) == len(files) - 1, "images of equal bytes are prepared once"
    assert unnest(FacePreparation(replace(face_config, isolate=True))(unit), "faces").equals(expected)
