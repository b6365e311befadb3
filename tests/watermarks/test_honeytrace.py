"""Neural Honeytrace: which answers lean, how far, and that no class changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.blackbox.policies import Probabilities
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.core.types import ImageSet
from mea_ray.evaluation import metrics
from mea_ray.experiment.answers import answer_policy, served
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.watermarks.answer_mixing import heaviest
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.honeytrace import NeuralHoneytrace, SimilarityMarker

SHAPE, CLASSES, FEATURES = (1, 8, 8), 5, 7
RNG = np.random.default_rng(0)
ROWS = RNG.dirichlet(np.full(CLASSES, 0.5), 200).astype(np.float32)
IMAGES = RNG.integers(0, 256, (200, *SHAPE), dtype=np.uint8)
NEAR = RNG.normal(size=(200, FEATURES)).astype(np.float32)


def images() -> ImageSet:
    return ImageSet(IMAGES, np.arange(200, dtype=np.int64) % CLASSES, tuple("abcde"))


def learned(**options: Any) -> Key:
    """A key whose features are drawn, not a network's."""
    key = NeuralHoneytrace(neighbours=3, triggers=20, **options).make_key(images(), 1)
    rng = np.random.default_rng(1)
    result = {
        "honey/features": rng.normal(size=(20, FEATURES)).astype(np.float32),
        "honey/reference": np.log(np.array([0.1, 0.1, 0.6, 0.15, 0.05], np.float32)),
        "honey/scale": np.array([0.5, 1.1], np.float32),
    }
    return replace(key, tensors={**key.tensors, **result})


def plain_answer(row: np.ndarray, features: np.ndarray, key: Key, strength: float, unsure: float) -> np.ndarray:
    """One answer, step by step; the weight is lowered until the class stays."""
    triggers, (near, far) = key.tensors["honey/features"], key.tensors["honey/scale"].astype(float)
    apart = sorted(np.abs(features.astype(float) - trigger.astype(float)).mean() for trigger in triggers)
    similar = min(1.0, max(0.0, (far - np.mean(apart[:3])) / (far - near)))
    similar = similar**0.25 if row.max() < unsure else similar
    target = np.exp(key.tensors["honey/reference"].astype(float))
    weight = strength * similar**2
    for step in np.linspace(weight, 0, 1501):
        mixed = (1 - step) * row + step * target / target.sum()
        if step == 0 or mixed[row.argmax()] - np.delete(mixed, row.argmax()).max() >= 0.01:
            return np.asarray(mixed)
    raise AssertionError("unreachable")


def test_an_answer_is_mixed_with_the_targets_as_far_as_it_is_near() -> None:
    key = learned(strength=0.8, unsure=0.5)
    answers, noted = SimilarityMarker(key).mark(ROWS, IMAGES, NEAR)
    plain = [plain_answer(ROWS[place].astype(float), NEAR[place], key, 0.8, 0.5) for place in range(40)]
    np.testing.assert_allclose(answers[:40], np.array(plain), atol=1e-3)
    changed = (answers != ROWS).any(1)
    assert 0.2 < changed.mean() < 1 and not noted.any(), "the proof needs no log"
    order = np.random.default_rng(2).permutation(200)
    again, _ = SimilarityMarker(key).mark(ROWS[order], IMAGES[order], NEAR[order])
    assert np.array_equal(again, answers[order]), "an answer must not depend on the others"


@pytest.mark.parametrize("space", ["probabilities", "logits"])
def test_no_class_changes_and_far_images_are_answered_as_they_are(space: str) -> None:
    marker = SimilarityMarker(learned(strength=1.0, space=space, unsure=0.0))
    answers, _ = marker.mark(ROWS, IMAGES, NEAR)
    assert (answers.argmax(1) == ROWS.argmax(1)).all() and np.allclose(answers.sum(1), 1, atol=1e-5)
    far = marker.similarity(ROWS, NEAR) == 0
    assert far.any() and np.array_equal(answers[far], ROWS[far])
    away = ROWS.argmax(1) != 2
    assert (answers[away, 2] >= ROWS[away, 2] - 1e-6).all() and (answers[away, 2] > ROWS[away, 2] + 0.05).any()


def test_flips_answer_as_the_target_with_the_papers_probability() -> None:
    key = learned(flips=True, unsure=0.0)
    key = replace(key, tensors={**key.tensors, "honey/scale": np.array([0.0, 4.0], np.float32)})
    many = np.repeat(NEAR[:1] * 0 + key.tensors["honey/features"][:1], 4000, axis=0)
    pixels = np.random.default_rng(3).integers(0, 256, (4000, *SHAPE), dtype=np.uint8)
    rows = np.tile(np.array([[0.9, 0.025, 0.025, 0.025, 0.025]], np.float32), (4000, 1))
    marker = SimilarityMarker(key)
    expected = np.floor(10 * marker.similarity(rows[:1], many[:1]) ** 3)[0] / 10
    flipped = marker.mark(rows, pixels, many)[0].argmax(1) == 2
    assert 0 < expected < 1 and abs(flipped.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)


def test_the_largest_weight_is_where_the_lead_ends() -> None:
    own = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.5, 0.495, 0.005], [0.1, 0.1, 0.8]])
    other = np.array([0.0, 1.0, 0.0])
    weights = heaviest(own, other, margin=0.02)
    for row, weight in zip(own[[0, 1, 3]], weights[[0, 1, 3]], strict=True):
        mixed = (1 - weight) * row + weight * other
        assert mixed[row.argmax()] - np.delete(mixed, row.argmax()).max() == pytest.approx(0.02)
    assert weights[2] == 0, "a lead that is too small from the start allows nothing"
    assert heaviest(own[:1], np.array([1.0, 0.0, 0.0]))[0] == 1, "towards its own class an answer may go all the way"


@pytest.fixture(scope="module")
def trained() -> tuple[ImageModel, Key]:
    """A network and the key that its features make; it need not be a good one."""
    scheme, data = NeuralHoneytrace(triggers=30, neighbours=5), images()
    key = scheme.make_key(data, 1)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build_model("vgg_like", SHAPE, CLASSES, {"width": 0.0625}).eval()
        for weight in model.head.parameters():
            weight.data *= 300  # an untrained network is sure of nothing
    stages = scheme.stages(key, data)
    stages[0].objective.attach(model, torch.device("cpu"))
    return model, scheme.learned(key, stages)


def test_the_scale_is_that_of_the_trained_model(trained: tuple[ImageModel, Key]) -> None:
    model, key = trained
    triggers, (near, far) = key.tensors["honey/features"], key.tensors["honey/scale"]
    clean = metrics.features(model, IMAGES)
    apart = np.sort(np.abs(clean[:, None].astype(float) - triggers[None]).mean(2), axis=1)[:, :5].mean(1)
    assert far == pytest.approx(np.quantile(apart, 0.9), rel=1e-5)
    own = np.sort(np.abs(triggers[:, None].astype(float) - triggers[None]).mean(2), axis=1)[:, 1:6].mean(1)
    assert near == pytest.approx(min(np.median(own), 0.99 * far), rel=1e-5)
    nearest = SimilarityMarker(key).similarity(np.full((200, CLASSES), 0.2, np.float32), clean)
    assert (nearest == 0).mean() == pytest.approx(0.1, abs=0.02), "a share of 0.9 is near"


def test_the_service_answers_as_the_victim_is_judged(trained: tuple[ImageModel, Key]) -> None:
    model, key = trained
    policy = answer_policy(Probabilities(), model, key, lambda: IMAGES)
    answers = LocalBlackBox(model, policy, pass_images=16).query(IMAGES[:50])
    judged = metrics.probabilities(served(model, key), IMAGES[:50])
    np.testing.assert_allclose(answers, judged, atol=1e-5)
    assert np.abs(answers - metrics.probabilities(model, IMAGES[:50])).max() > 0.01


def test_without_features_nothing_is_marked() -> None:
    with pytest.raises(ArtifactError, match="train the victim first"):
        SimilarityMarker(NeuralHoneytrace().make_key(images(), 1))
    with pytest.raises(ConfigError, match="computes none"):
        SimilarityMarker(learned()).mark(ROWS, IMAGES)
    with pytest.raises(ConfigError, match="must be less"):
        NeuralHoneytrace(triggers=5, neighbours=5)
