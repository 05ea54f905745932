from pathlib import Path

from operators.tables import UNITS
from pipeline.tiles import pieces


def test_pieces_are_whole_units_in_order(tmp_path: Path) -> None:
    sizes = [3, 4, 5, 20, 1, 1]
    rows = [
        {"unit": f"u{i}", "first_row": sum(sizes[:i]), "members": [{"key": str(j)} for j in range(size)]}
        for i, size in enumerate(sizes)
    ]
    cut_pieces = list(pieces("training", UNITS.from_rows(rows), 8))
    assert [piece.units for piece in cut_pieces] == [("u0", "u1"), ("u2",), ("u3",), ("u4", "u5")]
    assert [row for piece in cut_pieces for row in piece.first_rows] == [0, 3, 7, 12, 32, 33]
