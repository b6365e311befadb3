"""Small image sets, and a model that remembers what it saw: what the tests of watermarks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mea_ray.core.types import ImageSet
from mea_ray.training.objective import Batch, StepContext
from mea_ray.watermarks import WATERMARKS

NAMES = tuple("abcdef")


def image_set(count: int = 60, shape: tuple[int, int, int] = (1, 16, 16), seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    return ImageSet(
        rng.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count, dtype=np.int64) % len(NAMES), NAMES
    )


def coded_set(count: int = 60) -> ImageSet:
    """Each image is of one colour, which tells which image it is."""
    images = np.zeros((count, 1, 16, 16), np.uint8)
    images += np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None]
    return ImageSet(images, np.arange(count, dtype=np.int64) % len(NAMES), NAMES)


class Spy(nn.Module):
    """A small classifier that remembers the batches it was given."""

    def __init__(self, pixels: int = 256) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.layer = nn.Linear(pixels, len(NAMES))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        logits: Tensor = self.layer(x.flatten(1))
        return logits


def context(seed: int = 0, epochs: int = 10, augment: Callable[[Tensor], Tensor] | None = None) -> StepContext:
    return StepContext(
        torch.device("cpu"),
        torch.Generator().manual_seed(seed),
        augment or (lambda x: x.float() / 255),
        epochs,
        4,
    )


def main_batch(train: ImageSet | None = None, count: int = 12) -> Batch:
    train = train or image_set()
    images = torch.from_numpy(train.images[:count]).float() / 255
    return Batch(images, torch.from_numpy(train.labels[:count]), torch.arange(count))


def started(
    name: str,
    seed: int = 0,
    augment: Callable[[Tensor], Tensor] | None = None,
    train: ImageSet | None = None,
    **options: Any,
) -> Any:
    """The objective of a scheme's last stage, in its first epoch."""
    scheme = WATERMARKS.build(name, **options)
    train = train or image_set()
    stage = scheme.stages(scheme.make_key(train, 1), train)[-1]
    stage.objective.start(context(seed, augment=augment))
    stage.objective.start_epoch(0)
    return stage.objective
