"""Every loss against a loop in numpy and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from mea_ray.watermarks.mea_defender import losses

N, K = 9, 6


@pytest.fixture
def logits() -> Any:
    rng = np.random.default_rng(0)
    return [torch.tensor(3 * rng.standard_normal((N, K)), dtype=torch.float32, requires_grad=True) for _ in range(3)]


def divergence(first: Any, second: Any) -> Any:
    p, q = softmax(first.detach().double().numpy(), axis=1), softmax(second.detach().double().numpy(), axis=1)
    return np.mean([rel_entr(p[k], q[k]).sum() for k in range(len(p))])


def crossed(z: Any, soft: Any) -> Any:
    rows = log_softmax(z.detach().double().numpy(), axis=1)
    return np.mean([-sum(soft[k][c] * rows[k][c] for c in range(K)) for k in range(len(rows))])


@pytest.mark.parametrize("direction", ["watermark_source", "source_watermark"])
def test_combination_is_the_paired_divergence_of_equation_6(logits: Any, direction: Any) -> None:
    wm, a, b = logits
    expected = divergence(wm, a) + divergence(wm, b)
    if direction == "source_watermark":
        expected = divergence(a, wm) + divergence(b, wm)
    assert losses.combination(wm, a, b, direction=direction).item() == pytest.approx(expected, rel=1e-5)


def test_combination_is_zero_for_equal_answers_and_depends_on_the_pairing(logits: Any) -> None:
    wm, a, b = logits
    assert losses.combination(wm, wm, wm).item() == pytest.approx(0, abs=1e-6)
    assert losses.combination(wm, a, b).item() != pytest.approx(losses.combination(wm, a.flip(0), b).item(), rel=1e-3)


@pytest.mark.parametrize("gradient,moves", [("both", (1, 1, 1)), ("watermark", (1, 0, 0)), ("sources", (0, 1, 1))])
def test_combination_moves_only_the_chosen_side(logits: Any, gradient: Any, moves: Any) -> None:
    value = losses.combination(*logits, gradient=gradient)
    assert value.item() == pytest.approx(losses.combination(*logits).item())
    got = torch.autograd.grad(value, logits, allow_unused=True)
    full = torch.autograd.grad(losses.combination(*logits), logits)
    for moved, part, whole in zip(moves, got, full, strict=True):
        assert (part is not None) == bool(moved)
        if moved:
            torch.testing.assert_close(part, whole)


def test_verification_is_cross_entropy_with_the_target(logits: Any) -> None:
    assert losses.verification(logits[0], 4).item() == pytest.approx(crossed(logits[0], np.eye(K)[[4] * N]), rel=1e-5)


def test_evasion_takes_hard_and_soft_labels(logits: Any) -> None:
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1])
    hard = losses.evasion(logits[0], labels).item()
    assert hard == pytest.approx(crossed(logits[0], np.eye(K)[labels]), rel=1e-5)
    soft = np.zeros((N, K))
    soft[:, :2] = 0.5
    assert losses.evasion(logits[0], torch.tensor(soft)).item() == pytest.approx(crossed(logits[0], soft), rel=1e-5)
