"""Rehearsal: the forward-mode pass, what bounds the answers, and that a thief's step does what the theory says."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from watermark_sets import context

from mea_ray.core.types import ImageSet
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.training.objective import Batch
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.rehearsal.objective import (
    RehearsalObjective,
    over_budget,
    rehearsal,
    sensitivities,
    visible_lean,
)

SHAPE, CLASSES = (1, 12, 12), 6


def images() -> ImageSet:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, *SHAPE), dtype=np.uint8)
    return ImageSet(pixels, np.arange(60, dtype=np.int64) % CLASSES, tuple("abcdef"))


def network(seed: int = 0, name: str = "vgg_like") -> ImageModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = build_model(name, SHAPE, CLASSES, {"width": 0.0625})
    for weight in model.head.parameters():
        weight.data *= 30  # an untrained network answers all images alike
    return model.eval()


def thief_loss(thief: nn.Module, mixes: Tensor) -> Tensor:
    return F.cross_entropy(thief(mixes), torch.full((len(mixes),), 2))


PIXELS = torch.from_numpy(images().images).float() / 255


def test_sensitivities_are_the_slope_along_the_gradient() -> None:
    thief = network().double()
    x, mixes = PIXELS[:8].double(), PIXELS[8:16].double()
    slopes = sensitivities(thief, x, thief_loss(thief, mixes))
    gradient = torch.autograd.grad(thief_loss(thief, mixes), list(thief.parameters()))
    size, ends = 1e-6, []
    for sign in (1, -1):
        moved = copy.deepcopy(thief)
        with torch.no_grad():
            for parameter, step in zip(moved.parameters(), gradient, strict=True):
                parameter.add_(sign * size * step)
            ends.append(F.log_softmax(moved(x), dim=1))
    plain = (ends[0] - ends[1]) / (2 * size)
    assert slopes.abs().max() > 1e-3 and not slopes.requires_grad
    torch.testing.assert_close(slopes, plain, rtol=1e-4, atol=1e-6)


def test_answers_that_follow_the_rehearsal_bring_a_thief_nearer_to_the_mark() -> None:
    """A thief's step on answers moved down the rehearsal's gradient ends with a smaller loss on mixes."""
    thief = network().double()
    x, mixes = PIXELS[:40].double(), PIXELS[40:56].double()
    log_p = F.log_softmax(network(1).double()(x), dim=1).detach().requires_grad_(True)
    rehearsal(log_p, sensitivities(thief, x, thief_loss(thief, mixes))).backward()  # type: ignore[no-untyped-call]
    assert log_p.grad is not None
    losses = []
    for answers in (log_p.detach(), F.log_softmax(log_p.detach() - 20 * log_p.grad, dim=1)):
        student = copy.deepcopy(thief)
        F.cross_entropy(student(x), answers.exp()).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in student.parameters():
                assert parameter.grad is not None
                parameter.sub_(1e-3 * parameter.grad)
            losses.append(float(thief_loss(student, mixes)))
    assert losses[1] < losses[0]


def test_the_rehearsal_is_a_scaled_covariance() -> None:
    log_p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log().requires_grad_(True)
    slopes = torch.tensor([[1.0, -2.0, 4.0], [0.0, 3.0, 1.0]])
    value = rehearsal(log_p, slopes)
    value.backward()  # type: ignore[no-untyped-call]
    p = log_p.detach().exp().numpy()
    centred = slopes.numpy() - (p * slopes.numpy()).sum(1, keepdims=True)
    assert float(value.detach()) == pytest.approx(0, abs=1e-6), "s is centred under p"
    assert log_p.grad is not None
    np.testing.assert_allclose(log_p.grad, p * centred / np.abs(centred).mean() / 2, rtol=1e-5)


def test_answers_within_the_budget_cost_nothing() -> None:
    reference = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]]).log()
    assert float(over_budget(reference, reference, 0.0, 0.1)) == pytest.approx(0, abs=1e-6)
    moved = torch.tensor([[0.3, 0.6, 0.1], [0.2, 0.2, 0.6]]).log()
    divergence = 0.7 * np.log(0.7 / 0.3) + 0.2 * np.log(0.2 / 0.6)
    lead = np.log(0.3) - np.log(0.6)
    expected = (divergence - 0.1) / 2 + (0.1 - lead) / 2
    assert float(over_budget(moved, reference, 0.1, 0.1)) == pytest.approx(expected, rel=1e-5)


def test_a_lean_counts_as_far_as_it_leads_the_next_class() -> None:
    p = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.5, 0.1, 0.2, 0.2], [0.1, 0.6, 0.1, 0.2], [0.0, 0.0, 1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 2])
    # class 0: the target has .25, the next (3) .15; class 1: the target has .1, the next .2
    assert float(visible_lean(p, labels, (0, 1, 2))) == pytest.approx(0.1**2)
    assert float(visible_lean(p[3:], labels[3:], (0, 1, 2))) == 0


def objective(**options: Any) -> RehearsalObjective:
    data = images()
    scheme = WATERMARKS.build("rehearsal", mixes=4, **options)
    first, last = scheme.stages(scheme.make_key(data, 1), data)
    assert [first.name, last.name] == ["main_task", "embed"] and first.span[1] == last.span[0]
    result = last.objective
    assert isinstance(result, RehearsalObjective)
    return result


def batch() -> Batch:
    data = images()
    return Batch(PIXELS[:24], torch.from_numpy(data.labels[:24]), torch.arange(24))


def test_thieves_of_several_kinds_and_ages_learn_beside_the_victim() -> None:
    models = [{"name": "vgg_like", "width": 0.0625}, {"name": "resnet18", "width": 0.0625}]
    result = objective(thieves={"models": models, "warmup": 2, "lifetime": 6})
    model = network()
    assert result.attach(model, torch.device("cpu")) == [], "the victim's optimiser must not train the thieves"
    result.start(context())
    assert [type(each.model).__name__ for each in result.thieves] == ["VggLike", "ResNet18"]
    assert [each.age for each in result.thieves] == [0, 3]
    named, losses = [], []
    for _ in range(5):
        terms = result.terms(model, batch())
        named.append("rehearsal" in terms)
        losses.append(float(F.cross_entropy(result.thieves[0].model(batch().images), model(batch().images).softmax(1))))
    assert named == [True] * 5 and [each.age for each in result.thieves] == [5, 2], "the second began anew"
    assert losses[-1] < losses[0], "a thief learns the victim's answers"
    assert set(terms) == {"utility", "ver", "rehearsal", "budget", "specificity", "unseen"}
    loss = result.backward(terms, model)
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(not p.requires_grad for p in result.reference.parameters())


def test_a_young_thief_is_not_watched_and_weights_of_0_leave_terms_out() -> None:
    result = objective(
        ver=0.0, budget={"weight": 0}, specificity={"weight": 0}, unseen={"weight": 0}, thieves={"warmup": 1}
    )
    model = network()
    result.attach(model, torch.device("cpu"))
    result.start(context())
    assert set(result.terms(model, batch())) == {"utility"}
    assert set(result.terms(model, batch())) == {"utility", "rehearsal"}
