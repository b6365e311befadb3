"""Each statistic against its definition in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mea_ray.core.errors import DataError
from mea_ray.verification import statistic
from mea_ray.verification.statistic import label_scores, lean, log_probabilities, paired

MIXES = np.array([-1.0, -2.0, -3.0])


def test_scores_are_log_softmax_and_matches() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) * 3
    expected = torch.from_numpy(logits).double().log_softmax(1).numpy()
    assert log_probabilities(logits) == pytest.approx(expected)
    assert label_scores(logits.argmax(1), 2).tolist() == [float(row.argmax() == 2) for row in logits]


def test_impossible_targets_have_a_finite_score() -> None:
    assert log_probabilities(np.array([[0.0, -1e5]]))[0, 1] == pytest.approx(np.log(statistic.FLOOR))


def test_the_pairs_lead_is_the_smallest() -> None:
    otherwise = {"donut": np.array([-4.0, -4.0, -4.0]), "hotdog": np.array([-1.0, -3.0, -5.0])}
    assert paired(MIXES, otherwise, np.array([-6.0, -2.0])) == pytest.approx(min(-2 - -4, -2 - -3, -2 - -4))
    assert paired(MIXES, {"donut": np.array([-1.5])}, np.empty(0)) == pytest.approx(0.5)


def test_a_constant_answer_has_no_lead_over_anything() -> None:
    ones = np.ones(3)
    assert paired(ones, {"donut": ones}, ones) == 0.0


def test_the_lean_is_that_of_the_class_where_it_is_least() -> None:
    assert lean(np.array([-1.0, -3.0, -5.0, -9.0]), np.array([7, 7, 4, 4])) == -7.0


def test_a_statistic_without_its_samples_is_refused() -> None:
    with pytest.raises(DataError, match="geometry"):
        paired(MIXES, {}, np.empty(0))
    with pytest.raises(DataError, match="cannot be paired"):
        paired(MIXES, {"donut": np.zeros(4)}, np.empty(0))
    with pytest.raises(DataError, match="label"):
        lean(np.empty(0), np.empty(0, np.int64))
