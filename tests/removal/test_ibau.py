"""I-BAU: the hypergradient against matrices and finite differences, and the perturbation that is unlearnt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from watermark_sets import context

from mea_ray.config import TrainingConfig
from mea_ray.core.types import Images, ImageSet
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.removal import REMOVALS
from mea_ray.removal.base import ThiefData, agreement, labelled
from mea_ray.removal.ibau import MinMax, hypergradient
from mea_ray.training.engine import train
from mea_ray.training.objective import Batch, CrossEntropy

SHAPE = (3, 12, 12)


def network() -> ImageModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return build_model("vgg_like", SHAPE, 3, {"width": 0.125}).eval()


def thief() -> ThiefData:
    """Sixty images whose class is the brightest channel."""
    labels = np.arange(60) % 3
    pixels = np.random.default_rng(0).integers(0, 90, (60, *SHAPE), dtype=np.uint8)
    pixels[np.arange(60), labels] += 150
    training = TrainingConfig(epochs=20, batch_size=16, augment=(), learning_rate=2e-3, precision="float32")
    return ThiefData(pixels, np.eye(3, dtype=np.float32)[labels], network, training)


THIEF = thief()


@pytest.mark.parametrize("terms", [0, 1, 4])
def test_the_series_is_that_of_matrices(terms: int) -> None:
    """The map is d - r (A d - B w), the loss (c d)^2 / 2 + e w."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 3)), rng.normal(size=(3, 2))
    a, c, e, rate = a @ a.T / 9, rng.normal(size=3), rng.normal(size=2), 0.3
    d = torch.tensor(rng.normal(size=3), requires_grad=True)
    w = nn.Parameter(torch.tensor(rng.normal(size=2)))
    mapped = d - rate * (torch.tensor(a) @ d - torch.tensor(b) @ w)
    outer = (torch.tensor(c) @ d).square() / 2 + torch.tensor(e) @ w
    (found,) = hypergradient(outer, d, mapped, [w], terms)
    by_d, step = c * (c @ d.detach().numpy()), np.eye(3) - rate * a
    v = sum((np.linalg.matrix_power(step.T, j) @ by_d for j in range(terms)), np.zeros(3))
    np.testing.assert_allclose(found, e + rate * b.T @ v)


def test_a_long_series_is_the_slope_of_what_the_perturbation_leaves() -> None:
    """At the fixed point d(w) the whole derivative of L(d(w), w) is that of finite differences."""
    a = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)

    def settled(w: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.linalg.solve(a, torch.sin(w))
        return found

    def loss(d: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (d.exp() * w).sum()

    w = nn.Parameter(torch.tensor([0.4, -0.7], dtype=torch.float64))
    d = settled(w).detach().requires_grad_()
    mapped = d - 0.2 * (a @ d - torch.sin(w))
    (found,) = hypergradient(loss(d, w), d, mapped, [w], 200)
    plain = []
    for place in range(2):
        ends = []
        for sign in (1, -1):
            moved = w.detach().clone()
            moved[place] += sign * 1e-6
            ends.append(float(loss(settled(moved), moved)))
        plain.append((ends[0] - ends[1]) / 2e-6)
    np.testing.assert_allclose(found, plain, rtol=1e-6)


def test_the_perturbation_climbs_within_its_ball() -> None:
    model, data = network(), labelled(THIEF, 3)
    for weight in model.head.parameters():
        weight.data *= 30
    objective = MinMax(data, 20, terms=2, perturbed=0.5, radius=1.5, ascent_rate=10.0, inner_rate=0.1)
    objective.start(context())
    found = objective.ascend(model)
    assert found.shape == (1, *SHAPE) and 0 < float(found.norm()) <= 1.5 + 1e-5
    images, labels = torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)
    assert F.cross_entropy(model(images + found), labels) > F.cross_entropy(model(images), labels)
    batch = Batch(images[:10], labels[:10], torch.arange(10))
    loss = objective.terms(model, batch)["utility"]
    generator = torch.Generator().manual_seed(0)
    marked = images[:10].clone()
    marked[torch.randperm(10, generator=generator)[:5]] += found
    torch.testing.assert_close(loss, F.cross_entropy(model(marked), labels[:10]))
    objective.backward({"utility": loss}, model)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_worst_perturbation_of_a_marked_model_is_unlearnt() -> None:
    def under(images: Images) -> Images:
        changed = images.copy()
        changed[:, :, :4, :4] = 255
        return changed

    clean = labelled(THIEF, 3)
    both = np.concatenate([THIEF.images, under(THIEF.images)])
    labels = np.concatenate([clean.labels, np.full(60, 2)])
    suspect = network()
    train(suspect, both, labels, CrossEntropy(), THIEF.training, seed=0)
    others = ImageSet(under(THIEF.images)[clean.labels != 2], clean.labels[clean.labels != 2], clean.class_names)

    def success(model: nn.Module) -> float:
        return float((metrics.predictions(model, others.images) == 2).mean())

    before = {name: value.clone() for name, value in suspect.state_dict().items()}
    assert success(suspect) > 0.9 and agreement(suspect, THIEF) > 0.9
    removal = REMOVALS.build("ibau", rounds=3, perturbed=0.5, batch_size=10, learning_rate=2e-3, ascent_rate=100.0)
    cleaned = removal.remove(suspect, THIEF, 0)
    assert success(cleaned) <= success(suspect) and agreement(cleaned, THIEF) > 0.9
    worst = MinMax(clean, 10, **removal.series).ascend(suspect)
    images = torch.from_numpy(THIEF.images).float() / 255 + worst
    with torch.no_grad():
        losses = [F.cross_entropy(model(images), torch.from_numpy(THIEF.labels)) for model in (suspect, cleaned)]
    assert losses[1] < losses[0] / 3
    assert all(torch.equal(value, before[name]) for name, value in suspect.state_dict().items())
