"""No watermark: what null models are trained with."""

from __future__ import annotations

from mea_ray.core.types import ImageSet
from mea_ray.training.objective import CrossEntropy, Objective
from mea_ray.watermarks.base import UNAUGMENTED, Key, Stage, Watermark


class NoWatermark(Watermark):
    """Trains the main task alone.

    Choose it to measure a theft without a watermark.
    """

    name = "none"

    def make_key(self, train: ImageSet, seed: int) -> Key | None:
        """Return None: there is nothing to keep secret."""
        return None

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return one stage with cross-entropy."""
        return [Stage("train", CrossEntropy(), train)]

    def encoder_stages(self, key: Key | None, train: ImageSet, pretext: Objective) -> list[Stage]:
        """Return one stage with the pretext task, see the base class."""
        return [Stage("train", pretext, train, UNAUGMENTED)]
