"""Confidence intervals for means over mixes: two mixes that share a source image are not independent.

A thousand mixes of 36 images of one class with 36 of another carry about as much information as 76 independent samples.
The bootstrap here resamples the source images, not the mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import DataError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.verification.proportions import wilson

ROUNDING = 1e-9
"""A mean counts as positive only above the rounding errors of a sum."""
Clusters = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: The mean over all values.
        low: Lower end.
        high: Upper end.
        p_not_positive: Bootstrap probability that the mean is at most zero, with one draw added against the owner.
    """

    mean: float
    low: float
    high: float
    p_not_positive: float


def clustered_interval(
    values: npt.NDArray[np.floating[Any]],
    clusters: Sequence[Clusters],
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap a mean whose values share source images and, if there are several, models.

    Each clustering is resampled independently, and a value is weighted by the product of the counts with which its
    clusters were drawn. For two clusterings this is slightly conservative.

    Args:
        values: One value per mix, (n,), n >= 1.
        clusters: For each clustering (first source image, second source image, model), the cluster of each value, (n,).
        confidence: Coverage, in (0, 1).
        draws: Bootstrap draws, at least 100.
        seed: Seed of the draws.

    Returns:
        Mean and percentile interval. A bootstrap of values in [0, 1] that are all 0 or all 1 has no spread: the
        interval is Wilson's with the smallest number of clusters as the number of trials.

    Raises:
        DataError: There are no values, lengths do not fit, or a setting is out of range.

    References:
        A. B. Owen, The pigeonhole bootstrap, Ann. Appl. Stat. 1 (2007), https://arxiv.org/abs/0712.1111.
    """
    if not 0 < confidence < 1:
        raise DataError(f"confidence={confidence} must lie in (0, 1)")
    means = bootstrap_means(values, clusters, draws=draws, seed=seed)
    mean = float(values.mean())
    if np.ptp(values) == 0 and mean in {0.0, 1.0}:
        fewest = min(len(np.unique(each)) for each in clusters)
        low, high = wilson(round(mean * fewest), fewest, confidence)
        return Interval(mean, low, high, 1.0 if mean == 0 else 1 / (draws + 1))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high), _p_not_positive(means))


def difference_p_value(
    values: npt.NDArray[np.floating[Any]],
    clusters: Sequence[Clusters],
    others: npt.NDArray[np.floating[Any]],
    other_clusters: Sequence[Clusters],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> float:
    """Return a one-sided bootstrap p-value for the mean of ``values`` not being above the mean of ``others``.

    Both are resampled by their own clusters, independently of each other. Arguments and errors are those of
    ``clustered_interval``.
    """
    first = bootstrap_means(values, clusters, draws=draws, seed=derive(seed, "values"))
    second = bootstrap_means(others, other_clusters, draws=draws, seed=derive(seed, "others"))
    count = min(len(first), len(second))
    return _p_not_positive(first[:count] - second[:count])


def bootstrap_means(
    values: npt.NDArray[np.floating[Any]], clusters: Sequence[Clusters], *, draws: int = 2000, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Resample clusters and return the mean of the values in each draw; see ``clustered_interval``.

    Returns:
        float64, at most (draws,): a draw that contains no value has no mean.
    """
    if not len(values) or not clusters or any(each.shape != values.shape for each in clusters):
        raise DataError(
            f"a clustered bootstrap needs one cluster for each of at least one value; got values {values.shape} and "
            f"clusters {[each.shape for each in clusters]}"
        )
    if draws < 100:
        raise DataError(f"draws={draws} must be at least 100")
    rng = numpy_generator(seed, "clustered interval")
    weights = np.ones((draws, len(values)))
    for each in clusters:
        labels, place = np.unique(each, return_inverse=True)
        weights *= rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=draws)[:, place]
    totals = weights.sum(1)
    means: npt.NDArray[np.float64] = (weights @ values)[totals > 0] / totals[totals > 0]
    return means


def _p_not_positive(means: npt.NDArray[np.float64]) -> float:
    return (1 + int((means <= ROUNDING).sum())) / (len(means) + 1)
