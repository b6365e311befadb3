"""A forger (the paper's section VI-B): someone without a watermark who searches for mixes that a model answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
from torch import nn

from mea_ray.core.seeding import derive
from mea_ray.core.types import ImageSet
from mea_ray.evaluation import metrics
from mea_ray.watermarks.combiners import COMBINERS
from mea_ray.watermarks.combiners.base import Combiner
from mea_ray.watermarks.mixed_classes import MixedClasses

GEOMETRIES = ("top_bottom", "left_right", "diagonal", "donut", "hotdog", "pixel_merge")
Rates = npt.NDArray[np.float64]


def forge(
    model: nn.Module, held_out: ImageSet, *, count: int = 50, seed: int = 0, geometries: Sequence[str] = GEOMETRIES
) -> Rates:
    """Mix every pair of classes in every geometry, and count how often each third class is answered.

    Args:
        model: The model that the forger claims.
        held_out: Images that no model was trained on. Classes without images give NaN.
        count: Mixes of each pair and geometry; fewer if there are fewer pairs of images.
        seed: Seed of the pairs of images.
        geometries: Names of combiners.

    Returns:
        float64 (geometries, classes, classes, classes): at [g, a, b, c], a < b, the fraction of mixes of a and b that
        are answered with c; NaN where a >= b, and where c is a or b.
    """
    classes = held_out.classes
    rates = np.full((len(geometries), classes, classes, classes), np.nan)
    fill = (0.0,) * held_out.shape[0]
    built: list[Combiner] = [COMBINERS.build(name, held_out.shape, fill, 0) for name in geometries]
    present = [label for label in range(classes) if (held_out.labels == label).any()]
    for a, b in combinations(present, 2):
        first, second = held_out.of_class(a), held_out.of_class(b)
        mixes = [
            MixedClasses._mixes(each, first, second, count, derive(seed, name, a, b))
            for name, each in zip(geometries, built, strict=True)
        ]
        predicted = metrics.predictions(model, np.concatenate(mixes))
        for place, answers in enumerate(np.split(predicted, np.cumsum([len(each) for each in mixes])[:-1])):
            share = np.bincount(answers, minlength=classes) / len(answers)
            share[[a, b]] = np.nan
            rates[place, a, b] = share
    return rates


def best_of_pairs(rates: Rates) -> Rates:
    """Return the best rate of each pair of classes over geometries and third classes: float64 (classes, classes).

    The result is symmetric, with NaN where a pair has no images.
    """
    filled = np.where(np.isnan(rates), -1.0, rates).max((0, 3))
    best = np.maximum(filled, filled.T)
    return np.where(best < 0, np.nan, best)
