"""How far a suspect's success is above that of innocent models, by a beta-binomial fitted to the null models.

Success rates of innocent models differ by far more than a binomial allows (standard deviation 7.9 points over 24 digits
models, 0.8 for a binomial), so the rate itself must vary between models. The fit extrapolates beyond a few null models;
it is descriptive, and the rank (``ranks``) decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mea_ray.core.errors import DataError
from mea_ray.results.records import SuccessRate

MIN_DISPERSION, MAX_DISPERSION = 1e-6, 0.999


@dataclass(frozen=True)
class BetaBinomial:
    """A distribution of successes whose rate varies between models.

    Attributes:
        mean: Mean success rate of an innocent model, in (0, 1).
        dispersion: Correlation of two samples of one model, in (0, 1); it approaches 0 for a binomial.
    """

    mean: float
    dispersion: float

    @property
    def parameters(self) -> tuple[float, float]:
        """Both parameters (a, b) of the beta distribution of the rate."""
        size = 1 / self.dispersion - 1
        return self.mean * size, (1 - self.mean) * size

    def tail(self, k: int, n: int) -> float:
        """Return the probability that an innocent model has ``k`` or more successes in ``n`` samples."""
        from scipy.stats import betabinom  # the import takes half a second, and reports of many points need no fit

        return float(betabinom.sf(k - 1, n, *self.parameters))


def fit_beta_binomial(rates: Sequence[SuccessRate]) -> BetaBinomial:
    """Fit a beta-binomial to the successes of null models by maximum likelihood.

    Args:
        rates: Watermark success of each null model, at least two with samples.

    Returns:
        The fit. Its mean is at least half a success in all samples together, so that null models without any success
        do not make success impossible.

    Raises:
        DataError: There are fewer than two null models with samples.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, logit
    from scipy.stats import betabinom

    known = [rate for rate in rates if rate.trials]
    if len(known) < 2:
        raise DataError(f"a spread between null models needs at least 2 of them, got {len(known)}")
    successes = np.array([rate.successes for rate in known])
    trials = np.array([rate.trials for rate in known])
    least = 0.5 / (trials.sum() + 1)
    bounds = [(logit(least), logit(1 - least)), (logit(MIN_DISPERSION), logit(MAX_DISPERSION))]

    def loss(parameters: np.ndarray) -> float:
        fit = BetaBinomial(*map(float, expit(parameters)))
        return -float(betabinom.logpmf(successes, trials, *fit.parameters).sum())

    mean = np.clip(successes.sum() / trials.sum(), 2 * least, 1 - 2 * least)
    starts = [np.array([logit(mean), logit(dispersion)]) for dispersion in (0.001, 0.05, 0.3)]
    # Tolerances at which reports round to the same digits on every processor.
    tight = {"ftol": 1e-13, "gtol": 1e-8}
    fits = (minimize(loss, start, method="L-BFGS-B", bounds=bounds, options=tight) for start in starts)
    best = min(fits, key=lambda fit: fit.fun)
    return BetaBinomial(*map(float, expit(best.x)))
