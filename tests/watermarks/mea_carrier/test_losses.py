"""Every loss of the carrier scheme against a loop in numpy and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from mea_ray.watermarks.mea_carrier import losses

N, K = 9, 6


@pytest.fixture
def logits() -> Any:
    rng = np.random.default_rng(0)
    return [torch.tensor(3 * rng.standard_normal((N, K)), dtype=torch.float32, requires_grad=True) for _ in range(3)]


def crossed(z: Any, soft: Any) -> Any:
    rows = log_softmax(z.detach().double().numpy(), axis=1)
    return np.mean([-sum(soft[k][c] * rows[k][c] for c in range(K)) for k in range(len(rows))])


@pytest.mark.parametrize("rho", [0.2, 0.35])
def test_carrier_aims_at_rho_for_the_target(logits: Any, rho: Any) -> None:
    labels = torch.tensor([0, 1] * 4 + [0])
    soft = np.zeros((N, K))
    for k, label in enumerate(labels):
        soft[k, label] += 1 - rho
        soft[k, 5] += rho
    value = losses.carrier(logits[0], labels, 5, rho).item()
    assert value == pytest.approx(crossed(logits[0], soft), rel=1e-5)
    # The minimum of a cross-entropy is the entropy of its labels, reached by exactly these probabilities.
    best = torch.tensor(np.log(np.maximum(soft, 1e-12)), dtype=torch.float32)
    assert losses.carrier(best, labels, 5, rho).item() == pytest.approx(
        -rho * np.log(rho) - (1 - rho) * np.log(1 - rho), rel=1e-4
    )


def test_exclusion_is_a_hinge_on_the_other_source_class(logits: Any) -> None:
    labels = torch.tensor([3, 1, 1, 3, 3, 1, 3, 1, 1])
    z = logits[0].detach().numpy()
    expected = np.mean([max(0.0, 2.0 - (z[k, y] - z[k, 1 if y == 3 else 3])) for k, y in enumerate(labels)])
    assert losses.exclusion(logits[0], labels, (3, 1), 2.0).item() == pytest.approx(expected, rel=1e-5)
    far = torch.zeros(N, K)
    far[torch.arange(N), labels] = 2.0
    assert losses.exclusion(far, labels, (3, 1), 2.0).item() == 0


def test_exclusion_of_all_classes_spares_only_the_own_and_the_target(logits: Any) -> None:
    labels = torch.tensor([3, 1, 1, 3, 3, 1, 3, 1, 1])
    z = logits[0].detach().numpy()
    hinges = [
        max(0.0, 2.0 - (z[k, y] - z[k, c])) for k, y in enumerate(labels.tolist()) for c in range(K) if c not in {y, 2}
    ]
    assert losses.exclusion(logits[0], labels, (3, 1), 2.0, target=2).item() == pytest.approx(np.mean(hinges), rel=1e-5)
    nothing = losses.exclusion(logits[0][:0], labels[:0], (3, 1), 2.0, target=2)
    assert nothing.item() == 0, "a batch without source samples has no such loss, and no NaN"


def test_bridge_labels_share_sigma_between_the_sources() -> None:
    rows = losses.bridge_labels(4, 2, (3, 1), 0.4, K)
    expected = np.zeros(K)
    expected[[2, 3, 1]] = 0.6, 0.2, 0.2
    np.testing.assert_allclose(rows.numpy(), np.tile(expected, (4, 1)), rtol=1e-6)
