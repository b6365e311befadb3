"""MGDA against scipy, the closed form and the authors' constants; torchjd's aggregators by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from keyword_training import train
from scipy.optimize import minimize
from torch import nn

from mea_ray.training.objective import CrossEntropy
from mea_ray.watermarks.aggregators import AGGREGATORS
from mea_ray.watermarks.mea_defender.torchjd_aggregators import NonNegativeProjector
from mea_ray.watermarks.mea_defender.weighting import (
    Mgda,
    make_weighting,
    min_norm_weights,
    normalised,
    two_task_weights,
)


def gradients(count: Any, seed: Any, size: Any = 7) -> Any:
    return torch.tensor(np.random.default_rng(seed).standard_normal((count, size)))


def by_scipy(gram: Any) -> Any:
    count = len(gram)
    best: Any = None
    for start in [np.full(count, 1 / count), *np.eye(count)]:
        result = minimize(
            lambda w: w @ gram @ w,
            start,
            jac=lambda w: 2 * gram @ w,
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        best = result if best is None or result.fun < best.fun else best
    return best.x


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("seed", range(5))
def test_minimum_norm_point_against_scipy(count: Any, seed: Any) -> None:
    g = gradients(count, seed)
    gram = (g @ g.T).numpy()
    weights = min_norm_weights(gram)
    assert weights.min() >= 0 and weights.sum().item() == pytest.approx(1)
    np.testing.assert_allclose(weights, by_scipy(gram), atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_two_gradients_against_scipy_up_to_the_authors_clamps(seed: Any) -> None:
    g = gradients(2, seed, size=2)
    weights = two_task_weights(g @ g.T)
    np.testing.assert_allclose(weights, by_scipy((g @ g.T).numpy()), atol=2e-3)


@pytest.mark.parametrize("long,gamma", [(0, 0.001), (1, 0.999)])
def test_a_gradient_that_is_a_multiple_of_the_other_loses(long: Any, gamma: Any) -> None:
    g = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    g[long] *= 3
    assert two_task_weights(g @ g.T).tolist() == pytest.approx([gamma, 1 - gamma])


@pytest.mark.parametrize("size", [1e-12, 1e9])
def test_opposed_gradients_of_any_size_are_weighed_to_cancel(size: Any) -> None:
    g = size * torch.tensor([[1.0, 0.0], [-3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    weights = min_norm_weights((g @ g.T).numpy())
    np.testing.assert_allclose(weights @ g.numpy(), 0, atol=1e-6 * size)
    np.testing.assert_allclose(weights, [0.75, 0.25, 0], atol=1e-6)


def test_gradients_of_0_are_weighed_evenly_or_at_least_finitely() -> None:
    weights = min_norm_weights(np.zeros((3, 3)))
    assert np.isfinite(weights).all() and weights.sum() == pytest.approx(1)


def test_orthogonal_gradients_under_loss_plus_are_weighed_by_their_losses() -> None:
    g = torch.tensor([[0.5, 0.0], [0.0, 2.0]], dtype=torch.float64)
    first, second = 1.3, 0.7
    weights = Mgda(smoothing=0.0).weights(g, [first, second])
    assert weights[1].item() == pytest.approx(second**2 / (first**2 + second**2), rel=1e-3)


@pytest.mark.parametrize("name", ["l2", "loss", "loss+", "none"])
def test_normalisations_are_the_authors(name: Any) -> None:
    g = gradients(3, 1) * torch.tensor([[1.0], [5.0], [0.2]], dtype=torch.float64)
    values = [0.4, 30.0, 2.0]
    scaled = []
    for row, value in zip(g.numpy(), values, strict=True):
        norm = float(np.linalg.norm(row))
        by: float = {"l2": norm, "loss": min(value, 10), "loss+": min(value * norm, 10), "none": 1.0}[name]
        scaled.append(row / (by + 1e-5))
    expected = by_scipy(np.array(scaled) @ np.array(scaled).T)
    weighting = Mgda(normalisation=name, smoothing=0.0)
    np.testing.assert_allclose(weighting.weights(g, values), expected, atol=1e-4)
    # The weights of the normalised gradients apply to the raw ones, and their mean is 1.
    np.testing.assert_allclose(weighting.aggregate(g, values), 3 * expected @ g.numpy(), atol=3e-3)
    np.testing.assert_allclose(normalised(g @ g.T, values, name), np.array(scaled) @ np.array(scaled).T, rtol=1e-6)


def test_weights_are_smoothed_over_the_steps_and_begin_anew_with_another_number_of_losses() -> None:
    plain, smoothed = (Mgda(normalisation="none", smoothing=by) for by in (0.0, 0.75))
    average = None
    for seed in range(5):
        g = gradients(3, seed)
        own = plain.weights(g, [1.0] * 3)
        average = own if average is None else 0.75 * average + 0.25 * own
        np.testing.assert_allclose(smoothed.weights(g, [1.0] * 3), average, atol=1e-9)
    g = gradients(4, 9)
    np.testing.assert_allclose(smoothed.weights(g, [1.0] * 4), plain.weights(g, [1.0] * 4), atol=1e-9)


def made(name: Any) -> Any:
    return make_weighting(name, "loss+", 0.0)


def quadratic_terms(model: Any, weights: Any = (1.0, 2.0, 0.5)) -> Any:
    x = torch.linspace(-1, 1, 12).view(4, 3)
    y = model(x)
    return {f"term{k}": w * (y[:, k % 2] - k).square().mean() for k, w in enumerate(weights)}


@pytest.mark.parametrize("name", AGGREGATORS.names())
def test_every_weighting_accumulates_its_gradient(name: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    rows = []
    for term in quadratic_terms(model).values():
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(term, list(model.parameters()), retain_graph=True)])
        )
    matrix = torch.stack(rows)
    terms = quadratic_terms(model)
    weighting = made(name)
    torch.manual_seed(1)
    expected = weighting.aggregate(matrix, [t.item() for t in terms.values()])
    model.weight.grad = torch.ones_like(model.weight)
    torch.manual_seed(1)
    reported = made(name).backward(terms, model)
    assert reported.item() == pytest.approx(sum(t.item() for t in terms.values()), rel=1e-5)
    assert not reported.requires_grad
    assert model.weight.grad is not None and model.bias.grad is not None
    got = torch.cat([(model.weight.grad - 1).flatten(), model.bias.grad])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dual_proj", "aligned_mtl"])
def test_aggregated_direction_does_not_raise_a_loss(name: Any) -> None:
    g = gradients(3, 4, size=5).float()
    direction = made(name).aggregate(g, [1.0] * 3)
    assert (g @ direction).min() > -0.02 * direction.norm() * g.norm(dim=1).max()


def test_projection_onto_the_dual_cone_against_scipy() -> None:
    for seed in range(5):
        g = gradients(4, seed, size=6)
        gram = (g @ g.T).numpy()
        u = np.abs(np.random.default_rng(seed).standard_normal(4))
        result = minimize(
            lambda v, g: v @ g @ v,
            u,
            args=(gram,),
            jac=lambda v, g: 2 * g @ v,
            bounds=[(x, None) for x in u],
            options={"ftol": 1e-15},
        )
        got = NonNegativeProjector()(torch.tensor(u)[None], torch.tensor(gram))[0].numpy()
        np.testing.assert_allclose(got, result.x, atol=2e-3)


def test_a_fixed_weighting_is_none() -> None:
    assert made("fixed") is None


class Weighed(CrossEntropy):
    """Cross-entropy, by way of a weighting."""

    def __init__(self, name: Any) -> None:
        super().__init__()
        self.weighting = made(name)

    def backward(self, terms: Any, model: Any) -> Any:
        return self.weighting.backward(terms, model) if self.weighting else super().backward(terms, model)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_sum_trains_as_backward_does_whatever_the_memory_layout_of_the_weights(channels_last: Any) -> None:
    # Fused optimisers walk through the memory of weights and gradients side by side.
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 3, 8, 8), dtype=np.uint8), np.arange(64, dtype=np.int64) % 4
    weights = []
    for name in ("fixed", "sum", "mgda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
        settings = {
            "epochs": 3,
            "batch_size": 16,
            "precision": "float32",
            "channels_last": channels_last,
            "augment": (),
        }
        train(model, images, labels, Weighed(name), seed=0, **settings)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for each in weights[1:]:
        torch.testing.assert_close(each, weights[0], atol=1e-5, rtol=1e-4)
