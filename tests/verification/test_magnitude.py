"""The beta-binomial of the null models."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, betabinom, binom

from mea_ray.core.errors import DataError
from mea_ray.verification.magnitude import BetaBinomial, fit_beta_binomial
from mea_ray.verification.proportions import proportion


def test_the_parameters_are_recovered() -> None:
    rng = np.random.default_rng(0)
    a, b = 0.8, 12.0
    counts = rng.binomial(500, beta.rvs(a, b, size=400, random_state=rng))
    fit = fit_beta_binomial([proportion(int(k), 500) for k in counts])
    assert fit.mean == pytest.approx(a / (a + b), rel=0.12)
    assert fit.dispersion == pytest.approx(1 / (a + b + 1), rel=0.25)


def test_no_other_parameters_are_likelier() -> None:
    counts = [(3, 100), (11, 100), (0, 90), (25, 100), (6, 80)]
    fit = fit_beta_binomial([proportion(*each) for each in counts])

    def likelihood(model: BetaBinomial) -> float:
        return float(sum(betabinom.logpmf(k, n, *model.parameters) for k, n in counts))

    best = likelihood(fit)
    for mean in np.linspace(0.01, 0.5, 40):
        for dispersion in np.geomspace(1e-4, 0.8, 40):
            assert likelihood(BetaBinomial(float(mean), float(dispersion))) <= best + 1e-4


def test_models_that_agree_leave_a_binomial() -> None:
    fit = fit_beta_binomial([proportion(k, 1000) for k in (99, 100, 101, 100)])
    assert fit.tail(130, 1000) == pytest.approx(binom.sf(129, 1000, 0.1), rel=0.05)


def test_models_that_differ_make_large_counts_likely() -> None:
    fit = fit_beta_binomial([proportion(k, 1000) for k in (0, 4, 324, 12, 51)])
    assert fit.tail(324, 1000) > 0.01 > 1e-12 > binom.sf(323, 1000, 391 / 5000)
    assert fit.tail(0, 1000) == 1.0


def test_null_models_without_success_do_not_make_success_impossible() -> None:
    fit = fit_beta_binomial([proportion(0, 1000)] * 3)
    assert 0 < fit.tail(1, 1000) < 1


def test_one_model_has_no_spread() -> None:
    with pytest.raises(DataError, match="at least 2"):
        fit_beta_binomial([proportion(3, 10), proportion(0, 0)])
