"""Fewer bits per weight."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Removal, ThiefData, copied


class Quantisation(Removal):
    """Round the weights of all convolutions and linear layers to a few evenly spaced values, symmetric about zero.

    Choose it to see whether deployment with few bits loses the mark.

    There is one scale per output channel, as in post-training quantisation. Biases and activations are not rounded.

    Args:
        bits: Bits per weight, for 2**bits - 1 values.
    """

    name = "quantisation"

    def __init__(self, *, bits: Annotated[int, Field(ge=2, le=8)] = 4) -> None:
        self.bits = bits

    @property
    def strength(self) -> float:
        """Bits that a float32 weight loses."""
        return float(32 - self.bits)

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
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
