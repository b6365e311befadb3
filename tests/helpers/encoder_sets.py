"""What the tests of watermarked encoders share: images of three colours, a small encoder, the stages of a scheme."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mea_ray.core.types import ImageSet
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.pretext import PRETEXTS
from mea_ray.watermarks import WATERMARKS

SHAPE = (3, 16, 16)


def unit(count: int, width: int, seed: int) -> Tensor:
    """Random rows of length 1."""
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def coloured(count: int = 120) -> ImageSet:
    """Three classes, told apart by their brightest channel."""
    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int64) % 3
    images = rng.integers(0, 90, (count, *SHAPE), dtype=np.uint8)
    images[np.arange(count), labels] += 150
    return ImageSet(images, labels, ("red", "green", "blue"))


def encoder(seed: int = 0) -> ImageModel:
    """A narrow ResNet."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model("resnet18", SHAPE, 3, {"width": 0.1})


def stage_of(name: str, **params: Any) -> tuple[Any, Any, Any]:
    """A scheme, its key for ``coloured``, and its only stage with SimCLR."""
    scheme = WATERMARKS.build(name, **params)
    images = coloured()
    key = scheme.make_key(images, 3)
    (stage,) = scheme.encoder_stages(key, images, PRETEXTS.build("simclr"))
    return scheme, key, stage


def weights(**values: float) -> dict[str, dict[str, float]]:
    """Options that set the weights of losses."""
    return {name: {"weight": value} for name, value in values.items()}
