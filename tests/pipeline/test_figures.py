import io
import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import PIL.Image
import pytest

from pipeline.figures import POINTS, best_match_figure, bin_edges, exceedance, exceedance_figure

SVG = "{http://www.w3.org/2000/svg}"
FIGURES = [best_match_figure, exceedance_figure]


@pytest.fixture
def best():
    rng = np.random.default_rng(0)
    return {"training": rng.normal(0.3, 0.05, 2000), "control": rng.normal(0.29, 0.05, 1500)}


def test_exceedance_counts_values_at_or_over_each():
    cosines, shares = exceedance(np.array([0.5, 0.2, 0.5, 0.9]))
    assert cosines.tolist() == [0.2, 0.5, 0.9]
    assert shares.tolist() == [1.0, 0.75, 0.25]


def test_exceedance_of_many_values_keeps_both_ends_and_stays_exact():
    values = np.random.default_rng(1).normal(size=50_000)
    cosines, shares = exceedance(values)
    assert len(cosines) <= POINTS
    assert cosines[-1] == values.max()
    assert cosines[0] == values.min()
    for cosine, share in zip(cosines[::37], shares[::37], strict=True):
        assert share == (values >= cosine).mean()


def test_bins_lie_on_multiples_and_hold_everything():
    edges = bin_edges({"training": np.array([0.205, 0.331])}, threshold=0.4)
    assert np.allclose(edges / 0.02, np.round(edges / 0.02))
    assert edges[0] <= 0.205
    assert edges[-1] > 0.4


@pytest.mark.parametrize("draw", FIGURES)
def test_the_same_input_gives_the_same_bytes(draw, best):
    first = draw(best, 0.42)
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "axes.facecolor": "red"}):
        assert draw(dict(reversed(best.items())), 0.42) == first


@pytest.mark.parametrize("draw", FIGURES)
def test_a_figure_is_one_svg_that_says_what_it_shows(draw, best):
    best["training"][0] = 0.91
    root = ET.fromstring(draw(best, 0.42))
    text = " ".join(node.text or "" for node in root.iter(f"{SVG}text"))
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}title").text
    over = int((best["training"] >= 0.42).sum())
    assert f"training: {over:,} of 2,000 at or over, highest 0.910" in text
    assert f"training: {over:,} of 2,000 at or over" in root.find(f"{SVG}desc").text
    assert "threshold 0.420" in text
    assert root.get("aria-labelledby").split() == [root.find(f"{SVG}{name}").get("id") for name in ("title", "desc")]


@pytest.mark.parametrize("draw", FIGURES)
def test_a_figure_refers_to_nothing_outside_and_styles_nothing_else(draw, best):
    svg = draw(best, 0.42)
    assert re.findall(r"https?:[^\"]*", svg) == ["http://www.w3.org/2000/svg"]
    assert "<style" not in svg
    assert "<metadata" not in svg


def test_the_figures_share_no_id(best):
    ids = [set(re.findall(r' id="([^"]+)"', draw(best, 0.42))) for draw in FIGURES]
    assert ids[0] and ids[1]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("draw", FIGURES)
def test_sets_without_values_are_left_out(draw, best):
    assert "control" not in draw({"training": best["training"], "control": np.array([np.nan])}, 0.42)
    assert "nothing was compared" in draw({}, 0.42)


@pytest.mark.parametrize("draw", FIGURES)
def test_one_value_and_an_unforeseen_name_can_be_drawn(draw):
    assert "&lt;b&gt;" in draw({"<b>": np.array([0.5]), "anchor": np.array([-0.9, 1.0])}, 0.42)


@pytest.mark.parametrize("draw", FIGURES)
def test_a_png_is_the_figure_on_white_without_metadata(draw, best):
    drawn = draw(best, 0.42)
    data = drawn.png()
    assert data == drawn.png() == draw(dict(reversed(best.items())), 0.42).png()
    assert drawn == draw(best, 0.42), "drawing the PNG leaves the SVG as it was"
    image = PIL.Image.open(io.BytesIO(data))
    chunks = set(re.findall(rb"(?:tEXt|iTXt|zTXt|tIME|eXIf)", data))
    assert not chunks
    pixels = np.asarray(image.convert("RGBA"))
    assert image.size[0] > 1400, "two dots for each pixel of the page"
    assert (pixels[..., 3] == 255).all() and (pixels[0, -1] == 255).all()
    orange = (np.abs(pixels[..., :3].astype(int) - (0xC2, 0x41, 0x0C)).max(axis=2) < 8).sum()
    assert orange > 500, "the curve of the training set"


def test_an_svg_can_stand_in_a_file_of_its_own(best):
    drawn = best_match_figure(best, 0.42)
    assert drawn.name == "best-match" and drawn.startswith("<svg") and 'xmlns="http://www.w3.org/2000/svg"' in drawn
    assert ET.fromstring(f"{drawn}\n".encode()).get("viewBox")
