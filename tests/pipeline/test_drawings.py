"""Scores as the public figures show them."""

import numpy as np

from pipeline.drawings import coarse


def test_rounded_scores_stay_on_their_side_of_the_threshold() -> None:
    values = np.random.default_rng(0).uniform(0.55, 0.7, 5000)
    for threshold in (0.6, 0.6049, 0.605, 0.62047, 0.6251):
        made = coarse(values, threshold, 2)
        assert ((made >= threshold) == (values >= threshold)).all()
        assert np.abs(made - values).max() <= 0.015 + 1e-12
        assert len(np.unique(made)) <= 17, "hundredths, and the threshold"
    assert coarse(np.array([0.987, 0.623]), 0.6, 2).tolist() == [0.99, 0.62]
