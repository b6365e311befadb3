"""The statistics that tell a stolen model from an innocent one, by name.

Each reduces per-image scores to one number that is larger for a stolen model. A score is the logarithm of the target's
probability, or, where a suspect gives labels only, 1 if the label is the target and 0 if not.

``wsr`` (labels) and ``log_probability``
    mean score of the key's mixes.
``paired_labels`` and ``paired``
    how much the key's mixes score above the same images mixed otherwise and above mixes of other classes.
``lean_labels`` and ``lean``
    mean score of the clean images of a source class, for the source class where it is least. A marked model leans
    towards the target on both of its source classes, an innocent one rarely on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from mea_ray.core.errors import DataError
from mea_ray.core.types import Images, Labels

Scores = npt.NDArray[np.float64]
"""One score per image, float64 (N,); larger speaks for theft."""
Score = Callable[[Images], Scores]
"""uint8 images (N, C, H, W) to their scores."""

FLOOR = 1e-12
"""Smallest probability whose logarithm is taken."""


@dataclass(frozen=True)
class ScoredSamples:
    """The scores that one model gives the owner's samples.

    Attributes:
        mixes: Of the key's mixes, (n,).
        otherwise: For each other geometry, of the same pairs of images mixed that way, (n,) in the same order.
        other_classes: Of mixes of classes that the key does not name, (m,); empty where there are none.
        sources: Of the clean source images, (s,).
        source_labels: Their labels, int64 (s,).

    Raises:
        DataError: There are no mixes, or lengths do not fit.
    """

    mixes: Scores
    otherwise: Mapping[str, Scores]
    other_classes: Scores
    sources: Scores
    source_labels: Labels

    def __post_init__(self) -> None:
        if not len(self.mixes):
            raise DataError("there are no mixes to score; raise splits.verification_fraction")
        for name, scores in self.otherwise.items():
            if len(scores) != len(self.mixes):
                raise DataError(f"{name}: {len(scores)} mixes cannot be paired with the key's {len(self.mixes)}")
        if len(self.sources) != len(self.source_labels):
            raise DataError(f"{len(self.sources)} clean images have {len(self.source_labels)} labels")


def label_scores(predicted: npt.NDArray[np.integer[Any]], target: int) -> Scores:
    """Return 1.0 where the predicted label is the target and 0.0 elsewhere, (N,)."""
    scores: Scores = (predicted == target).astype(np.float64)
    return scores


def log_scores(logits: npt.NDArray[np.floating[Any]], target: int) -> Scores:
    """Return the logarithm of the target's softmax probability, at least log(``FLOOR``).

    Args:
        logits: (N, classes).
        target: Label, in [0, classes).
    """
    values: Scores = log_softmax(logits.astype(np.float64), axis=1)[:, target]
    return np.maximum(values, np.log(FLOOR))


def mean_score(samples: ScoredSamples) -> float:
    """Return the mean score of the key's mixes."""
    return float(samples.mixes.mean())


def paired(samples: ScoredSamples) -> float:
    """Return the smallest lead of the key's mixes over what only looks like them.

    The leads are the mean paired difference to each other geometry, and the difference of means to other classes.

    Raises:
        DataError: There is neither another geometry nor another class to compare with.
    """
    leads = [float((samples.mixes - scores).mean()) for scores in samples.otherwise.values()]
    if len(samples.other_classes):
        leads.append(float(samples.mixes.mean() - samples.other_classes.mean()))
    if not leads:
        raise DataError("`paired` needs mixes in another geometry or of other classes")
    return min(leads)


def lean(samples: ScoredSamples) -> float:
    """Return the mean score of clean images of a source class, for the source class where it is least.

    Raises:
        DataError: There are no clean source images.
    """
    labels = np.unique(samples.source_labels)
    if not len(labels):
        raise DataError("`lean` needs clean images of the source classes")
    return min(float(samples.sources[samples.source_labels == label].mean()) for label in labels)


STATISTICS: Mapping[str, Callable[[ScoredSamples], float]] = {
    "log_probability": mean_score,
    "paired": paired,
    "lean": lean,
}
"""Statistics of logarithms of probabilities, by name."""
LABEL_STATISTICS: Mapping[str, Callable[[ScoredSamples], float]] = {
    "wsr": mean_score,
    "paired_labels": paired,
    "lean_labels": lean,
}
"""The same statistics for a suspect that gives labels only, by name."""
READ_ON_CLEAN_IMAGES = frozenset({"lean", "lean_labels"})
"""Statistics that need no mix to answer the target; the key's rank is their test of specificity."""
