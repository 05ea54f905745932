"""The figure of the ROC curve, read back from its SVG."""

import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from pipeline.figures import best_match_figure
from pipeline.roc import drawn, roc_figure

SVG = "{http://www.w3.org/2000/svg}"
CURVE = [[0.0, 0.0, 0.01, 0.1, 1.0], [0.0, 0.02, 0.1, 0.4, 1.0]]
AT = {"fpr": 0.01, "tpr": 0.1, "tpr_low": 0.07, "tpr_high": 0.14, "fpr_low": 0.005, "fpr_high": 0.018}


def words(svg: str) -> str:
    return " ".join(node.text or "" for node in ET.fromstring(svg).iter(f"{SVG}text"))


def test_rates_below_the_axes_lie_on_them_and_order_is_kept() -> None:
    x, y = drawn(np.array(CURVE), 0.0005, 0.00025)
    assert x.tolist() == [0.0005, 0.0005, 0.01, 0.1, 1.0]
    assert y.tolist() == [0.00025, 0.02, 0.1, 0.4, 1.0]


def test_a_thinned_curve_gets_its_first_step_back() -> None:
    x, y = drawn(np.array([[0.0, 0.01, 1.0], [0.0, 0.7, 1.0]]), 0.005, 0.001)
    assert (x.tolist(), y.tolist()) == ([0.005, 0.005, 0.01, 1.0], [0.001, 0.7, 0.7, 1.0])


def test_the_low_region_and_what_cannot_be_estimated_are_marked() -> None:
    made = roc_figure(CURVE, 2000, 1000, [AT])
    said = words(made)
    for text in ("low region: 1 % or less", "under 10 controls: not estimable", "chance", "box of both rates, 95 %"):
        assert text in said
    told = ET.fromstring(made).find(f"{SVG}desc")
    assert told is not None and told.text is not None
    assert "Below a false positive rate of 1 %, where fewer than 10 of 1000 controls" in told.text
    assert "the curve reaches 10 %. At 1 %: 10 %." in told.text
    assert "box of both" not in words(roc_figure(CURVE, 2000, 1000))


def test_the_same_input_gives_the_same_bytes_and_refers_to_nothing() -> None:
    first = roc_figure(CURVE, 2000, 1000, [AT])
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30}):
        assert roc_figure(CURVE, 2000, 1000, [AT]) == first
    assert re.findall(r"https?:[^\"]*", first) == ["http://www.w3.org/2000/svg"]
    assert "<style" not in first and first.startswith("<svg")
    other = best_match_figure({"training": np.array([0.2, 0.5])}, 0.4)
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, other)]
    assert ids[0] and not ids[0] & ids[1]


@pytest.mark.parametrize("controls", [1, 8, 2_000_000])
def test_few_and_many_controls_can_be_drawn(controls: int) -> None:
    assert "not estimable" in words(roc_figure([[0.0, 1.0], [0.0, 1.0]], 1, controls))


def test_what_is_no_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="as many"):
        roc_figure([[0.0, 1.0], [0.0]], 5, 5)
    with pytest.raises(ValueError, match="at least 1"):
        roc_figure(CURVE, 0, 5)
