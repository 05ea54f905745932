import numpy as np
import pytest
from scipy.stats import ks_2samp

from operators.comparability import Comparison, GateConfig, Placebo, evidence, gate, placebo


def test_the_gate_compares_the_bodies_only() -> None:
    rng = np.random.default_rng(0)
    member, control = rng.normal(0, 1, 600), rng.normal(0, 1, 500)
    member[:60] += 8  # leaks lie above the pooled 80 % quantile
    cut = np.quantile(np.concatenate([member, control]), 0.8)
    expected = ks_2samp(member[member < cut], control[control < cut])
    found = gate(np.append(member, np.nan), control, GateConfig())
    assert (found.distance, found.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert (found.members, found.controls) == ((member < cut).sum(), (control < cut).sum())
    assert found.passed
    assert found.rule == "p"
    assert ks_2samp(member, control).pvalue < 0.01, "the whole samples differ"


def test_shifted_bodies_fail() -> None:
    rng = np.random.default_rng(1)
    found = gate(rng.normal(0.5, 1, 600), rng.normal(0, 1, 500), GateConfig())
    assert not found.passed
    assert found.p < 0.01


@pytest.mark.parametrize(("shift", "passed", "warned"), [(0.0, True, False), (0.02, True, True), (0.04, False, False)])
def test_many_controls_are_judged_by_distance(shift: float, passed: bool, warned: bool) -> None:
    """Evenly spread values: the distance is the shift, and 0.02 is significant but small."""
    control = np.linspace(0, 1, 40_000)
    found = gate(control + shift, control, GateConfig(body=0.99))
    assert found.rule == "distance"
    assert found.distance == pytest.approx(shift, abs=0.002)
    assert (found.passed, found.warned) == (passed, warned)


def test_numbers_of_images_are_compared_whole() -> None:
    member, control = np.repeat([3.0, 3.0], 200), np.repeat([3.0, 4.0], 200)
    assert gate(member, member, GateConfig(), images=True).passed
    found = gate(member, control, GateConfig(), images=True)
    assert found.distance == 0.5
    assert not found.passed


def test_an_empty_body_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have a body\. Got 0 and"):
        gate(np.full(5, np.nan), np.arange(5.0), GateConfig())
    with pytest.raises(ValueError, match="body must lie between 0 and 1"):
        GateConfig(body=1.0)


def test_the_placebo_passes_only_without_discovery_and_excess() -> None:
    rng = np.random.default_rng(2)
    member, control = rng.normal(0, 1, 1000), rng.normal(0, 1, 1000)
    clean = placebo(np.append(member, np.nan), control, 0.05, 0.01, GateConfig())
    assert (clean.discoveries, clean.passed) == (0, True)
    assert clean.p is not None
    leaked = member.copy()
    leaked[:40] += 10
    found = placebo(leaked, control, 0.05, 0.01, GateConfig())
    assert found.discoveries >= 40
    assert not found.passed
    many = placebo(member + 0.8, control, 0.05, 0.01, GateConfig())  # a shift: an excess, whether listed or not
    assert many.p is not None
    assert many.p < 0.01
    assert not many.passed


def test_a_placebo_with_few_controls_has_no_excess_test() -> None:
    found = placebo(np.arange(20.0), np.arange(20.0), 0.05, 0.01, GateConfig())
    assert (found.p, found.passed) == (None, True)


GOOD = Comparison(0.01, 0.6, 800, 800, True, False, "p")
BAD = Comparison(0.2, 1e-9, 800, 800, False, False, "p")
CLEAN = Placebo(0, 0.5, True)
DIRTY = Placebo(3, 0.001, False)


@pytest.mark.parametrize(
    ("source", "gated", "tried", "images", "neutral", "groups", "grade", "claim"),
    [
        ("none", None, None, None, True, None, "C", False),
        ("hold_out", None, None, None, True, None, "C", False),
        ("hold_out", GOOD, None, None, True, None, "A", True),
        ("hold_out", BAD, None, None, True, None, "A", True),  # a hold-out is comparable: many leaked
        ("hold_out", BAD, None, None, False, None, "A", False),  # unless the face model favours one arm
        ("hold_out", GOOD, DIRTY, None, True, None, "A", False),
        ("other", GOOD, CLEAN, GOOD, True, True, "B", True),
        ("other", GOOD, CLEAN, GOOD, True, None, "B", True),
        ("other", BAD, CLEAN, GOOD, True, True, "C", False),
        ("other", GOOD, DIRTY, GOOD, True, True, "C", False),
        ("other", GOOD, None, GOOD, True, True, "C", False),
        ("other", GOOD, CLEAN, BAD, True, True, "C", False),
        ("other", GOOD, CLEAN, None, True, True, "C", False),
        ("other", GOOD, CLEAN, GOOD, True, False, "C", False),
        ("other", GOOD, CLEAN, GOOD, False, True, "C", False),
    ],
)
def test_grades(source, gated, tried, images, neutral, groups, grade, claim) -> None:  # type: ignore[no-untyped-def]
    found = evidence(source, gated, tried, images, neutral=neutral, groups_matched=groups)
    assert (found.grade, found.claim) == (grade, claim)
    assert found.reasons
    assert all(reason.endswith(".") for reason in found.reasons)


def test_every_fault_is_named() -> None:
    found = evidence("other", BAD, DIRTY, BAD, neutral=False, groups_matched=False)
    text = " ".join(found.reasons)
    for part in ("3 discoveries", "p = 0.001", "face model", "distance 0.200", "Cap the images", "Match them"):
        assert part in text
    assert "No placebo" in " ".join(evidence("other", GOOD, None, GOOD, neutral=True, groups_matched=None).reasons)
