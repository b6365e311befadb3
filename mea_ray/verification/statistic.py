"""The statistics that distinguish a stolen model from an innocent one, by name.

Each reduces per-image scores to one number that is larger for a stolen model. A score is the logarithm of the target's
probability, or, where a suspect gives labels only, 1 if the label is the target and 0 if not.

``log_probability`` and ``wsr`` (labels)
    mean score of the key's mixes.
``paired`` and ``paired_labels``
    lead of the key's mixes over the same images mixed in another geometry, and over mixes of other classes.
``lean`` and ``lean_labels``
    mean score of the clean images of a source class, minimum over the source classes. A marked model leans towards the
    target on both of its source classes, an innocent one rarely on both.
``correlation``
    correlation of the key's signal with a suspect's log-probabilities on clean images, for marks that are such a
    signal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from mea_ray.core.errors import DataError
from mea_ray.core.types import Labels, StatisticName

STATISTICS: tuple[StatisticName, ...] = get_args(StatisticName)
READ_ON_CLEAN_IMAGES: frozenset[str] = frozenset({"lean", "lean_labels", "correlation"})
"""Statistics that do not depend on mixes. Their test of specificity is the key's rank."""

Scores = npt.NDArray[np.float64]
"""One score per image, float64 (N,); larger speaks for theft."""
FLOOR = 1e-12
"""Smallest probability whose logarithm is taken."""


def label_scores(predicted: npt.NDArray[np.integer[Any]], target: int) -> Scores:
    """Return 1.0 where the predicted label is the target and 0.0 elsewhere, (N,)."""
    scores: Scores = (predicted == target).astype(np.float64)
    return scores


def log_probabilities(logits: npt.NDArray[np.floating[Any]]) -> Scores:
    """Return the logarithms of the softmax probabilities of all classes, (N, classes), at least log(``FLOOR``)."""
    values: Scores = log_softmax(logits.astype(np.float64), axis=1)
    return np.maximum(values, np.log(FLOOR))


def paired(mixes: Scores, otherwise: Mapping[str, Scores], other_classes: Scores) -> float:
    """Return the smallest lead of the key's mixes over the comparison samples.

    The leads are the mean paired difference to each other geometry, and the difference of means to other classes.

    Args:
        mixes: Scores of the key's mixes, (n,).
        otherwise: For each other geometry, the scores of the first m pairs of images mixed that way, (m,), m <= n.
        other_classes: Scores of mixes of classes that the key does not name, (k,); may be empty.

    Raises:
        DataError: There is neither another geometry nor another class to compare with, or lengths do not fit.
    """
    longest = max((len(scores) for scores in otherwise.values()), default=0)
    if longest > len(mixes):
        raise DataError(f"{longest} mixes in another geometry cannot be paired with {len(mixes)} of the key's")
    leads = [float((mixes[: len(scores)] - scores).mean()) for scores in otherwise.values() if len(scores)]
    if len(other_classes):
        leads.append(float(mixes.mean() - other_classes.mean()))
    if not leads:
        raise DataError("`paired` needs mixes in another geometry or of other classes")
    return min(leads)


def lean(scores: Scores, labels: Labels) -> float:
    """Return the mean score of clean images of a source class, minimum over the source classes.

    Args:
        scores: Of clean images of the source classes, (s,).
        labels: Their classes, int64 (s,).

    Raises:
        DataError: There are no images, or lengths do not fit.
    """
    if not len(scores) or len(scores) != len(labels):
        raise DataError(f"`lean` needs a label for each of at least one image, got {len(scores)} and {len(labels)}")
    return min(float(scores[labels == label].mean()) for label in np.unique(labels))
