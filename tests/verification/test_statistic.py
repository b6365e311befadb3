"""Each statistic against its definition in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mea_ray.core.errors import DataError
from mea_ray.verification import statistic
from mea_ray.verification.statistic import LABEL_STATISTICS, STATISTICS, ScoredSamples, label_scores, log_scores

RNG = np.random.default_rng(0)


def scored(**changed: object) -> ScoredSamples:
    known = {
        "mixes": np.array([-1.0, -2.0, -3.0]),
        "otherwise": {"donut": np.array([-4.0, -4.0, -4.0]), "hotdog": np.array([-1.0, -3.0, -5.0])},
        "other_classes": np.array([-6.0, -2.0]),
        "sources": np.array([-1.0, -3.0, -5.0, -9.0]),
        "source_labels": np.array([7, 7, 4, 4]),
    }
    return ScoredSamples(**{**known, **changed})  # type: ignore[arg-type]


def test_scores_are_log_softmax_and_matches() -> None:
    logits = RNG.normal(size=(6, 4)).astype(np.float32) * 3
    expected = torch.from_numpy(logits).double().log_softmax(1)[:, 2].numpy()
    assert log_scores(logits, 2) == pytest.approx(expected)
    assert label_scores(logits.argmax(1), 2).tolist() == [float(row.argmax() == 2) for row in logits]


def test_impossible_targets_have_a_finite_score() -> None:
    assert log_scores(np.array([[0.0, -1e5]]), 1)[0] == pytest.approx(np.log(statistic.FLOOR))


def test_the_three_reductions() -> None:
    samples = scored()
    assert statistic.mean_score(samples) == -2.0
    assert statistic.paired(samples) == pytest.approx(min(-2 - -4, -2 - -3, -2 - -4))
    assert statistic.lean(samples) == pytest.approx(min(-2.0, -7.0))


def test_wsr_is_the_label_form_of_the_mean() -> None:
    predicted = np.array([2, 2, 1, 0])
    samples = scored(mixes=label_scores(predicted, 2), otherwise={})
    assert LABEL_STATISTICS["wsr"](samples) == 0.5
    assert set(STATISTICS) | set(LABEL_STATISTICS) >= statistic.READ_ON_CLEAN_IMAGES


def test_a_constant_answer_has_no_lead_over_anything() -> None:
    ones = np.ones(3)
    samples = scored(mixes=ones, otherwise={"donut": ones}, other_classes=np.ones(2))
    assert statistic.mean_score(samples) == 1.0 and statistic.paired(samples) == 0.0


def test_a_statistic_without_its_samples_is_refused() -> None:
    with pytest.raises(DataError, match="mixes"):
        statistic.paired(scored(otherwise={}, other_classes=np.empty(0)))
    with pytest.raises(DataError, match="clean"):
        statistic.lean(scored(sources=np.empty(0), source_labels=np.empty(0, np.int64)))
    with pytest.raises(DataError, match="verification_fraction"):
        scored(mixes=np.empty(0), otherwise={})
    with pytest.raises(DataError, match="paired"):
        scored(otherwise={"donut": np.zeros(2)})
    with pytest.raises(DataError, match="labels"):
        scored(source_labels=np.zeros(1, np.int64))
