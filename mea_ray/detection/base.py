"""What every detection is: an attempt to find a watermark in a model, or its samples among a model's queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Images
from mea_ray.evaluation.triggers import Trigger
from mea_ray.models.base import ImageModel

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class DetectionReport:
    """What a detection found.

    Attributes:
        flagged: Classes that it takes for the target of a backdoor or a watermark.
        triggers: One reverse-engineered trigger per class, for detections that make triggers.
        numbers: Measurements, by name.
    """

    flagged: tuple[int, ...] = ()
    triggers: tuple[Trigger, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)


class Detection(ABC):
    """An attempt to find a watermark. Keyword-only constructor parameters, all with defaults, configure it."""

    name: str = ""
    needs_features: bool = False
    """Whether it reads or replaces the last layer, which a network without features does not have."""
    least_images: int = 1
    """Fewest clean images that it works with."""

    def check(self, images: int) -> None:
        """Refuse too few clean images, before anything is trained.

        Args:
            images: Clean images that there will be: ``detection.images``, or the thief's pool if that is smaller.

        Raises:
            ConfigError: There are fewer than ``least_images``.
        """
        if images < self.least_images:
            raise ConfigError(
                f"detection {self.name!r} needs at least {self.least_images} clean images, but there are {images}; "
                "raise detection.images, or give the thief a larger pool (splits.thief_pool)"
            )

    @abstractmethod
    def inspect(self, model: ImageModel, clean: Images, samples: Images | None, seed: int) -> DetectionReport:
        """Inspect a model, or the owner's queries to it.

        Args:
            model: The model under inspection, on the CPU. It is not modified.
            clean: Clean images of the inspector, uint8 (N, C, H, W), N >= ``least_images``.
            samples: Watermark samples as the owner would query them, uint8; None without a key. They only serve to
                measure how many of them the detection notices.
            seed: Seed of all randomness.
        """
