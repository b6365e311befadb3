"""What every detection is: an attempt to find a watermark in a model, or its samples among the queries of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Images
from mea_ray.models.base import ImageModel


@dataclass(frozen=True)
class Trigger:
    """A trigger that was reverse-engineered for one class: x becomes (1 - mask) x + mask * pattern.

    Attributes:
        label: The class that it makes a model answer with.
        mask: float32 (1, H, W) in [0, 1].
        pattern: float32 (C, H, W) in [0, 1].
        success: Part of the images that it was made on which the model answers with the class under it.
    """

    label: int
    mask: npt.NDArray[np.float32]
    pattern: npt.NDArray[np.float32]
    success: float

    @property
    def norm(self) -> float:
        """L1 norm of the mask, in pixels."""
        return float(self.mask.sum())

    def on(self, images: Images) -> Images:
        """Put the trigger on images: uint8 (N, C, H, W)."""
        mixed = (1 - self.mask) * images.astype(np.float32) + self.mask * self.pattern * 255
        changed: Images = mixed.round().clip(0, 255).astype(np.uint8)
        return changed


@dataclass(frozen=True)
class Evidence:
    """What a detection found.

    Attributes:
        flagged: Classes that it calls the target of a backdoor, or a watermark.
        triggers: One reverse-engineered trigger per class, of those that make triggers.
        numbers: What it measured, by name.
    """

    flagged: tuple[int, ...] = ()
    triggers: tuple[Trigger, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)


class Detection(ABC):
    """An attempt to find a watermark. Keyword-only constructor parameters, all with defaults, configure it."""

    name: str = ""
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
    def inspect(self, model: ImageModel, clean: Images, asked: Images | None, seed: int) -> Evidence:
        """Look at a model, or at what it is asked.

        Args:
            model: The model under inspection, on the CPU; it stays as it is.
            clean: uint8 (N, C, H, W), N >= 1: what whoever looks holds.
            asked: uint8 watermark samples as an owner would ask them; None without a key. A detection uses them only to
                say how many of them it would have caught.
            seed: Seed of everything random.

        Returns:
            The evidence.
        """
