"""Generated noise: a thief's pool that needs no data and contains no information."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Dataset, Images, ImageSet
from mea_ray.data.memory import allocate, check_memory
from mea_ray.data.options import Channels, Count, ImageSize

Kind = Literal["uniform", "gaussian", "blobs"]


def _distinct(kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    if len(set(kinds)) < len(kinds):
        raise ValueError("name each kind once")
    return kinds


Kinds = Annotated[tuple[Kind, ...], Field(min_length=1), AfterValidator(_distinct)]

CELLS = 4
"""Blobs: random values along each side, between which the image is interpolated."""
_CHUNK = 1024
_BYTES = 12
"""Memory for each value while a chunk is drawn: three arrays of float32."""


def load(
    *,
    kinds: Kinds = ("uniform", "gaussian", "blobs"),
    train_images: Count = 10000,
    test_images: Count = 1000,
    image_size: ImageSize = 32,
    channels: Channels = 3,
    seed: int = 0,
) -> Dataset:
    """Draw images of noise as a thief's pool. Each kind of noise is a class.

    Choose it as a control: a thief's pool without any content.

    Args:
        kinds: Kinds of noise. uniform: each value is drawn evenly from 0 to 255. gaussian: normal around the middle
            grey with a quarter of the range as standard deviation, clipped. blobs: low frequencies only, 4 x 4 random
            values a channel, enlarged bilinearly.
        train_images: Training images, spread evenly over the kinds. A larger number adds images and changes none.
        test_images: Test images, spread evenly over the kinds; none is a training image.
        image_size: Height and width in pixels. For a thief's pool take the victim's: resizing would smooth the noise.
        channels: 1 (grey) or 3 (colour).
        seed: Seed of the images.

    Returns:
        Images of shape (channels, image_size, image_size), classes named after the kinds.

    Raises:
        ConfigError: There are fewer images than kinds.
        DataError: The images do not fit into memory.
    """
    for name, count in (("train_images", train_images), ("test_images", test_images)):
        if count < len(kinds):
            raise ConfigError(f"data.{name}={count} must be at least {len(kinds)}, one image for each of data.kinds")
    shape = (channels, image_size, image_size)
    train, test = _part(kinds, train_images, shape, seed, "train"), _part(kinds, test_images, shape, seed, "test")
    return Dataset("noise", train, test)


def _part(kinds: tuple[Kind, ...], count: int, shape: tuple[int, int, int], seed: int, part: str) -> ImageSet:
    check_memory("noise images of this size", _CHUNK * math.prod(shape) * _BYTES, "set a smaller data.image_size")
    images = allocate(count, shape)
    labels = np.arange(count, dtype=np.int64) % len(kinds)
    for label, kind in enumerate(kinds):
        generator = numpy_generator(seed, "noise", part, kind)
        # Whole chunks are drawn, so that the first images do not depend on how many follow.
        places = np.flatnonzero(labels == label)
        for start in range(0, len(places), _CHUNK):
            chosen = places[start : start + _CHUNK]
            images[chosen] = _MAKERS[kind](generator, (_CHUNK, *shape))[: len(chosen)]
    return ImageSet(images, labels, kinds)


def _uniform(generator: np.random.Generator, shape: tuple[int, ...]) -> Images:
    return generator.integers(0, 256, shape, dtype=np.uint8)


def _gaussian(generator: np.random.Generator, shape: tuple[int, ...]) -> Images:
    values = 127.5 + 63.75 * generator.standard_normal(shape, np.float32)
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _blobs(generator: np.random.Generator, shape: tuple[int, ...]) -> Images:
    cells = torch.from_numpy(generator.random((*shape[:2], CELLS, CELLS), np.float32))
    enlarged = F.interpolate(cells, size=shape[2:], mode="bilinear", align_corners=True)
    return np.round(255 * enlarged.numpy()).astype(np.uint8)


_MAKERS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Images]] = {
    "uniform": _uniform,
    "gaussian": _gaussian,
    "blobs": _blobs,
}
