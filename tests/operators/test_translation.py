from collections.abc import Callable

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.stats import kstest

from operators import translation
from operators.errors import CapacityError
from operators.translation import Translation, cosines, disagreement, fit_ridge, fit_rotation, translate


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    raw = rng.standard_normal(shape)
    return raw / np.linalg.norm(raw, axis=-1, keepdims=True)


def rotated(rng: np.random.Generator, count: int, source: int, target: int, noise: float) -> tuple[np.ndarray, ...]:
    """Embeddings of the same faces by two models whose spaces differ by a rotation, and that rotation."""
    x = unit(rng, count, source)
    turn = np.linalg.qr(rng.standard_normal((max(source, target),) * 2))[0][:source, :target]
    y = x @ turn + noise * unit(rng, count, target)
    return x, y / np.linalg.norm(y, axis=1, keepdims=True), turn


@pytest.mark.parametrize(("source", "target"), [(12, 12), (8, 20), (20, 8)])
def test_ridge_is_least_squares_of_extended_equations(source: int, target: int) -> None:
    x, y, _ = rotated(np.random.default_rng(1), 90, source, target, 0.5)
    fitted = fit_ridge(x, y)
    extended = np.concatenate([x, np.sqrt(fitted.penalty) * np.eye(source)])
    expected = np.linalg.lstsq(extended, np.concatenate([y, np.zeros((source, target))]), rcond=None)[0]
    np.testing.assert_allclose(fitted.map_DE, expected, atol=1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_the_penalty_is_the_best_for_faces_left_out(centred: bool) -> None:
    x, y, _ = rotated(np.random.default_rng(2), 30, 10, 6, 1.5)
    x, y = x + 0.1 * centred, y - 0.2 * centred
    fitted = fit_ridge(x, y, centred=centred)

    def left_out(penalty: float) -> float:
        missed = 0.0
        for at in range(len(x)):
            others = np.delete(np.arange(len(x)), at)
            mean_x, mean_y = x[others].mean(axis=0) * centred, y[others].mean(axis=0) * centred
            p, q = x[others] - mean_x, y[others] - mean_y
            told = mean_y + (x[at] - mean_x) @ np.linalg.solve(p.T @ p + penalty * np.eye(10), p.T @ q)
            missed += ((y[at] - told) ** 2).sum()
        return float(np.sqrt(missed / len(x)))

    assert fitted.error == pytest.approx(left_out(fitted.penalty), rel=1e-10)
    tried = translation.PENALTIES * (np.linalg.svd(x - x.mean(axis=0) * centred, compute_uv=False) ** 2).mean()
    assert fitted.error == pytest.approx(min(left_out(penalty) for penalty in tried), rel=1e-10)
    assert tried[0] < fitted.penalty < tried[-1]


def test_a_planted_rotation_comes_back() -> None:
    rng = np.random.default_rng(3)
    x, y, turn = rotated(rng, 400, 16, 16, 0.02)
    np.testing.assert_allclose(fit_rotation(x, y).map_DE, orthogonal_procrustes(x, y)[0], atol=1e-12)
    np.testing.assert_allclose(fit_rotation(x, y).map_DE, turn, atol=0.01)
    np.testing.assert_allclose(fit_ridge(x, y).map_DE, turn, atol=0.02)
    new = unit(rng, 50, 16)
    assert cosines(fit_rotation(x, y), new, new @ turn).min() > 0.999
    stored = translate(fit_ridge(x, y), new.astype(np.float16))
    assert stored.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(stored.astype(float), axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(stored, new @ turn, atol=0.02)


@pytest.mark.parametrize("fit", [fit_ridge, fit_rotation])
def test_spaces_that_lie_to_one_side_need_a_constant(fit: Callable[..., Translation]) -> None:
    """Such a model's cosines are all high; without a constant the way there is lost."""
    x, y, _ = rotated(np.random.default_rng(10), 600, 16, 16, 0.0)
    y = y + 3 * np.eye(16)[0]
    plain, centred = (cosines(fit(x[:500], y[:500], centred=c), x[500:], y[500:]) for c in (False, True))
    assert centred.min() > 0.999 and np.median(plain) < 0.9


@pytest.mark.parametrize(("source", "target"), [(8, 20), (20, 8)])
def test_a_rotation_between_widths_has_orthonormal_sides(source: int, target: int) -> None:
    x, y, turn = rotated(np.random.default_rng(4), 3000, source, target, 0.0)
    turned = fit_rotation(x, y).map_DE
    small = turned @ turned.T if source < target else turned.T @ turned
    np.testing.assert_allclose(small, np.eye(8), atol=1e-12)
    if source < target:
        np.testing.assert_allclose(turned, turn, atol=1e-10)


def test_two_arms_through_one_bad_map_keep_valid_p_values() -> None:
    """The map is noise, fitted to faces of another world; control and null members still rank alike."""
    rng = np.random.default_rng(5)
    bad = fit_ridge(unit(rng, 40, 12), unit(rng, 40, 9))
    p = []
    for _ in range(200):
        release = unit(rng, 25, 9).astype(np.float16)
        best = [
            (translate(bad, unit(rng, n, 12)).astype(float) @ release.T.astype(float)).max(axis=1) for n in (4, 199)
        ]
        p += [(1 + (best[1] >= score).sum()) / 200 for score in best[0]]
    values = np.array(p) - np.random.default_rng(6).uniform(0, 1 / 200, len(p))  # from a grid to the line
    assert kstest(values, "uniform").pvalue > 0.01


def test_disagreement_flags_what_control_images_never_show() -> None:
    rng = np.random.default_rng(7)
    x, y, _ = rotated(rng, 3000, 16, 12, 0.3)
    fitted = fit_ridge(x[:500], y[:500])
    control, same = cosines(fitted, x[500:2500], y[500:2500]), cosines(fitted, x[2500:], y[2500:])
    triggered = cosines(fitted, x[2500:2600], unit(rng, 100, 12))
    found = disagreement(np.concatenate([same, triggered]), control)
    assert found.cut.level == pytest.approx(2 / 2001) and not found.cut.finest
    assert (control <= found.cut.value).sum() == 1  # with the image itself two of 2,001: one in a thousand
    assert found.flagged_N[:500].mean() < 0.01 and found.flagged_N[500:].mean() > 0.5
    few = disagreement(same, control[:49])
    assert few.cut.finest and few.cut.level == 1 / 50 and few.cut.pairs == 49
    np.testing.assert_array_equal(few.flagged_N, same < control[:49].min())


def test_too_few_pairs_are_refused_with_the_number_needed() -> None:
    rng = np.random.default_rng(8)
    with pytest.raises(CapacityError, match=r"31 paired faces .* 16 components: 32 are needed"):
        fit_ridge(unit(rng, 31, 16), unit(rng, 31, 8))
    with pytest.raises(CapacityError, match="7 paired faces do not determine a rotation of 8 components"):
        fit_rotation(unit(rng, 7, 16), unit(rng, 7, 8))
    with pytest.raises(CapacityError, match="no control image"):
        disagreement(np.ones(3), np.zeros(0))


def test_wrong_shapes_are_refused() -> None:
    rng = np.random.default_rng(9)
    x, y, _ = rotated(rng, 40, 6, 4, 0.1)
    fitted = fit_ridge(x, y)
    with pytest.raises(ValueError, match=r"one finite row per face each. Got \(40, 6\) and \(39, 4\)"):
        fit_ridge(x, y[1:])
    with pytest.raises(ValueError, match="one finite row"):
        fit_rotation(np.where(x > 2, x, np.nan), y)
    with pytest.raises(ValueError, match="must have 6 components"):
        translate(fitted, y)
    with pytest.raises(ValueError, match="must have 4 components"):
        cosines(fitted, x, x)
    with pytest.raises(ValueError, match="1 translated vectors are not finite or are zero"):
        translate(fitted, np.zeros((1, 6)))
    assert cosines(fitted, np.zeros((1, 6)), y[:1]) == 0
