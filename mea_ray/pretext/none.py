"""No pretext task: the victim is a classifier."""

from __future__ import annotations

from mea_ray.training.objective import CrossEntropy


class NoPretext(CrossEntropy):
    """Supervised: the main task is the cross-entropy with the labels, and the API answers with classes."""
