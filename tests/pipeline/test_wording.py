import math

import pytest

from pipeline.wording import cosine, count, estimate, known, measured, p_value, passed_over, percent, spread


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.68, "68 %"), (0.007272727, "0.727 %"), (1.0, "100 %"), (0.0, "0 %"), (-0.008, "−0.8 %"), (0.9996, "100 %"),
     (1e-4, "0.01 %"), (2e-7, "2.0 × 10⁻⁵ %"), (-2e-7, "−2.0 × 10⁻⁵ %")],
)  # fmt: skip
def test_shares_are_in_per_cent(value: float, text: str) -> None:
    assert percent(value) == text


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_not_known_is_not_a_number(value: float | None) -> None:
    assert not known(value)
    assert percent(value) == estimate(value) == p_value(value) == "not estimable"
    assert measured({"value": value, "low": 0.1, "high": 0.2}) == measured(None) == "not estimable"
    assert spread(value, 0.5) == spread(0.5, value) == ""
    assert cosine(value) == "–"


def test_p_values_that_underflow_are_bounded() -> None:
    assert [p_value(p) for p in (1.0, 0.0123, 0.001, 6.8e-78, 0.0)] == [
        "1", "0.012", "0.001", "6.8 × 10⁻⁷⁸", "below 10⁻³⁰⁰",
    ]  # fmt: skip


def test_rates_come_with_their_interval_where_there_is_one() -> None:
    assert measured({"value": 0.4, "low": 0.226, "high": 0.594}) == "40 % (22.6 % to 59.4 %)"
    assert measured({"value": 0.4, "low": None, "high": 0.594}) == "40 %"


def test_counts_have_their_noun_in_the_right_number() -> None:
    assert (count(1, "person", "people"), count(1200, "person", "people"), count(0, "image")) == (
        "1 person", "1,200 people", "0 images",
    )  # fmt: skip


def test_faces_that_were_passed_over_are_summed_over_the_sets() -> None:
    def one(faces: int, images: int) -> dict[str, dict[str, int]]:
        return {"faces": {"passed_over": faces, "images_with_passed_over": images}}

    assert passed_over({"release": one(0, 0), "anchor": {"faces": None}, "training": {}}) == []
    (text,) = passed_over({"release": one(3, 2), "training": one(1000, 500)})
    assert text.startswith("1,003 further faces in 502 images were found and not audited (options faces.several, ")
    assert passed_over({"control": one(1, 1)})[0].startswith("1 further face in 1 image was found and not audited")
