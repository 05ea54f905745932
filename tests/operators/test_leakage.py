import pyarrow as pa

from operators import leakage
from operators.tables import CANDIDATES, FINDINGS, PAIRS


def columns(prefix: str, identities: list[str | None]) -> pa.Table:
    count = len(identities)
    return pa.table(
        {
            "key": [f"{prefix}{i}" for i in range(count)],
            "identity": pa.array(identities, pa.string()),
            "digest": [f"d{i}" for i in range(count)],
        }
    )


RELEASE = columns("s", ["a", "a", "b", None])
TRAINING = columns("r", ["p", "p", "q"])
FOUND = PAIRS.from_rows(
    [
        {"release_row": 0, "arm": "training", "gallery_row": 1, "cosine": 0.8},
        {"release_row": 1, "arm": "training", "gallery_row": 1, "cosine": 0.9},
        {"release_row": 2, "arm": "training", "gallery_row": 2, "cosine": 0.8},
        {"release_row": 3, "arm": "training", "gallery_row": 0, "cosine": 0.3},
        {"release_row": 0, "arm": "control", "gallery_row": 0, "cosine": 0.95},
    ]
)


def test_candidates_are_ranked_with_their_multiplicities() -> None:
    listed = CANDIDATES.check(leakage.candidates(FOUND, "training", 0.8, RELEASE, TRAINING))
    rows = listed.select(["rank", "release_key", "gallery_key", "gallery_multiplicity", "same_bytes"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (1, "s1", "r1", 2, True),
        (2, "s0", "r1", 2, False),
        (3, "s2", "r2", 1, True),
    ]


def test_findings_are_persons_and_the_control_arm_is_not_among_them() -> None:
    persons = FINDINGS.check(leakage.findings(leakage.candidates(FOUND, "training", 0.8, RELEASE, TRAINING)))
    rows = persons.select(["rank", "training_identity", "release_key", "candidates", "release_images"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [(1, "p", "s1", 2, 2), (2, "q", "s2", 1, 1)]


def test_without_labels_every_training_image_is_its_own_person() -> None:
    unlabelled = columns("r", [None, None, None])
    persons = leakage.findings(leakage.candidates(FOUND, "training", 0.0, RELEASE, unlabelled))
    assert persons["training_key"].to_pylist() == ["r1", "r2", "r0"]


def test_an_image_key_is_not_confused_with_an_identity() -> None:
    assert leakage.person("x", "y") != leakage.person(None, "x")


def test_arm_counts() -> None:
    listed = leakage.candidates(FOUND, "training", 0.8, RELEASE, TRAINING)
    assert leakage.arm_count(listed, 12, 0.9) == leakage.ArmCount(12, 3, 3, 2, 0.9)
    empty = leakage.candidates(FOUND, "anchor", 0.8, RELEASE, TRAINING)
    assert leakage.arm_count(empty, 0, None) == leakage.ArmCount(0, 0, 0, 0, None)
