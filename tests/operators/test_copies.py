import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from operators import copies
from operators.copies import CopySignals, CopyThresholds, Cut, Evidence, Picture, Tier, calibrate, compare, cut, tier
from operators.selftest import drawn_face

FACE = drawn_face()


def moved(image: np.ndarray, degrees: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    """As a detector might have cut out the same photograph once more."""
    matrix = cv2.getRotationMatrix2D((55.5, 55.5), degrees, scale) + np.array([[0, 0, shift[0]], [0, 0, shift[1]]])
    return np.asarray(cv2.warpAffine(image, matrix, (112, 112), borderMode=cv2.BORDER_REPLICATE))


def other_face(seed: int) -> np.ndarray:
    """A smooth surface that has nothing to do with any other."""
    small = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((112, 112), Image.Resampling.BICUBIC))


def shown(image: np.ndarray) -> Picture:
    return Picture(image, np.asarray(Image.fromarray(image).resize((200, 180))))


def test_equal_images_are_equal() -> None:
    assert compare(shown(FACE), shown(FACE)) == CopySignals(0.0, pytest.approx(1), pytest.approx(1), False, False)


def test_mirrored_copies_are_found_and_named() -> None:
    found = compare(shown(FACE), shown(np.ascontiguousarray(FACE[:, ::-1])))
    assert found.hash_mirrored and found.face_mirrored
    assert found.hash_distance < 0.05 and found.ncc > 0.999 and found.ssim > 0.999


def test_a_copy_cut_out_differently_is_found_and_a_stranger_is_not() -> None:
    copy = moved(FACE, 3.0, 1.06, (2.5, -1.7))
    found = compare(shown(FACE), shown(copy))
    assert found.ncc > 0.98 and found.ssim > 0.95
    plain = np.corrcoef(*(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[12:-12, 12:-12].ravel() for image in (FACE, copy)))
    assert plain[0, 1] < 0.9
    for seed in range(5):
        stranger = compare(shown(FACE), shown(other_face(seed)))
        assert stranger.hash_distance > 0.3 and stranger.ncc < 0.7 and stranger.ssim < 0.6


def test_registration_never_loses_to_the_plain_shift() -> None:
    shifted = np.roll(other_face(1), (5, -7), axis=(0, 1))
    ncc, ssim = copies.registered(other_face(1), shifted)
    assert (ncc, ssim) == (pytest.approx(1, abs=1e-4), pytest.approx(1, abs=1e-3))


def test_plain_surfaces_have_no_correlation() -> None:
    plain = np.full((112, 112, 3), 128, np.uint8)
    for pair in ((plain, FACE), (FACE, plain), (plain, plain)):
        found = compare(*map(shown, pair))
        assert found.ncc == 0 and np.isfinite(found.ssim)


def test_hash_is_the_sign_of_low_frequencies() -> None:
    grey = np.asarray(Image.fromarray(FACE).convert("L").resize((64, 64), Image.Resampling.LANCZOS))
    low = dctn(grey.astype(float))[:16, :16]
    np.testing.assert_array_equal(copies.perceptual_hash(FACE), (low > np.median(low)).ravel())


def test_structural_similarity_is_that_of_scikit_image() -> None:
    """0.8407... is structural_similarity of scikit-image 0.26.0 with gaussian_weights and population covariance."""
    y, x = np.mgrid[:48, :40]
    left = (127.5 + 100 * np.sin(x / 5) * np.cos(y / 7)).astype(np.float32)
    right = (left * 0.8 + 20 + 15 * np.sin(x * y / 50)).astype(np.float32)
    assert copies.similarity(left, right) == pytest.approx(0.8407635229472783, abs=1e-6)
    weights = np.outer(w := np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2)), w) / w.sum() ** 2
    values = []
    for top in range(48 - 10):
        for start in range(40 - 10):
            p, q = (image[top : top + 11, start : start + 11].astype(float) for image in (left, right))
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            both = (weights * (p - mp) * (q - mq)).sum()
            values.append(
                (2 * mp * mq + 6.5025) * (2 * both + 58.5225) / (mp**2 + mq**2 + 6.5025) / (vp + vq + 58.5225)
            )
    assert copies.similarity(left, right) == pytest.approx(np.mean(values), abs=1e-9)


def test_wrong_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Got uint8 \(100, 112, 3\) and uint8 \(112, 112, 3\)"):
        compare(shown(FACE), Picture(FACE[:100], FACE))
    with pytest.raises(ValueError, match="Got float64"):
        compare(Picture(FACE / 255, FACE), shown(FACE))


@pytest.mark.parametrize(
    ("count", "level", "passing", "measured", "finest"),
    [
        (999, 0.01, 9, 10 / 1000, False),
        (999, 0.001, 0, 1 / 1000, False),
        (998, 0.001, 0, 1 / 999, True),
        (1, 0.5, 0, 0.5, False),
    ],
)
def test_a_cut_is_a_conformal_p_value(count: int, level: float, passing: int, measured: float, finest: bool) -> None:
    reference = np.random.default_rng(1).permutation(count).astype(float)
    found = cut(reference, level)
    assert (reference >= found.value).sum() == passing
    assert (found.level, found.pairs, found.finest) == (pytest.approx(measured), count, finest)


def test_a_cut_lies_above_ties_that_would_break_the_level() -> None:
    reference = np.array([5.0] * 10 + [1.0] * 89)
    assert (reference >= cut(reference, 0.05).value).sum() == 0
    assert (reference >= cut(reference, 0.12).value).sum() == 10
    for values, level in ((np.zeros(0), 0.1), (np.array([np.nan]), 0.1), (np.zeros(3), 0.0)):
        with pytest.raises(ValueError, match=r"must"):
            cut(values, level)


def drawn(count: int, seed: int, shift: float = 0.0) -> list[CopySignals]:
    rng = np.random.default_rng(seed)
    rows = rng.normal([0.45 - shift, 0.5 + shift, 0.4 + shift], 0.05, (count, 3))
    return [CopySignals(*map(float, row), False, False) for row in rows]


def test_few_control_pairs_pass_by_any_signal() -> None:
    control, fresh = drawn(3_000, 2), drawn(20_000, 3)
    thresholds = calibrate(control, level=0.03)
    assert thresholds is not None and thresholds.level <= 0.03
    assert (
        thresholds.says == "0.03, measured on 3,000 control pairs, not checked against other photographs of one person"
    )
    assert sum(bool(copies.passing(pair, thresholds)) for pair in fresh) / 20_000 < 0.036
    few = calibrate(control[:50])
    assert few is not None and few.ncc.finest and few.ncc.level == 1 / 51
    assert few.says.startswith("0.059, the finest that 50 control pairs can measure, not checked against other")
    assert calibrate([]) is None


def test_other_photographs_of_the_same_person_raise_the_thresholds() -> None:
    control, others = drawn(3_000, 4), drawn(3_000, 5, shift=0.2)
    without, both = calibrate(control), calibrate(control, others)
    assert without is not None and both is not None
    assert both.ncc.value > without.ncc.value + 0.1 and both.hash_distance.value < without.hash_distance.value - 0.1
    passed = sum(bool(copies.passing(pair, both)) for pair in drawn(20_000, 6, shift=0.2)) / 20_000
    assert 0.004 < passed < 0.014
    assert both.says.endswith(", and 3,000 pairs of other photographs of one person")
    looser = calibrate(control, drawn(3_000, 5, shift=-0.2))
    assert looser is not None and [one.value for one in looser] == [one.value for one in without]


CUTS = CopyThresholds(*(Cut(value, 1e-4, 9_999, False, 500) for value in (0.2, 0.9, 0.7)))
ALONE = CopyThresholds(*(one._replace(other_photos=0) for one in CUTS))
COPY, NO_COPY = CopySignals(0.3, 0.95, 0.5, False, True), CopySignals(0.3, 0.8, 0.5, False, False)


@pytest.mark.parametrize(
    ("changes", "expected", "reason"),
    [
        ({}, Tier.SAME_PERSON, "the second model confirms (z 4.00, level 3.00)"),
        ({"signals": COPY}, Tier.SAME_PHOTO, "correlation 0.950 (at least 0.900)"),
        ({"signals": COPY._replace(hash_distance=0.2)}, Tier.SAME_PHOTO, "hash distance 0.200 (at most 0.200)"),
        ({"signals": NO_COPY._replace(ssim=0.7)}, Tier.SAME_PHOTO, "structural similarity 0.700 (at least 0.700)"),
        ({"signals": COPY, "discovery": False}, Tier.SAME_PHOTO, "no discovery of the first model"),
        ({"signals": COPY, "second_z": None}, Tier.SAME_PHOTO, "no second model"),
        ({"signals": COPY, "discovery": False, "second_z": 1.0}, Tier.LOOK_ALIKE, "does not confirm"),
        ({"signals": COPY, "blend": True}, Tier.SAME_PHOTO, "a second source"),
        (
            {"signals": COPY, "blend": True, "thresholds": ALONE},
            Tier.BLEND,
            "not checked against",
        ),
        ({"signals": COPY, "thresholds": ALONE}, Tier.SAME_PHOTO, "not checked against"),
        ({"blend": True}, Tier.BLEND, "a second source by the decoy-partner test"),
        ({"blend": True, "discovery": False, "second_z": 0.0}, Tier.BLEND, "no discovery"),
        ({"blend": False}, Tier.SAME_PERSON, "no copy"),
        ({"signals": None}, Tier.SAME_PERSON, "pixels were not compared"),
        ({"second_z": 3.0}, Tier.SAME_PERSON, "confirms (z 3.00, level 3.00)"),
        ({"second_z": 2.9}, Tier.LOOK_ALIKE, "does not confirm (z 2.90, level 3.00)"),
        ({"second_z": None}, Tier.LOOK_ALIKE, "no second model"),
        ({"second_cut": None}, Tier.LOOK_ALIKE, "no second model"),
        ({"discovery": False}, Tier.LOOK_ALIKE, "no discovery of the first model"),
        ({"hub": True, "signals": COPY}, Tier.HUB, "abnormally many"),
        ({"thresholds": None}, Tier.SAME_PERSON, "pixels were not compared"),
        ({"discovery": None}, Tier.NOT_CALIBRATED, "no controlled claim"),
        ({"thresholds": None, "hub": True}, Tier.HUB, "abnormally many"),
        ({"thresholds": None, "hub": True, "same_bytes": True}, Tier.SAME_PHOTO, "the same bytes"),
    ],
)
def test_tiers(changes: dict[str, object], expected: Tier, reason: str) -> None:
    usual = Evidence(
        discovery=True, second_z=4.0, second_cut=3.0, signals=NO_COPY, thresholds=CUTS, blend=None, hub=False
    )
    found, reasons = tier(usual._replace(**changes))
    assert found is expected
    assert any(reason in words for words in reasons), reasons


def test_tier_names_are_a_closed_list() -> None:
    assert [str(name) for name in Tier] == [
        "same photo",
        "same person",
        "blend of two people",
        "look-alike / indeterminate",
        "hub",
        "not calibrated",
    ]
