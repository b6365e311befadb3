"""MGDA against scipy, the closed form and the authors' constants; torchjd's aggregators by name."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from mea_ray.core.errors import ConfigError
from mea_ray.watermarks.mea_defender.weighting import (
    AGGREGATORS,
    MinNorm,
    NonNegativeProjector,
    make_weighting,
    min_norm_weights,
)


def gradients(count, seed, size=7):
    return torch.tensor(np.random.default_rng(seed).standard_normal((count, size)))


def by_scipy(gram):
    count = len(gram)
    best = None
    for start in [np.full(count, 1 / count), *np.eye(count)]:
        found = minimize(
            lambda w: w @ gram @ w,
            start,
            jac=lambda w: 2 * gram @ w,
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        best = found if best is None or found.fun < best.fun else best
    return best.x


@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize("seed", range(5))
def test_minimum_norm_point_against_scipy(count, seed):
    g = gradients(count, seed)
    gram = g @ g.T
    weights = min_norm_weights(gram)
    assert weights.min() >= 0 and weights.sum().item() == pytest.approx(1)
    np.testing.assert_allclose(weights, by_scipy(gram.numpy()), atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_two_gradients_against_scipy_up_to_the_authors_clamps(seed):
    g = gradients(2, seed, size=2)
    weights = min_norm_weights(g @ g.T)
    np.testing.assert_allclose(weights, by_scipy((g @ g.T).numpy()), atol=2e-3)


@pytest.mark.parametrize("long,gamma", [(0, 0.001), (1, 0.999)])
def test_a_gradient_that_is_a_multiple_of_the_other_loses(long, gamma):
    g = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    g[long] *= 3
    assert min_norm_weights(g @ g.T).tolist() == pytest.approx([gamma, 1 - gamma])


def test_the_last_iterate_is_returned_when_the_steps_run_out():
    g = gradients(6, 0)
    weights = min_norm_weights(g @ g.T, iterations=1)
    assert weights.min() >= 0 and weights.sum().item() == pytest.approx(1)


def test_orthogonal_gradients_under_loss_plus_are_weighed_by_their_losses():
    g = torch.tensor([[0.5, 0.0], [0.0, 2.0]], dtype=torch.float64)
    first, second = 1.3, 0.7
    weights = MinNorm("loss+").weights(g, [first, second])
    assert weights[1].item() == pytest.approx(second**2 / (first**2 + second**2), rel=1e-3)


@pytest.mark.parametrize("name", ["l2", "loss", "loss+", "none"])
def test_normalisations_are_the_authors(name):
    g = gradients(3, 1) * torch.tensor([[1.0], [5.0], [0.2]], dtype=torch.float64)
    values = [0.4, 30.0, 2.0]
    scaled = []
    for row, value in zip(g.numpy(), values, strict=True):
        norm = np.linalg.norm(row)
        by = {"l2": norm, "loss": min(value, 10), "loss+": min(value * norm, 10), "none": 1.0}[name]
        scaled.append(row / (by + 1e-5))
    expected = by_scipy(np.array(scaled) @ np.array(scaled).T)
    weighting = MinNorm(name)
    np.testing.assert_allclose(weighting.weights(g, values), expected, atol=1e-4)
    # The weights of the normalised gradients apply to the raw ones.
    np.testing.assert_allclose(weighting.aggregate(g, values), expected @ g.numpy(), atol=1e-3)


def quadratic_terms(model, weights=(1.0, 2.0, 0.5)):
    x = torch.linspace(-1, 1, 12).view(4, 3)
    y = model(x)
    return {f"term{k}": w * (y[:, k % 2] - k).square().mean() for k, w in enumerate(weights)}


@pytest.mark.parametrize("name", sorted(AGGREGATORS) + ["min_norm"])
def test_every_weighting_accumulates_its_gradient(name):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    rows = []
    for term in quadratic_terms(model).values():
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(term, list(model.parameters()), retain_graph=True)])
        )
    matrix = torch.stack(rows)
    terms = quadratic_terms(model)
    weighting = make_weighting(name)
    torch.manual_seed(1)
    expected = weighting.aggregate(matrix, [t.item() for t in terms.values()])
    model.weight.grad = torch.ones_like(model.weight)
    torch.manual_seed(1)
    reported = make_weighting(name).backward(terms, model)
    assert reported.item() == pytest.approx(sum(t.item() for t in terms.values()), rel=1e-5)
    assert not reported.requires_grad
    got = torch.cat([(model.weight.grad - 1).flatten(), model.bias.grad])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dual_proj", "aligned_mtl"])
def test_aggregated_direction_does_not_raise_a_loss(name):
    g = gradients(3, 4, size=5).float()
    direction = make_weighting(name).aggregate(g, [1.0] * 3)
    assert (g @ direction).min() > -0.02 * direction.norm() * g.norm(dim=1).max()


def test_projection_onto_the_dual_cone_against_scipy():
    for seed in range(5):
        g = gradients(4, seed, size=6)
        gram = (g @ g.T).numpy()
        u = np.abs(np.random.default_rng(seed).standard_normal(4))
        found = minimize(
            lambda v, g: v @ g @ v,
            u,
            args=(gram,),
            jac=lambda v, g: 2 * g @ v,
            bounds=[(x, None) for x in u],
            options={"ftol": 1e-15},
        )
        got = NonNegativeProjector()(torch.tensor(u)[None], torch.tensor(gram))[0].numpy()
        np.testing.assert_allclose(got, found.x, atol=2e-3)


def test_unknown_weighting_is_refused_with_the_nearest():
    assert make_weighting("fixed") is None
    with pytest.raises(ConfigError, match="upgrad"):
        make_weighting("up_grad")
