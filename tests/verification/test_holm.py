"""Holm's correction against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from mea_ray.verification.holm import holm


def rejected(p_values: list[float], alpha: float) -> set[int]:
    """The procedure as Holm wrote it: step down until the first p-value above alpha / (tests left)."""
    collected: set[int] = set()
    left = set(range(len(p_values)))
    while left:
        smallest = min(left, key=lambda i: p_values[i])
        if p_values[smallest] > alpha / len(left):
            return collected
        collected.add(smallest)
        left.remove(smallest)
    return collected


def test_adjusted_p_values_reject_what_the_procedure_rejects() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        p_values = (rng.uniform(size=rng.integers(1, 8)) ** 3).tolist()
        adjusted = holm(p_values)
        for alpha in (0.001, 0.01, 0.05, 0.2, 0.6):
            assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected(p_values, alpha)


def test_known_values_and_edges() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_family_of_true_hypotheses_is_rejected_at_most_at_alpha() -> None:
    p_values = np.random.default_rng(1).uniform(size=(2000, 10))
    wrong = np.mean([min(holm(row.tolist())) <= 0.05 for row in p_values])
    assert wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)
