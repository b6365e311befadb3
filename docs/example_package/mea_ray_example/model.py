"""A network with one hidden layer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from mea_ray.models.base import ImageModel, initialise


class Perceptron(ImageModel):
    """One hidden layer.

    Args:
        hidden: Neurons of the hidden layer.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, *, hidden: Annotated[int, Field(ge=1)] = 64) -> None:
        super().__init__(shape, classes)
        channels, height, width = shape
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.ReLU())
        self.feature_size = hidden
        self.head = nn.Linear(hidden, classes)
        initialise(self)

    def encode(self, x: Tensor) -> Tensor:
        """Return features, float32 (N, hidden), of normalised images, float32 (N, C, H, W)."""
        features: Tensor = self.body(x)
        return features
