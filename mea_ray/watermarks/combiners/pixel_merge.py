"""Pixel merge: both images seen through each other."""

from __future__ import annotations

import torch
from torch import Tensor

from mea_ray.errors import ConfigError
from mea_ray.watermarks.combiners.base import Combiner, Order


def check_alpha(alpha: float) -> float:
    """Return ``alpha``, the first image's share of a blend.

    Raises:
        ConfigError: It does not lie strictly between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha={alpha} must lie strictly between 0 and 1, or only one source class would show")
    return alpha


class PixelMerge(Combiner):
    """alpha times the first image plus (1 - alpha) times the second.

    Args:
        alpha: Share of the first image.
        order: ``fixed`` gives ``alpha`` to the first source class, ``random`` to either.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        fill: tuple[float, ...],
        seed: int,
        *,
        alpha: float = 0.5,
        order: Order = "fixed",
    ) -> None:
        super().__init__(shape, fill, seed, order=order)
        self.alpha = check_alpha(alpha)

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Blend the pixels."""
        return torch.lerp(second, first, self.alpha)
