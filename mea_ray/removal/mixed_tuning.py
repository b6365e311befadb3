"""The base of removals that tune on clean images and on mixes of them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Images, ImageSet, Labels
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Epochs, LearningRate, Prospect, Removal, ThiefData, copied, labelled, tune


class MixedTuning(Removal):
    """Fine-tune on clean images with the API's classes, and on mixes of them with other labels.

    Args:
        share: Mixes per clean image.
        epochs: Passes over clean images and mixes.
        learning_rate: Peak learning rate.
    """

    what: ClassVar[str]
    """What the mixes are called in messages, with its verb."""
    least_images: ClassVar[int]
    """Fewest clean images; fewer cannot cover enough classes."""

    def __init__(
        self,
        *,
        share: Annotated[float, Field(gt=0, le=10)] = 0.2,
        epochs: Epochs = 5,
        learning_rate: LearningRate = 5e-4,
    ) -> None:
        self.share, self.epochs, self.learning_rate = share, epochs, learning_rate

    @property
    def strength(self) -> float:
        """Mixes per clean image."""
        return self.share

    @abstractmethod
    def mixes(self, clean: ImageSet, count: int, seed: int) -> tuple[Images, Labels]:
        """Return mixes, uint8 (count, C, H, W), and what they are labelled, int64 (count,).

        Raises:
            ConfigError: There are fewer than three classes.
        """

    def check(self, prospect: Prospect) -> None:
        """Refuse fewer than three classes, and too few images to cover enough classes."""
        if prospect.model.classes < 3 or prospect.images < self.least_images:
            raise ConfigError(f"{self.what}, got {prospect.model.classes} classes and {prospect.images} images")
        prospect.check_batches(prospect.images + self._count(prospect.images))

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the tuned copy.

        Raises:
            ConfigError: There are fewer than three classes.
        """
        tuned = copied(model)
        clean = labelled(thief, tuned.classes)
        images, labels = self.mixes(clean, self._count(len(clean)), seed)
        both = ImageSet(
            np.concatenate([clean.images, images]), np.concatenate([clean.labels, labels]), clean.class_names
        )
        return tune(tuned, both, thief, seed, epochs=self.epochs, learning_rate=self.learning_rate)

    def _count(self, images: int) -> int:
        return max(1, round(self.share * images))
