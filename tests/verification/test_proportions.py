from __future__ import annotations

import math

import pytest
from scipy.stats import binomtest

from mea_ray.core.errors import DataError
from mea_ray.verification.proportions import binomial_p_value, proportion, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 1000), (1, 3), (17, 40), (999, 1000), (1000, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_wilson_is_scipys(k: int, n: int, confidence: float) -> None:
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_contains_the_rate_and_stays_in_the_unit_interval() -> None:
    for n in (1, 2, 7, 100):
        for k in range(n + 1):
            low, high = wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1


@pytest.mark.parametrize(("k", "n", "rate"), [(0, 10, 0.1), (3, 10, 0.1), (10, 10, 0.01), (5, 20, 0.5), (1, 5, 0.0)])
def test_p_value_is_the_upper_tail(k: int, n: int, rate: float) -> None:
    tail = sum(math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(k, n + 1))
    assert binomial_p_value(k, n, rate) == pytest.approx(tail, abs=1e-12)


def test_without_trials_nothing_is_known() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert binomial_p_value(0, 0, 0.1) == 1.0
    assert proportion(0, 0).rate == 0.0


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(DataError):
        wilson(k, n)
    with pytest.raises(DataError):
        binomial_p_value(k, n, 0.1)


def test_impossible_rates_are_refused() -> None:
    with pytest.raises(DataError):
        wilson(1, 2, 1.0)
    with pytest.raises(DataError):
        binomial_p_value(1, 2, 1.1)
