"""Fewer bits per weight."""

from __future__ import annotations

import torch
from torch import nn

from mea_ray.core.errors import ConfigError
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Holdings, Removal, copied


class Quantisation(Removal):
    """Round the weights of all convolutions and linear layers to a few evenly spaced values, symmetric about zero.

    One scale per output channel, as post-training quantisation does it; biases and activations stay as they are.

    Args:
        bits: Bits per weight, 2 to 8: 2**bits - 1 values.

    Raises:
        ConfigError: ``bits`` is out of its range.
    """

    name = "quantisation"

    def __init__(self, *, bits: int = 4) -> None:
        if not 2 <= bits <= 8:
            raise ConfigError(f"bits={bits} must lie in 2 to 8")
        self.bits = bits

    @property
    def strength(self) -> float:
        """Bits that a float32 weight loses."""
        return float(32 - self.bits)

    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return the rounded copy."""
        rounded = copied(model)
        levels = 2 ** (self.bits - 1) - 1
        with torch.no_grad():
            for layer in rounded.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    weight = layer.weight
                    largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-12)
                    weight.copy_((weight / largest * levels).round() * largest / levels)
        return rounded
