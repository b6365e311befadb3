"""No pretext task: the victim is a classifier."""

from __future__ import annotations

from mea_ray.training.objective import CrossEntropy


class NoPretext(CrossEntropy):
    """Supervised learning: cross-entropy with the labels. The API answers with class probabilities.

    Choose it for a classifier.
    """
