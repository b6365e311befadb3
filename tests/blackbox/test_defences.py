"""Defences of answers: the class stays, and the perturbation is the paper's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mea_ray.blackbox.defences import LEAD, HighConfidence, ModelGuard, ModelGuardS, ReverseSigmoid
from mea_ray.blackbox.passes import FixedShapePasses
from mea_ray.blackbox.policies import Probabilities
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.experiment.answers import answer_policy
from mea_ray.models.build import build_model

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


def plain_quantiser(known: np.ndarray, asked: np.ndarray, distance: float) -> list[list[float]]:
    """``ordered_quantize`` of the authors' code: incremental while it is fitted, frozen while it answers."""
    centroids: dict[int, list[list[float]]] = {}

    def first(row: list[float]) -> list[float] | None:
        for centroid in centroids.setdefault(row.index(max(row)), []):
            if sum(abs(a - b) for a, b in zip(centroid, row, strict=True)) <= distance:
                return centroid
        return None

    for row in known.tolist():
        if first(row) is None:
            centroids[row.index(max(row))].append(row)
    return [first(row) or row for row in asked.tolist()]


@pytest.mark.parametrize("distance", [0.2, 1.0])
def test_close_answers_get_the_same_one(distance: float) -> None:
    rows = np.random.default_rng(4).dirichlet(np.full(3, 0.6), 300).astype(np.float32)
    fitted, asked = rows[:120], rows[120:]
    policy = ModelGuardS(distance=distance)
    policy.fit(fitted)
    answers = policy.apply(asked, IMAGES)
    np.testing.assert_array_equal(answers, np.array(plain_quantiser(fitted, asked, distance), np.float32))
    assert (answers.argmax(1) == asked.argmax(1)).all()
    assert (np.abs(answers.astype(np.float64) - asked).sum(1) <= distance).all()
    different = len(np.unique(answers, axis=0))
    assert different < {0.2: 0.6, 1.0: 0.1}[distance] * len(asked)
    assert not np.shares_memory(answers, asked) and (policy.apply(asked[7:8], IMAGES) == answers[7]).all()
    # What was answered changes no later answer, and another order of the images makes another list.
    np.testing.assert_array_equal(policy.apply(asked, IMAGES), answers)
    other = ModelGuardS(distance=distance)
    other.fit(fitted[::-1])
    assert (other.apply(asked, IMAGES) != answers).any()


def test_a_class_without_known_answers_is_answered_as_it_is() -> None:
    policy = ModelGuardS()
    policy.fit(np.array([[0.9, 0.1, 0.0]], np.float32))
    rows = np.array([[0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [0.35, 0.33, 0.32]], np.float32)
    assert policy.apply(rows, IMAGES).tolist() == [[np.float32(v) for v in (0.9, 0.1, 0)], *rows[1:].tolist()]


def test_a_service_makes_the_list_from_its_own_answers() -> None:
    images = np.random.default_rng(3).integers(0, 256, (90, 1, 8, 8), dtype=np.uint8)
    model = build_model("vgg_like", (1, 8, 8), 4, {"width": 0.0625}).eval()
    with torch.no_grad():
        list(model.parameters())[-2].mul_(30)  # answers of a new network are all alike
    policy = answer_policy(ModelGuardS(distance=0.3, fitted=40), model, None, lambda: images[:60], pass_images=8)
    (plain,) = FixedShapePasses(model, model.shape, Probabilities(), pass_images=8).answer([images])
    (given,) = FixedShapePasses(model, model.shape, policy, pass_images=8).answer([images])
    fitted = ModelGuardS(fitted=40).choose(images[:60])
    (known,) = FixedShapePasses(model, model.shape, Probabilities(), pass_images=8).answer([fitted])
    assert len(fitted) == 40
    np.testing.assert_array_equal(given, np.array(plain_quantiser(known, plain, 0.3), np.float32))
    assert (given != plain).any(1).sum() > 45


def test_what_was_not_fitted_answers_nothing() -> None:
    with pytest.raises(DataError, match="call fit before"):
        ModelGuardS().apply(ROWS, IMAGES)


@pytest.mark.parametrize(
    ("policy", "params"),
    [
        (ReverseSigmoid, {"beta": 0.0}),
        (HighConfidence, {"cutoff": 1.5}),
        (ModelGuard, {"distance": 3}),
        (ModelGuardS, {"fitted": 0}),
    ],
)
def test_settings_out_of_range_are_refused(policy: type, params: dict[str, float]) -> None:
    from mea_ray.blackbox import POLICIES

    name = next(name for name in POLICIES.names() if POLICIES.resolve(name) is policy)
    with pytest.raises(ConfigError, match=next(iter(params))):
        POLICIES.build(name, **params)
