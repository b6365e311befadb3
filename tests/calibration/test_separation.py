"""The table of statistics: TPR at 0 and 1% FPR, and AUC."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from mea_ray.calibration.separation import separation, separations
from mea_ray.core.errors import DataError


def test_the_rates_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    innocent, stolen = rng.normal(size=250), rng.normal(1.5, 1, size=120)
    result = separation("wsr", innocent.tolist(), stolen.tolist())
    assert result.tpr_at_0 == pytest.approx((stolen > innocent.max()).mean())
    assert result.tpr_at_1 == pytest.approx((stolen > np.sort(innocent)[-3]).mean())  # 2 of 250 are accused
    assert result.auc == pytest.approx(mannwhitneyu(stolen, innocent).statistic / (250 * 120))
    assert (result.innocent, result.stolen) == (250, 120)


def test_a_tie_with_an_innocent_model_is_no_detection() -> None:
    result = separation("wsr", [0.0, 1.0], [1.0, 1.0])
    assert result.tpr_at_0 == 0.0 and result.auc == 0.75


def test_with_few_innocent_models_one_percent_allows_none() -> None:
    result = separation("wsr", [0.1, 0.5, 0.9], [0.6, 0.95])
    assert result.tpr_at_0 == result.tpr_at_1 == 0.5


def test_statistics_are_listed_best_first_and_only_where_all_models_have_them() -> None:
    innocent = [{"wsr": 0.3, "lean": -9.0, "paired": 1.0}, {"wsr": 0.0, "lean": -8.0}]
    stolen = [{"wsr": 0.2, "lean": -2.0, "paired": 3.0}, {"wsr": 0.9, "lean": -1.0, "paired": 2.0}]
    assert [each.statistic for each in separations(innocent, stolen)] == ["lean", "wsr"]
    assert separations([], stolen) == []


@pytest.mark.parametrize(("innocent", "stolen"), [([], [1.0]), ([1.0], []), ([np.nan], [1.0])])
def test_without_models_there_is_nothing_to_separate(innocent: list[float], stolen: list[float]) -> None:
    with pytest.raises(DataError, match="wsr"):
        separation("wsr", innocent, stolen)
