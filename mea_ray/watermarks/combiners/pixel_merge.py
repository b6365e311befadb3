"""Pixel merge: both images seen through each other."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mea_ray.core.errors import ConfigError
from mea_ray.watermarks.combiners.base import Combiner, Order

Alpha = Annotated[float, Field(gt=0, lt=1)]
"""Share of the first image in a blend."""


class PixelMerge(Combiner):
    """alpha times the first image plus (1 - alpha) times the second, faded if asked.

    Choose it for small images, and for encoders: a blend has no seam.

    Args:
        alpha: Share of the first image.
        contrast: What the deviation of each value of the blend from the blend's mean is multiplied by, in (0, 1]; two
            numbers, least and largest, draw it for each blend.
        order: ``fixed`` gives ``alpha`` to the first source class, ``random`` to either.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        fill: tuple[float, ...],
        seed: int,
        *,
        alpha: Alpha = 0.5,
        contrast: float | tuple[float, float] = 1.0,
        order: Order = "fixed",
    ) -> None:
        super().__init__(shape, fill, seed, order=order)
        self.alpha = alpha
        self.least, self.most = contrast if isinstance(contrast, tuple | list) else (contrast, contrast)
        if not 0 < self.least <= self.most <= 1:
            raise ConfigError(
                f"contrast={contrast} must lie in (0, 1], the least before the largest; 1 leaves the blend unchanged"
            )

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Blend the pixels, then fade the blend."""
        blend = torch.lerp(second, first, self.alpha)
        if self.least == 1:
            return blend
        contrast = torch.full((len(blend), 1, 1, 1), self.least)
        if self.least < self.most:
            contrast += (self.most - self.least) * torch.rand(contrast.shape, generator=generator)
        return torch.lerp(blend.mean((1, 2, 3), keepdim=True), blend, contrast.to(blend))
