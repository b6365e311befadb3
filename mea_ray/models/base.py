"""What every network is: images in [0, 1] go in, it normalises them itself, features and logits come out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError

Width = Annotated[float, Field(gt=0, le=16)]
"""Factor on the width of every layer; 1 is the published size."""
Dropout = Annotated[float, Field(ge=0, lt=1)]
"""Probability of dropping a number; 1 would drop everything."""


class ImageModel(nn.Module):
    """Base of all networks.

    A subclass builds its layers in ``__init__`` (ending with :func:`initialise`), sets ``feature_size`` and ``head``,
    and defines :meth:`encode`. Normalisation is part of the network, in saved buffers: a checkpoint takes plain images
    and cannot be used with the statistics of another dataset.

    Attributes:
        shape: (channels, height, width) of one image.
        classes: Number of classes.
        feature_size: Length of one row of :meth:`features`.
        head: Maps features (N, feature_size) to logits (N, classes).
        mean: Buffer, float32 (C, 1, 1), subtracted from images in [0, 1].
        std: Buffer, float32 (C, 1, 1), that the difference is divided by.
        spec: Name, parameters, shape and classes that rebuild the network; set by ``build_model``.

    Args:
        shape: (channels, height, width) of one image; each at least 1.
        classes: Number of classes, at least 2.

    Raises:
        ConfigError: A side of the shape is below 1, there are fewer than 2 classes, or the image is below 8 x 8.
    """

    channels_last = True
    """Whether the network can take images and weights in this memory layout."""
    has_features = True
    """Whether there are ``features`` and a ``head``."""
    SMALLEST = 8
    """Smallest height and width that every network takes, in pixels."""

    shape: tuple[int, int, int]
    classes: int
    feature_size: int
    head: nn.Module
    mean: Tensor
    std: Tensor
    spec: dict[str, Any]

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape) < 1:
            raise ConfigError(f"image shape must be (channels, height, width), each at least 1, got {tuple(shape)}")
        if classes < 2:
            raise ConfigError(f"a classifier needs at least 2 classes, got {classes}; check the dataset's labels")
        if min(shape[1:]) < self.SMALLEST:
            raise ConfigError(
                f"{type(self).__name__} takes images of at least {self.SMALLEST} x {self.SMALLEST} pixels, got "
                f"{shape[1]} x {shape[2]}; set data.image_size={self.SMALLEST} or larger"
            )
        channels, height, width = map(int, shape)
        self.shape = (channels, height, width)
        self.classes = int(classes)
        # 0.5 and 0.5 bring [0, 1] to [-1, 1]: right for no dataset, reasonable for all until the owner's are set.
        self.register_buffer("mean", torch.full((channels, 1, 1), 0.5))
        self.register_buffer("std", torch.full((channels, 1, 1), 0.5))

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the channel statistics of the training images, in units of [0, 1].

        Args:
            mean: One value per channel.
            std: One positive value per channel.

        Raises:
            ConfigError: There is not one value per channel, a value is not finite, or a deviation is not positive.
        """
        channels = self.shape[0]
        if len(mean) != channels or len(std) != channels:
            raise ConfigError(f"normalisation needs {channels} means and deviations, got {len(mean)} and {len(std)}")
        if not all(map(math.isfinite, (*mean, *std))):
            raise ConfigError(f"means {list(mean)} and standard deviations {list(std)} must be finite")
        if not all(value > 0 for value in std):
            raise ConfigError(f"standard deviations must be positive, got {list(std)}; use 1 for a constant channel")
        for buffer, values in ((self.mean, mean), (self.std, std)):
            buffer.copy_(torch.as_tensor([float(v) for v in values], dtype=buffer.dtype).view(-1, 1, 1))

    def features(self, x: Tensor) -> Tensor:
        """Return what the head sees.

        Args:
            x: float32 images in [0, 1], shape (N, C, H, W).

        Returns:
            float32 features, shape (N, feature_size).
        """
        return self.encode((x - self.mean) / self.std)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (N, classes), of float32 images in [0, 1], shape (N, C, H, W)."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def encode(self, x: Tensor) -> Tensor:
        """Return features, shape (N, feature_size), of *normalised* images, shape (N, C, H, W)."""
        raise NotImplementedError


def scaled(channels: int, width: float) -> int:
    """Return a layer's width times the factor ``width``, at least 1."""
    return max(1, round(channels * width))


def initialise(model: ImageModel) -> None:
    """Set initial weights: He et al. 2015; small ones in the last layer, so that first predictions are near uniform.

    Draws from torch's global generator; seed it before building a network.

    References:
        He et al., Delving Deep into Rectifiers, ICCV 2015, eq. 10 (fan-in).
    """
    last = [module for module in model.head.modules() if isinstance(module, nn.Linear)][-1:]
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for module in last:
        nn.init.normal_(module.weight, std=0.01)


def halvings(shape: tuple[int, int, int], most: int) -> int:
    """Return how many of ``most`` halvings of an image leave a map of at least 2 x 2."""
    return min(most, min(shape[1:]).bit_length() - 2)
