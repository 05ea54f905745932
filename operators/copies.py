"""Same photo, or only the same person: what the pixels of a listed pair say, and the tier that follows from it.

Embeddings cannot tell a copied photograph from another photograph of the same person. Three signals of pixels can, each
for the better of the image and its mirror image: the distance of perceptual hashes of the whole images, and, between
the aligned faces after fine registration, the correlation coefficient and the structural similarity. None has a
threshold of its own: aligned faces of different people look alike too, so the levels come from control pairs.
"""

from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.tables import FACE_PIXELS

HASH_SIDE = 16
"""A hash has the square of this many bits: 256."""

MARGIN, STEPS, STEP_LIMIT = 12, 40, 1e-4
"""Registration: pixels of the release face's edge that are not compared, so that the gallery face can be moved under
it; the most steps; the growth of the correlation below which it ends."""

WINDOW, SIGMA, DARK, FLAT = 11, 1.5, (0.01 * 255) ** 2, (0.03 * 255) ** 2
"""Structural similarity as in Wang et al., IEEE TIP 13(4), 2004: Gaussian window in pixels, and the two constants."""

LEVEL, OTHER_LEVEL = 1e-3, 1e-2
"""Share of control pairs, and of pairs of different photographs of one person, that may pass as copies. The second is
looser: face sets often hold one photograph twice, which would push a finer level beyond what real copies reach."""


class Picture(NamedTuple):
    """One image of a pair."""

    face_HWC: NDArray[np.uint8]
    """RGB, aligned, 112 x 112."""
    image_HWC: NDArray[np.uint8]
    """RGB, the whole decoded image; the face itself where nothing else exists."""


class CopySignals(NamedTuple):
    """How alike the pixels of two images are."""

    hash_distance: float
    """Share of the bits in which the perceptual hashes of the whole images differ, 0 to 1; about 0.5 for unrelated."""
    ncc: float
    """Normalised cross-correlation of the registered grey faces, -1 to 1."""
    ssim: float
    """Structural similarity of the registered grey faces, -1 to 1."""
    hash_mirrored: bool
    face_mirrored: bool
    """The mirrored gallery image has the nearer hash; the mirrored face correlates more (`ncc`, `ssim` are of it)."""


class Cut(NamedTuple):
    """A level of a signal that few reference pairs reach."""

    value: float
    """A pair passes from this value on, in the direction of greater likeness."""
    level: float
    """The chance that a pair like the reference pairs passes: at most this."""
    pairs: int
    finest: bool
    """The wanted level is below what so few pairs can measure; `level` is the finest that they can."""
    other_photos: int = 0
    """Pairs of different photographs of one person that bound the value too; without, two of one sitting may pass."""


class CopyThresholds(NamedTuple):
    """From where each signal says `same photo`."""

    hash_distance: Cut
    ncc: Cut
    ssim: Cut

    @property
    def level(self) -> float:
        """The chance that a control pair passes by any of the signals: at most the sum of theirs."""
        return self.hash_distance.level + self.ncc.level + self.ssim.level

    @property
    def says(self) -> str:
        """The level in words, for reports."""
        how = "the finest that {:,} control pairs can measure" if self.ncc.finest else "measured on {:,} control pairs"
        others = f"and {self.ncc.other_photos:,} pairs of" if self.ncc.other_photos else "not checked against"
        return f"{self.level:.2g}, {how.format(self.ncc.pairs)}, {others} other photographs of one person"


class Tier(StrEnum):
    """What a finding is."""

    SAME_PHOTO = "same photo"
    SAME_PERSON = "same person"
    BLEND = "blend of two people"
    LOOK_ALIKE = "look-alike / indeterminate"
    HUB = "hub"
    NOT_CALIBRATED = "not calibrated"


class Evidence(NamedTuple):
    """What is known of one listed pair."""

    discovery: bool | None
    """The person is a discovery of the controlled test with the first model; None where no test was possible."""
    second_z: float | None
    """The standardised score of the second model; None without one."""
    second_cut: float | None
    """The second model's level that few control persons reach (1 %); None without controls."""
    signals: CopySignals | None
    """None where the pixels were not compared."""
    thresholds: CopyThresholds | None
    """None without control pairs."""
    blend: bool | None
    """The release image has a second source by the decoy-partner test (`operators.blends`); None where not tested."""
    hub: bool
    """One of the two images is in abnormally many neighbour lists."""
    same_bytes: bool = False
    """Both files have the same SHA-256."""


def compare(release: Picture, gallery: Picture) -> CopySignals:
    """The signals of one pair; `release` is taken as it is, `gallery` straight and mirrored.

    Raises
    ------
    ValueError
        If a face is not uint8 of shape (112, 112, 3), or an image not uint8 of shape (H, W, 3).
    """
    for face_HWC, image_HWC in (release, gallery):
        wrong = face_HWC.shape != (FACE_PIXELS, FACE_PIXELS, 3) or image_HWC.ndim != 3 or image_HWC.shape[2] != 3
        if wrong or face_HWC.dtype != np.uint8 or image_HWC.dtype != np.uint8 or not image_HWC.size:
            shapes = f"{face_HWC.dtype} {face_HWC.shape} and {image_HWC.dtype} {image_HWC.shape}"
            raise ValueError(f"a face is uint8 (112, 112, 3) and an image uint8 (H, W, 3). Got {shapes}.")
    own, (face, whole) = perceptual_hash(release.image_HWC), gallery
    far = [float((own != perceptual_hash(image)).mean()) for image in (whole, whole[:, ::-1])]
    near = [registered(release.face_HWC, aligned) for aligned in (face, np.ascontiguousarray(face[:, ::-1]))]
    hash_mirrored, face_mirrored = far[1] < far[0], near[1][0] > near[0][0]
    return CopySignals(far[hash_mirrored], *near[face_mirrored], hash_mirrored, face_mirrored)


def perceptual_hash(image_HWC: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The 256 bits of the image's perceptual hash: low frequencies of its grey levels against their median."""
    import imagehash
    import PIL.Image

    bits = imagehash.phash(PIL.Image.fromarray(image_HWC), hash_size=HASH_SIDE).hash
    return np.asarray(bits, np.bool_).ravel()


def registered(release_HWC: NDArray[np.uint8], gallery_HWC: NDArray[np.uint8]) -> tuple[float, float]:
    """Correlation and structural similarity of two aligned faces, the second brought onto the first.

    A detector places the landmarks of a cropped or mirrored copy a little differently, which costs more correlation
    than what was done to the copy. So the gallery face is shifted to the best place, then moved by the affine map that
    maximises the correlation (ECC: Evangelidis & Psarakis, IEEE PAMI 30(10), 2008); the better of the two counts.
    """
    import cv2

    grey, other = (cv2.cvtColor(face, cv2.COLOR_RGB2GRAY).astype(np.float32) for face in (release_HWC, gallery_HWC))
    inside = (slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))
    own, mask = np.ascontiguousarray(grey[inside]), np.zeros(grey.shape, np.uint8)
    mask[inside] = 1
    if own.std() < 1 or other.std() < 1:  # a plain surface correlates with nothing
        return 0.0, similarity(own, other[inside])
    x, y = cv2.minMaxLoc(cv2.matchTemplate(other, own, cv2.TM_CCOEFF_NORMED))[3]
    maps = [np.array([[1, 0, x - MARGIN], [0, 1, y - MARGIN]], np.float32)]
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, STEPS, STEP_LIMIT)
    # Faces too different to be brought together are an error of OpenCV's: the shift then stands.
    with suppress(cv2.error):
        maps.append(cv2.findTransformECC(grey, other, maps[0].copy(), cv2.MOTION_AFFINE, criteria, mask, 5)[1])
    found = []
    for map_23 in maps:
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        moved = cv2.warpAffine(other, map_23, grey.shape, flags=flags, borderMode=cv2.BORDER_REPLICATE)[inside]
        ncc = float(np.corrcoef(own.ravel(), moved.ravel())[0, 1]) if moved.std() >= 1 else 0.0
        found.append((ncc, similarity(own, moved)))
    return max(found)


def similarity(left_HW: NDArray[np.float32], right_HW: NDArray[np.float32]) -> float:
    """Mean structural similarity of grey images, over the places where the window lies wholly inside."""
    import cv2

    def mean(pixels_HW: NDArray[np.float64]) -> NDArray[np.float64]:
        edge = WINDOW // 2
        blurred = cv2.GaussianBlur(pixels_HW, (WINDOW, WINDOW), SIGMA)
        return np.asarray(blurred, np.float64)[edge:-edge, edge:-edge]

    left, right = left_HW.astype(np.float64), right_HW.astype(np.float64)
    at_left, at_right = mean(left), mean(right)
    spread = mean(left * left) + mean(right * right) - at_left**2 - at_right**2
    shared = mean(left * right) - at_left * at_right
    brightness = (2 * at_left * at_right + DARK) / (at_left**2 + at_right**2 + DARK)
    return float((brightness * (2 * shared + FLAT) / (spread + FLAT)).mean())


def cut(reference_N: NDArray[np.float64], level: float) -> Cut:
    """The lowest value v with (1 + #{reference >= v}) / (1 + N) <= `level`, a conformal p-value; higher is more alike.

    Where N pairs cannot measure so fine a level, v lies just above all of them, and the level is 1 / (1 + N).

    Raises
    ------
    ValueError
        If `reference_N` is empty or holds a value that is not finite, or `level` is not between 0 and 1.
    """
    if not len(reference_N) or not np.isfinite(reference_N).all():
        raise ValueError("reference_N must hold at least one value, all of them finite.")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1. Got {level}.")
    passing = int(level * (len(reference_N) + 1) + 1e-9) - 1
    finest, passing = passing < 0, max(passing, 0)
    value = np.nextafter(np.sort(reference_N)[::-1][passing], np.inf)
    return Cut(float(value), (passing + 1) / (len(reference_N) + 1), len(reference_N), finest)


def calibrate(
    control: Sequence[CopySignals],
    other_photos: Sequence[CopySignals] = (),
    *,
    level: float = LEVEL,
    other_level: float = OTHER_LEVEL,
) -> CopyThresholds | None:
    """The thresholds of the three signals; None without control pairs.

    Each signal gets a third of the level, so that a pair that passes by any of them is as rare as `level` says (the
    union bound; the signals depend on each other).

    Parameters
    ----------
    control
        Signals of release x control pairs, chosen by the rule that chose the pairs to be judged (for example the best
        control image of each release image): only then are the two comparable.
    other_photos
        Signals of pairs of different photographs of one training person; the stricter of the two levels counts. Control
        pairs show different people: on the ORL faces a third of such pairs pass a level from control pairs alone.
    level, other_level
        Shares of the two that may pass.
    """
    if not control:
        return None
    cuts = []
    for name, sign in (("hash_distance", -1.0), ("ncc", 1.0), ("ssim", 1.0)):
        found = [
            cut(sign * np.array([getattr(pair, name) for pair in pairs], np.float64), wanted / 3)
            for pairs, wanted in ((control, level), (other_photos, other_level))
            if pairs
        ]
        value = max(one.value for one in found)
        cuts.append(found[0]._replace(value=sign * value, other_photos=len(other_photos)))
    return CopyThresholds(*cuts)


def passing(signals: CopySignals, thresholds: CopyThresholds) -> list[str]:
    """The signals that say `same photo`, in words with their levels."""
    low, ncc, ssim = thresholds
    said = (
        (signals.hash_distance <= low.value, f"hash distance {signals.hash_distance:.3f} (at most {low.value:.3f})"),
        (signals.ncc >= ncc.value, f"correlation {signals.ncc:.3f} (at least {ncc.value:.3f})"),
        (signals.ssim >= ssim.value, f"structural similarity {signals.ssim:.3f} (at least {ssim.value:.3f})"),
    )
    return [words for passes, words in said if passes]


def tier(evidence: Evidence) -> tuple[Tier, tuple[str, ...]]:
    """The tier of a pair and the reasons, from the evidence alone.

    Equal files are the same photo whatever else is known. A hub is like everybody, so it comes before every similarity.
    Without a controlled claim nothing more is said. A copy needs one model beside the pixels, the same person both. A
    blend comes before the same person, because its stronger source passes for one, and before the same photo unless
    other photographs bound the thresholds: those of control pairs let most blends of 70 to 30 pass.
    """
    if evidence.same_bytes:
        return Tier.SAME_PHOTO, ("both files have the same bytes",)
    if evidence.hub:
        return Tier.HUB, ("one of the two images is near abnormally many others",)
    if evidence.discovery is None:
        return Tier.NOT_CALIBRATED, ("no controlled claim: nothing says how alike strangers are here",)
    second, copied, bounded = False, list[str](), False
    reasons = ["a discovery of the first model" if evidence.discovery else "no discovery of the first model"]
    if evidence.second_z is None or evidence.second_cut is None:
        reasons.append("no second model")
    else:
        second = evidence.second_z >= evidence.second_cut
        verb = "confirms" if second else "does not confirm"
        reasons.append(f"the second model {verb} (z {evidence.second_z:.2f}, level {evidence.second_cut:.2f})")
    if evidence.signals is None or evidence.thresholds is None:
        reasons.append("pixels were not compared")
    else:
        copied, bounded = passing(evidence.signals, evidence.thresholds), evidence.thresholds.ncc.other_photos > 0
        reasons.append(f"pixels at level {evidence.thresholds.says}: {'; '.join(copied) or 'no copy'}")
    if evidence.blend:
        reasons.append("a second source by the decoy-partner test")
    if copied and (evidence.discovery or second) and (bounded or not evidence.blend):
        return Tier.SAME_PHOTO, tuple(reasons)
    if evidence.blend:
        return Tier.BLEND, tuple(reasons)
    return Tier.SAME_PERSON if evidence.discovery and second else Tier.LOOK_ALIKE, tuple(reasons)
