import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from operators import histogram, vectors
from operators.engines import use_threads
from operators.histogram import EDGES, above, counts_of, exact_counts

Sides = tuple[np.ndarray, np.ndarray]


def heavy(seed: int, count: int, width: int) -> np.ndarray:
    return vectors.normalise(np.random.default_rng(seed).standard_t(2, (count, width)))[0]


def random() -> Sides:
    return heavy(0, 400, 128), heavy(1, 700, 128)


def clustered() -> Sides:
    """Copies and near-copies: cosines of 1, and on both sides of it."""
    rng = np.random.default_rng(2)
    centres = rng.standard_normal((5, 64))
    near = vectors.normalise(centres[rng.integers(5, size=300)] + rng.standard_normal((300, 64)) * 0.02)[0]
    return np.concatenate([near[:150], near[150:200]]), np.concatenate([near[150:], near[:20]])


def one_hot() -> Sides:
    """Cosines of exactly 0, 1 and -1, some of them as sums with a negative zero."""
    eye = np.eye(16, dtype=np.float16)
    return np.concatenate([eye, -eye]), eye


def halves_and_quarters() -> Sides:
    """Cosines that are multiples of 1/4 and of 1/16, so that many lie exactly on an edge."""
    rng = np.random.default_rng(3)
    halves = np.zeros((200, 16))
    for row in halves:
        row[rng.choice(16, 4, replace=False)] = rng.choice([-0.5, 0.5], 4)
    quarters = rng.choice([-0.25, 0.25], (200, 16))
    both = np.concatenate([halves, quarters]).astype(np.float16)
    return both[::2], both[1::2]


def beside_edges() -> Sides:
    """Cosines of c, c - 2^-27 and c + 2^-27 for c = 0, 1/4, 1/2 and 3/4, as sums of c and 30 terms too small for fp32.

    The fp32 sum of such a pair falls on either side of c, whatever the exact sum.
    """
    rng = np.random.default_rng(4)
    left = np.concatenate([np.ones((2, 1)), np.full((2, 30), 2.0**-13), np.zeros((2, 1))], axis=1)
    left[1] *= -1
    right = np.zeros((400, 32))
    right[:, 0] = rng.choice([0, 0.25, 0.5, 0.75], 400)
    steps = rng.integers(-8, 9, (400, 30))
    steps[:, -1] = rng.integers(-1, 2, 400) - steps[:, :-1].sum(1)
    right[:, 1:-1] = steps * 2.0**-14
    right[:, -1] = np.sqrt(1 - right[:, 0] ** 2)
    return left.astype(np.float16), right.astype(np.float16)


def one_row() -> Sides:
    return heavy(4, 1, 32), heavy(5, 1, 32)


SETS = [random, clustered, one_hot, halves_and_quarters, beside_edges, one_row]


def ones(side: np.ndarray) -> np.ndarray:
    return np.ones(len(side), np.int64)


def brute(left: np.ndarray, right: np.ndarray, weight_Q: np.ndarray, weight_G: np.ndarray) -> np.ndarray:
    """Counts from one comparison with every edge."""
    cosines = vectors.exact_matrix(left, right)
    reach = np.array([weight_Q @ ((cosines >= edge) @ weight_G) for edge in EDGES])
    return reach[:-1] - reach[1:]


def fp32_scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return torch.mm(torch.from_numpy(left).float(), torch.from_numpy(right).float().T).double().numpy()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield use_threads
    use_threads(before)


def test_edges_are_the_decimals() -> None:
    assert EDGES.tolist() == [float(f"{i / 100:.2f}") for i in range(-101, 102)]


@pytest.mark.parametrize("made", SETS)
def test_counts_are_those_of_every_exact_cosine(made: Callable[[], Sides]) -> None:
    left, right = made()
    truth = brute(left, right, ones(left), ones(right))
    counts = exact_counts(left, right, ones(left), ones(right))
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, truth)
    np.testing.assert_array_equal(counts_of(vectors.exact_matrix(left, right).ravel()), truth)
    assert counts.sum() == len(left) * len(right)


@pytest.mark.parametrize("made", SETS)
def test_multiplicities_count_as_repeated_rows(made: Callable[[], Sides]) -> None:
    left, right = made()
    rng = np.random.default_rng(6)
    weight_Q, weight_G = rng.integers(0, 4, len(left)), rng.integers(0, 4, len(right))
    counts = exact_counts(left, right, weight_Q, weight_G)
    np.testing.assert_array_equal(counts, brute(left, right, weight_Q, weight_G))
    repeated = np.repeat(left, weight_Q, axis=0), np.repeat(right, weight_G, axis=0)
    np.testing.assert_array_equal(counts, exact_counts(*repeated, ones(repeated[0]), ones(repeated[1])))
    cosines, weights = vectors.exact_matrix(left, right), np.outer(weight_Q, weight_G)
    np.testing.assert_array_equal(counts, counts_of(cosines.ravel(), weights.ravel()))


def test_large_multiplicities_are_counted_without_rounding() -> None:
    left, right = one_hot()
    weight_Q, weight_G = np.full(32, 2**26 + 1), np.full(16, 2**26 + 3)
    counts = exact_counts(left, right, weight_Q, weight_G)
    assert int(counts.sum()) == 32 * 16 * (2**26 + 1) * (2**26 + 3)
    assert int(counts[EDGES.tolist().index(1.0)]) == 16 * (2**26 + 1) * (2**26 + 3)


def test_the_band_around_edges_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second scoring the counts would be wrong, so the sets above do test it."""
    left, right = beside_edges()
    exact, single = vectors.exact_matrix(left, right), fp32_scores(left, right)
    edge = np.round(exact * 4) / 4
    assert ((exact >= edge) & (single < edge)).any() and ((exact < edge) & (single >= edge)).any()
    truth = brute(left, right, ones(left), ones(right))
    monkeypatch.setattr(histogram, "margin", lambda width: -1.0)
    assert (exact_counts(left, right, ones(left), ones(right)) != truth).any()


@pytest.mark.parametrize("made", [random, beside_edges])
def test_fp32_scores_differ_from_the_exact_less_than_the_margin(made: Callable[[], Sides]) -> None:
    left, right = made()
    assert abs(fp32_scores(left, right) - vectors.exact_matrix(left, right)).max() <= histogram.margin(left.shape[1])


@pytest.mark.parametrize("made", [random, halves_and_quarters])
def test_blocks_and_threads_change_nothing(
    made: Callable[[], Sides], monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    left, right = made()
    weight_Q, weight_G = np.arange(len(left)) % 3, np.arange(len(right)) % 5
    whole = exact_counts(left, right, weight_Q, weight_G)
    threads(1)
    np.testing.assert_array_equal(exact_counts(left, right, weight_Q, weight_G), whole)
    threads(2)
    monkeypatch.setattr(histogram, "ROWS", 37)
    monkeypatch.setattr(histogram, "COLUMNS", 53)
    np.testing.assert_array_equal(exact_counts(left, right, weight_Q, weight_G), whole)
    swapped = exact_counts(right, left, weight_G, weight_Q)
    np.testing.assert_array_equal(swapped, whole)


@pytest.mark.parametrize("rows", [(0, 5), (5, 0), (0, 0)])
def test_nothing_gives_zeros(rows: tuple[int, int]) -> None:
    left, right = heavy(7, rows[0], 8), heavy(8, rows[1], 8)
    assert exact_counts(left, right, ones(left), ones(right)).tolist() == [0] * (len(EDGES) - 1)
    assert counts_of(np.zeros(0)).tolist() == [0] * (len(EDGES) - 1)
    assert counts_of(np.zeros(0), np.zeros(0, np.int64)).tolist() == [0] * (len(EDGES) - 1)


def test_arrays_may_be_read_only_and_strided() -> None:
    left, right = random()
    truth = exact_counts(left[::2], right[::3], ones(left[::2]), ones(right[::3]))
    held = [np.repeat(side, 2, axis=0)[::2] for side in (left[::2], right[::3])]
    for side in held:
        side.flags.writeable = False
    np.testing.assert_array_equal(exact_counts(held[0], held[1], ones(held[0]), ones(held[1])), truth)


@pytest.mark.parametrize("entry", [np.nan, np.inf, 1.515625, -1.515625, 2.0, 60000.0])
def test_vectors_that_are_not_of_unit_length_are_refused(entry: float) -> None:
    left = np.array([[1, 0], [entry, 0]], np.float16)
    with pytest.raises(ValueError, match="not of unit length"):
        exact_counts(left, left[:1], ones(left), ones(left[:1]))


def test_every_vector_needs_a_multiplicity() -> None:
    left, right = one_hot()
    for weight_Q, weight_G in [(ones(left)[1:], ones(right)), (ones(left), np.ones(17, np.int64))]:
        with pytest.raises(ValueError, match="multiplicity"):
            exact_counts(left, right, weight_Q, weight_G)


def test_a_cosine_on_an_edge_belongs_to_the_bin_above() -> None:
    inside = EDGES[:-1]
    assert counts_of(inside).tolist() == [1] * len(inside)
    assert counts_of(np.nextafter(EDGES[1:], -2)).tolist() == [1] * len(inside)
    assert np.flatnonzero(counts_of(np.array([-0.0, 0.0]))).tolist() == [101]


def test_weights_are_added_as_integers() -> None:
    counts = counts_of(np.array([0.5, 0.5, -0.3]), np.array([2**53, 1, 7]))
    assert (counts[151], counts.sum()) == (2**53 + 1, 2**53 + 8)


@pytest.mark.parametrize("cosine", [1.01, 1.5, -1.0101, np.nan, np.inf, -np.inf])
def test_a_cosine_outside_the_edges_is_refused(cosine: float) -> None:
    with pytest.raises(ValueError, match="lies outside"):
        counts_of(np.array([0.2, cosine]))


def test_above_counts_what_reaches_each_edge() -> None:
    cosines = np.random.default_rng(9).uniform(-1, 1, 3000).round(3)
    reaching = above(counts_of(cosines))
    assert reaching.tolist() == [int((cosines >= edge).sum()) for edge in EDGES]
    assert (reaching[0], reaching[-1]) == (3000, 0)


def test_importing_the_module_loads_nothing_heavy() -> None:
    code = "import sys, operators.histogram; sys.exit(len({'numba', 'torch', 'faiss'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
