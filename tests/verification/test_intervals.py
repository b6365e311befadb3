"""The bootstrap over source images: its error is that of the images, not of the mixes."""

from __future__ import annotations

import numpy as np
import pytest

from mea_ray.core.errors import DataError
from mea_ray.verification.intervals import clustered_interval, difference_p_value
from mea_ray.verification.proportions import wilson


def crossed(rng: np.random.Generator, n: int, count: int, spread: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Values of ``count`` mixes of n + n images, where every image shifts all of its mixes."""
    first, second = rng.integers(0, n, count), rng.integers(0, n, count)
    shifts = spread * rng.standard_normal((2, n))
    return shifts[0, first] + shifts[1, second] + rng.standard_normal(count), [first, second]


def test_shared_images_widen_the_interval_to_its_true_error() -> None:
    rng = np.random.default_rng(0)
    means, widths = [], []
    for repeat in range(150):
        values, clusters = crossed(rng, 20, 300, 1.0)
        result = clustered_interval(values, clusters, draws=300, seed=repeat)
        means.append(result.mean)
        widths.append((result.high - result.low) / (2 * 1.96))
    plain = np.sqrt(3 / 300)  # what independent values would have
    assert np.std(means) > 2.5 * plain
    assert 0.85 * np.std(means) < np.mean(widths) < 1.3 * np.std(means)


def test_coverage_is_near_the_nominal_level() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for repeat in range(200):
        values, clusters = crossed(rng, 24, 300, 0.7)
        result = clustered_interval(values, clusters, draws=300, seed=repeat)
        inside += result.low <= 0 <= result.high
    assert 0.9 <= inside / 200 <= 1.0


def test_independent_values_have_the_plain_error() -> None:
    values = np.random.default_rng(2).standard_normal(400)
    result = clustered_interval(values, [np.arange(400)], draws=2000)
    assert (result.high - result.low) / (2 * 1.96) == pytest.approx(values.std() / 20, rel=0.1)
    assert result.mean == pytest.approx(values.mean())


def test_a_third_cluster_may_be_the_model() -> None:
    rng = np.random.default_rng(3)
    model = np.repeat(np.arange(5), 100)
    values = rng.standard_normal(5)[model] + 0.1 * rng.standard_normal(500)
    images = rng.integers(0, 50, 500)
    alone = clustered_interval(values, [images])
    with_models = clustered_interval(values, [images, model])
    assert with_models.high - with_models.low > 2 * (alone.high - alone.low)


def test_all_successes_keep_the_uncertainty_of_the_fewer_images() -> None:
    first, second = np.arange(60) % 12, np.arange(60) % 30
    result = clustered_interval(np.ones(60), [first, second])
    assert (result.low, result.high) == wilson(12, 12)
    assert clustered_interval(np.zeros(60), [first, second]).p_not_positive == 1.0


def test_the_one_sided_probability() -> None:
    rng = np.random.default_rng(4)
    values, clusters = crossed(rng, 20, 300, 0.3)
    assert clustered_interval(values + 2, clusters).p_not_positive == pytest.approx(1 / 2001)
    assert clustered_interval(values - 2, clusters).p_not_positive == 1.0


def test_the_same_seed_gives_the_same_interval() -> None:
    values, clusters = crossed(np.random.default_rng(5), 10, 50, 1.0)
    assert clustered_interval(values, clusters, seed=3) == clustered_interval(values, clusters, seed=3)
    assert clustered_interval(values, clusters, seed=3) != clustered_interval(values, clusters, seed=4)


def test_what_makes_no_interval_is_refused() -> None:
    ones = np.ones(3)
    for values, clusters in ((ones[:0], [np.arange(0)]), (ones, []), (ones, [np.arange(2)])):
        with pytest.raises(DataError):
            clustered_interval(values, clusters)
    with pytest.raises(DataError, match="confidence"):
        clustered_interval(ones, [np.arange(3)], confidence=1.0)


def test_the_difference_of_two_means_is_tested_by_both_sets_of_images() -> None:
    rng = np.random.default_rng(6)
    values, clusters = crossed(rng, 15, 200, 0.5)
    others, other_clusters = crossed(rng, 15, 200, 0.5)
    assert difference_p_value(values + 3, clusters, others, other_clusters) == pytest.approx(1 / 2001)
    assert difference_p_value(values - 3, clusters, others, other_clusters) == 1.0


def test_equal_means_are_rarely_called_different() -> None:
    rng = np.random.default_rng(7)
    p_values = [
        difference_p_value(*crossed(rng, 15, 150, 0.7), *crossed(rng, 15, 150, 0.7), draws=200, seed=repeat)
        for repeat in range(200)
    ]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
