"""Counts, intervals and p-values of a proof of ownership: exact where possible, conservative where not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from scipy.stats import binomtest

from mea_ray.core.errors import DataError
from mea_ray.results.records import Rate

NULL_RATE_FLOOR = 0.01
"""Smallest rate at which an innocent model is assumed to succeed, whatever the null models did (see ``null_rate``)."""


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (two-sided, without continuity correction).

    Args:
        k: Successes, 0 <= k <= n.
        n: Trials; without any, nothing is known and the interval is (0, 1).
        confidence: Coverage, in (0, 1).

    Returns:
        (low, high), both in [0, 1].

    Raises:
        DataError: The counts or the confidence are impossible.

    References:
        E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    _check_counts(k, n)
    if not 0 < confidence < 1:
        raise DataError(f"confidence must lie in (0, 1), got {confidence}; 0.95 is usual")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    # The exact ends are 0 at k = 0 and 1 at k = n; rounding must not leave the interval short of them.
    low = 0.0 if k == 0 else max(0.0, centre - half)
    high = 1.0 if k == n else min(1.0, centre + half)
    return low, high


def proportion(k: int, n: int) -> Rate:
    """A success count with its rate (0 without trials) and its 95 % Wilson interval."""
    low, high = wilson(k, n)
    return Rate(successes=k, trials=n, rate=k / n if n else 0.0, low=low, high=high)


def binomial_p_value(k: int, n: int, rate: float) -> float:
    """Exact one-sided p-value: the chance that an innocent model has ``k`` or more successes in ``n`` trials.

    Args:
        k: Successes, 0 <= k <= n.
        n: Trials; without any, the p-value is 1.
        rate: An innocent model's success rate, in [0, 1].

    Returns:
        P(X >= k) for X ~ Binomial(n, rate), in [0, 1].

    Raises:
        DataError: The counts or the rate are impossible.
    """
    _check_counts(k, n)
    if not 0 <= rate <= 1:
        raise DataError(f"an innocent model's rate must lie in [0, 1], got {rate}")
    return float(binomtest(k, n, rate, alternative="greater").pvalue) if n else 1.0


def null_rate(rates: Sequence[Rate], *, confidence: float = 0.95, floor: float = NULL_RATE_FLOOR) -> float:
    """The success rate to hold against a suspect, from what innocent models did on the same watermark samples.

    Conservative on purpose, since an owner accuses on the strength of it: the largest of

    - the upper Wilson bound of the counts pooled over all null models, not the point estimate: a few null models know
      their rate only roughly, and an estimate of 0 successes would make every single success a proof;
    - the rate of the null model that succeeded most: null models differ from each other by more than the binomial
      spread (they share the watermark samples), which pooling hides;
    - ``floor``: that none of the few null models succeeded does not make success impossible for all innocent models.

    Args:
        rates: Watermark success of each null model.
        confidence: Coverage of the pooled interval.
        floor: Least rate returned, in (0, 1).

    Returns:
        A rate in [floor, 1].

    Raises:
        DataError: There is no null model, so nothing is known of innocent models.
    """
    trials = sum(rate.trials for rate in rates)
    if not trials:
        raise DataError("the null rate needs one null model with samples at least; set verification.null_models >= 1")
    pooled = wilson(sum(rate.successes for rate in rates), trials, confidence)[1]
    return max(pooled, floor, *(rate.rate for rate in rates))


def _check_counts(k: int, n: int) -> None:
    if not 0 <= k <= n:
        raise DataError(f"successes must lie between 0 and the {n} trials, got {k}")
