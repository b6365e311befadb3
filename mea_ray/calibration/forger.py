"""The forger of the paper's section VI-B: he owns nothing, and looks for mixes that a model takes for his."""

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
        model: The model that is to look like the forger's.
        held_out: Images that nobody was trained on; classes without images are left out (NaN).
        count: Mixes of each pair and geometry, fewer if there are fewer pairs of images.
        seed: Seed of the pairs of images.
        geometries: Names in the table of combiners.

    Returns:
        float64 (geometries, classes, classes, classes): at [g, a, b, c], a < b, the part of mixes of a and b that are
        answered c; NaN where a >= b and where c is a or b.
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
        said = np.split(metrics.predictions(model, np.concatenate(mixes)), np.cumsum([len(m) for m in mixes])[:-1])
        for place, answers in enumerate(said):
            share = np.bincount(answers, minlength=classes) / len(answers)
            share[[a, b]] = np.nan
            rates[place, a, b] = share
    return rates


def best_of_pairs(rates: Rates) -> Rates:
    """Return what the forger gets from each pair of classes with his best geometry and third class: (classes, classes).

    Symmetric; NaN where there is nothing.
    """
    filled = np.where(np.isnan(rates), -1.0, rates).max((0, 3))
    best = np.maximum(filled, filled.T)
    return np.where(best < 0, np.nan, best)
