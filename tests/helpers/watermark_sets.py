"""Small image sets, and a model that remembers what it saw: what the tests of watermarks share."""

import numpy as np
import torch
from torch import nn

from mea_ray.core.types import ImageSet
from mea_ray.training.objective import Batch, StepContext

NAMES = tuple("abcdef")


def image_set(count=60, shape=(1, 16, 16), seed=0):
    rng = np.random.default_rng(seed)
    return ImageSet(
        rng.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count, dtype=np.int64) % len(NAMES), NAMES
    )


def coded_set(count=60):
    """Each image is of one colour, which tells which image it is."""
    images = np.zeros((count, 1, 16, 16), np.uint8)
    images += np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None]
    return ImageSet(images, np.arange(count, dtype=np.int64) % len(NAMES), NAMES)


class Spy(nn.Module):
    """A small classifier that remembers the batches it was given."""

    def __init__(self, pixels=256):
        super().__init__()
        self.seen = []
        self.layer = nn.Linear(pixels, len(NAMES))

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.layer(x.flatten(1))


def context(seed=0, epochs=10, augment=None):
    return StepContext(
        torch.device("cpu"),
        torch.Generator().manual_seed(seed),
        augment or (lambda x: x.float() / 255),
        epochs,
        4,
    )


def main_batch(train=None, count=12):
    train = train or image_set()
    images = torch.from_numpy(train.images[:count]).float() / 255
    return Batch(images, torch.from_numpy(train.labels[:count]), torch.arange(count))
