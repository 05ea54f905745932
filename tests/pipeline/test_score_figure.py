"""The figure of all comparisons, read back from its SVG, against counts by NumPy."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pyarrow as pa
import pytest

from operators.tables import SCORES
from pipeline.score_figure import curves, score_figure

EDGES = np.arange(-101, 102) / 100


def scores(basis: str, lowest: float = -2.0, **cosines: np.ndarray) -> pa.Table:
    """SCORES of these cosines, counted one edge at a time."""
    rows = [
        {"arm": arm, "cosine": edge, "pairs": int((own >= edge).sum()), "comparisons": len(own), "basis": basis}
        for arm, own in cosines.items()
        for edge in EDGES.tolist()
        if edge >= lowest
    ]
    return SCORES.from_rows(rows)


@pytest.fixture
def cosines() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"control": rng.normal(0.1, 0.1, 20_000), "training": rng.normal(0.1, 0.12, 30_000)}


def words(svg: str) -> str:
    root = ET.fromstring(svg)
    return " ".join(node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text"))


def test_a_curve_is_the_share_of_comparisons_at_or_over_each_cosine(cosines: dict[str, np.ndarray]) -> None:
    made = curves(scores("all", 0.3, **cosines))
    assert [one.arm for one in made] == ["training", "control"], "always in this order"
    for one in made:
        own = cosines[one.arm]
        assert one.cosine[0] == 0.3 and one.comparisons == len(own)
        np.testing.assert_array_equal(one.share, [(own >= edge).mean() for edge in one.cosine])
        assert one.share[-1] > 0 and (own >= one.cosine[-1] + 0.01).sum() == 0


def test_exact_counts_and_samples_are_told_apart(cosines: dict[str, np.ndarray]) -> None:
    sample = {arm: own[:1000] for arm, own in cosines.items()}
    drawn = score_figure(scores("all", 0.3, **cosines), scores("sample", **sample), 0.35)
    said = words(drawn)
    assert "training: 30,000 comparisons, exactly, from 0.30 up" in said and "threshold 0.350" in said
    assert "control: a random sample of 1,000" in said
    widths = []
    for colour in ("#c2410c", "#0b6fb8"):
        lines = re.findall(rf'<path d="[^"]+" clip-path[^>]*style="([^"]*stroke: {colour}[^"]*)"', drawn)
        widths.append([float(re.findall(r"stroke-width: ([\d.]+)", line)[0]) for line in lines])
    assert all(len(own) == 2 and own[0] > own[1] for own in widths)
    described = ET.fromstring(drawn).find("{http://www.w3.org/2000/svg}desc").text
    assert "a random sample of 1,000" in described and "exactly" in described


def test_where_all_is_counted_no_sample_is_drawn(cosines: dict[str, np.ndarray]) -> None:
    sample = {arm: own[:1000] for arm, own in cosines.items()}
    assert "sample" not in words(score_figure(scores("all", **cosines), scores("sample", **sample), 0.35))


def test_nothing_compared_and_an_empty_tail_can_be_drawn(cosines: dict[str, np.ndarray]) -> None:
    nothing = SCORES.schema.empty_table()
    assert "nothing was compared" in words(score_figure(nothing, nothing, 0.4))
    beyond = scores("all", 0.95, **cosines)
    assert curves(beyond) == []
    said = words(score_figure(beyond, scores("sample", **cosines), 0.97))
    assert "training: a random sample of 30,000" in said and "exactly" not in said
    none = SCORES.from_rows([{"arm": "training", "cosine": 0.5, "pairs": 0, "comparisons": 0, "basis": "all"}])
    assert curves(none) == []


def test_the_same_counts_give_the_same_bytes(cosines: dict[str, np.ndarray]) -> None:
    sample = scores("sample", **{arm: own[:500] for arm, own in cosines.items()})
    first = score_figure(scores("all", 0.3, **cosines), sample, 0.35)
    turned = score_figure(scores("all", 0.3, **dict(reversed(cosines.items()))), sample, 0.35)
    assert first == turned and first.png() == turned.png() and first.name == "scores"
