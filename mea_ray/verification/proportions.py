"""Success rates with their Wilson intervals, and exact binomial tails."""

from __future__ import annotations

from mea_ray.core.errors import DataError
from mea_ray.results.records import SuccessRate


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's two-sided score interval of a proportion, without continuity correction.

    Args:
        k: Successes, 0 <= k <= n.
        n: Trials. With n = 0 the interval is (0, 1).
        confidence: Coverage, in (0, 1).

    Returns:
        (low, high), both in [0, 1].

    Raises:
        DataError: The counts or the confidence are impossible.

    References:
        E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    from scipy.stats import binomtest  # the import takes most of a second; a report only reads recorded intervals

    _check_counts(k, n)
    if not 0 < confidence < 1:
        raise DataError(f"confidence must lie in (0, 1), got {confidence}; 0.95 is usual")
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(k, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def proportion(k: int, n: int) -> SuccessRate:
    """Return a success count with its rate (0 without trials) and its 95 % Wilson interval."""
    low, high = wilson(k, n)
    return SuccessRate(successes=k, trials=n, rate=k / n if n else 0.0, low=low, high=high)


def binomial_p_value(k: int, n: int, rate: float) -> float:
    """Return the exact probability of ``k`` or more successes in ``n`` independent trials.

    Args:
        k: Successes, 0 <= k <= n.
        n: Trials. With n = 0 the probability is 1.
        rate: Success probability of one trial, in [0, 1].

    Returns:
        P(X >= k) for X ~ Binomial(n, rate), in [0, 1].

    Raises:
        DataError: The counts or the rate are impossible.
    """
    from scipy.stats import binomtest

    _check_counts(k, n)
    if not 0 <= rate <= 1:
        raise DataError(f"the rate of a binomial must lie in [0, 1], got {rate}")
    return float(binomtest(k, n, rate, alternative="greater").pvalue) if n else 1.0


def _check_counts(k: int, n: int) -> None:
    if not 0 <= k <= n:
        raise DataError(f"successes must lie between 0 and the {n} trials, got {k}")
