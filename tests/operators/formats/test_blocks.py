"""Many pieces of a file at once are those that slices of its bytes give."""

import io
import random
from pathlib import Path

import numpy as np
import pytest

from operators.formats.blocks import BLOCK, begin, gather, numbers, runs, slices
from operators.formats.rasters import SIGNATURES

DATA = random.Random(0).randbytes(3 * BLOCK)


@pytest.mark.parametrize("spread", [100, 5000, 40_000])
@pytest.mark.parametrize("local", [True, False])
def test_pieces_are_those_of_the_file_in_any_order_and_zeros_behind_its_end(
    tmp_path: Path, spread: int, local: bool
) -> None:
    (tmp_path / "x").write_bytes(DATA)
    rng = random.Random(spread)
    starts = [*range(0, len(DATA) + 50, spread), len(DATA) - 3, len(DATA) + 9]
    rng.shuffle(starts)
    with (tmp_path / "x").open("rb") if local else io.BufferedReader(io.BytesIO(DATA)) as file:
        found = gather(file, np.array(starts), 20)
    assert [bytes(one) for one in found] == [DATA[at : at + 20].ljust(20, b"\0") for at in starts]


def test_no_pieces_are_an_empty_array() -> None:
    assert gather(io.BufferedReader(io.BytesIO(DATA)), np.zeros(0, np.int64), 7).shape == (0, 7)


def test_numbers_are_those_that_int_from_bytes_gives() -> None:
    pieces = np.frombuffer(DATA[:90], np.uint8).reshape(9, 10)
    for code, size, order, signed in (("<u2", 2, "little", False), (">i4", 4, "big", True), ("<i8", 8, "little", True)):
        expected = [int.from_bytes(bytes(one[1 : 1 + size]), order, signed=signed) for one in pieces]  # type: ignore[arg-type]
        assert numbers(pieces, 1, code).tolist() == expected


def test_what_begins_with_a_signature_does_so_for_bytes_too() -> None:
    heads = [one.ljust(8, b"\1") for one in SIGNATURES] + [b"\xff\xd8\xfe12345", b"P7 12345", b"RIFE1234", bytes(8)]
    found = begin(np.frombuffer(b"".join(heads), np.uint8).reshape(-1, 8), SIGNATURES)
    assert found.tolist() == [one.startswith(SIGNATURES) for one in heads]


def test_ranges_come_once_each_and_in_order_whatever_lies_between_them() -> None:
    rng = random.Random(3)
    begins, ends, at = [], [], 0
    while at < len(DATA) - 200_000:
        begins.append(at)
        ends.append(at + rng.choice((0, 8, 900, 30_000)))
        at = rng.choice((ends[-1], ends[-1] + 70, ends[-1] + 9000, ends[-1] + 40_000))
    order = list(range(len(begins)))
    for swap in (5, 20):
        order[swap], order[swap + 3] = order[swap + 3], order[swap]
    begins_N, ends_N = np.array(begins)[order], np.array(ends)[order]
    starts_N = begins_N + (ends_N - begins_N) // 3
    rows, found = [], []
    for low, high, _, some, _ in slices(io.BufferedReader(io.BytesIO(DATA)), begins_N, ends_N, starts_N, ends_N):
        rows += range(low, high)
        found += some
    assert rows == list(range(len(order)))
    assert [bytes(one) for one in found] == [DATA[a:b] for a, b in zip(starts_N.tolist(), ends_N.tolist(), strict=True)]
    most = max(ends_N[high - 1] - begins_N[low] for low, high in runs(begins_N, ends_N))
    assert most <= BLOCK


def test_a_block_that_the_file_ends_in_gives_no_ranges() -> None:
    begins_N = np.arange(0, 4 * BLOCK, BLOCK // 2)
    ends_N = begins_N + BLOCK // 2
    got = [
        (low, high, len(some))
        for low, high, _, some, _ in slices(
            io.BufferedReader(io.BytesIO(DATA[: BLOCK + 5])), begins_N, ends_N, begins_N, ends_N
        )
    ]
    assert sum(count for *_, count in got) == 2
    assert [high for _, high, _ in got][-1] == len(begins_N)
