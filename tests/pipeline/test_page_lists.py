"""The tables of pairs, rejects and clusters: what they hold, and that they say how much that is."""

from operators.tables import CANDIDATES, REJECTS
from pipeline.page_lists import PAIRS_HELD, cluster_grid, pairs_table, rejects_table
from pipeline.wording import without_folders


def test_pairs_are_held_up_to_a_limit() -> None:
    row = {"arm": "training", "release_key": "r", "gallery_key": "g", "cosine": 0.9, "same_bytes": True}
    many = {"release_multiplicity": 3, "gallery_multiplicity": 2}
    made = pairs_table(CANDIDATES.from_rows([row | many | {"rank": n} for n in range(1, PAIRS_HELD + 3)]))
    assert made is not None and len(made.rows) == PAIRS_HELD
    assert "identical file bytes" in [part.text for part in made.rows[0].cells[3]]
    assert made.rows[0].keys == [1, None, None, 0.9, 3, 2]
    assert pairs_table(None) is None and pairs_table(CANDIDATES.from_rows([])) is None


def test_reasons_of_rejects_have_no_folders() -> None:
    one = {"set": "release", "key": "k", "status": "not_an_image", "error": "cannot open '/home/me/k'"}
    made = rejects_table(REJECTS.from_rows([one, {"key": "only"}]), without_folders)
    assert made is not None
    assert [part.text for cell in made.rows[0].cells for part in cell] == [
        "release",
        "k",
        "not an image",
        "cannot open '…/k'",
    ]
    assert rejects_table(REJECTS.from_rows([]), str) is None


def test_clusters_are_counted_with_the_listed_ones() -> None:
    one = {
        "name": 1,
        "people": [1, 5],
        "release_identities": [f"s{n}" for n in range(8)],
        "release_images": 9,
        "best": 0.9,
    }
    claimed, unclaimed = cluster_grid([one], {1, 2}), cluster_grid([one], None)
    assert claimed is not None and unclaimed is not None
    assert claimed.rows[0] == ["1", "2 people", "1", "8: s0, s1, s2, s3, s4, s5 and 2 more", "9", "0.9000"]
    assert len(unclaimed.columns) == len(unclaimed.rows[0]) == len(claimed.columns) - 1
    assert cluster_grid([], None) is None
