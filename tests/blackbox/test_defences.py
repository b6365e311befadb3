"""Defences of answers: the class stays, and the perturbation is the paper's."""

from __future__ import annotations

import numpy as np
import pytest

from mea_ray.blackbox.defences import LEAD, HighConfidence, ModelGuard, ReverseSigmoid
from mea_ray.core.errors import ConfigError

ROWS = np.random.default_rng(0).dirichlet(np.full(6, 0.6), 300).astype(np.float32)
IMAGES = np.zeros((300, 1, 2, 2), np.uint8)


def plain_reverse_sigmoid(y: np.ndarray, beta: float, gamma: float) -> np.ndarray:
    """Equations 3 and 4, for one row."""
    turned = [beta * (1 / (1 + np.exp(-gamma * np.log(p / (1 - p)))) - 0.5) for p in y]
    changed = [p - t for p, t in zip(y, turned, strict=True)]
    return np.array(changed / np.sum(changed))


def test_a_reverse_sigmoid_is_the_papers_where_that_keeps_the_class() -> None:
    rows = ROWS[(ROWS.max(1) < 1 - 1e-5) & (ROWS.min(1) > 1e-5)].astype(np.float64)
    answers = ReverseSigmoid(beta=0.2, gamma=0.3).apply(rows.astype(np.float32), IMAGES)
    plain = np.array([plain_reverse_sigmoid(row, 0.2, 0.3) for row in rows])
    same = plain.argmax(1) == rows.argmax(1)
    lead = np.sort(plain, 1)[:, -1] - np.sort(plain, 1)[:, -2]
    assert (same & (lead > 1e-3)).sum() > 150
    np.testing.assert_allclose(answers[same & (lead > 1e-3)], plain[same & (lead > 1e-3)], atol=2e-5)


@pytest.mark.parametrize("beta", [0.1, 0.7, 5.0])
def test_no_reverse_sigmoid_changes_the_class_or_leaves_the_simplex(beta: float) -> None:
    answers = ReverseSigmoid(beta=beta, gamma=0.2).apply(ROWS, IMAGES)
    assert (answers.argmax(1) == ROWS.argmax(1)).all()
    assert (answers >= 0).all() and np.allclose(answers.sum(1), 1, atol=1e-6)
    assert np.abs(answers - ROWS).max() > 0.02


def test_high_confidence_shows_what_is_sure_and_always_the_class() -> None:
    rows = np.array([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]], np.float32)
    assert HighConfidence(cutoff=0.3).apply(rows, IMAGES).tolist() == [rows[0, :2].tolist() + [0], [*rows[1, :2], 0]]
    assert HighConfidence(cutoff=0.5).apply(rows, IMAGES)[1].tolist() == [rows[1, 0], 0, 0]


def objective(row: np.ndarray, answer: np.ndarray) -> float:
    return float(answer @ np.log(row.astype(np.float64) + 1e-6))


@pytest.mark.parametrize("distance", [0.1, 0.6])
def test_model_guard_is_allowed_and_no_allowed_answer_misleads_more(distance: float) -> None:
    answers = ModelGuard(distance=distance).apply(ROWS[:40], IMAGES)
    assert (answers.argmax(1) == ROWS[:40].argmax(1)).all() and (answers > -1e-7).all()
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-6)
    assert (np.abs(answers - ROWS[:40]).sum(1) <= distance + 1e-5).all()
    rng = np.random.default_rng(1)
    for row, answer in zip(ROWS[:40], answers.astype(np.float64), strict=True):
        for _ in range(300):  # random answers within the distance, those that bring another class to the top left out
            towards = rng.dirichlet(np.full(6, 0.3)) - row
            other = row + towards * min(1.0, distance / np.abs(towards).sum())
            top = row.argmax()
            if (np.delete(other, top) <= other[top] - LEAD).all():
                assert objective(row, answer) <= objective(row, other) + 1e-5


def test_two_classes_have_a_closed_form() -> None:
    rows = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    np.testing.assert_allclose(ModelGuard(distance=0.2).apply(rows, IMAGES), [[0.8, 0.2], [0.3, 0.7]], atol=1e-6)
    half = ModelGuard(distance=2.0).apply(rows, IMAGES)
    np.testing.assert_allclose(half.max(1), 0.5 + LEAD / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "params"),
    [(ReverseSigmoid, {"beta": 0.0}), (HighConfidence, {"cutoff": 1.5}), (ModelGuard, {"distance": 3})],
)
def test_settings_out_of_range_are_refused(policy: type, params: dict[str, float]) -> None:
    from mea_ray.blackbox import POLICIES

    name = next(name for name in POLICIES.names() if POLICIES.resolve(name) is policy)
    with pytest.raises(ConfigError, match=next(iter(params))):
        POLICIES.build(name, **params)
