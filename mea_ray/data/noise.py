"""Generated noise: a thief's pool that costs nothing and shows nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Dataset, Images, ImageSet

Kind = Literal["uniform", "gaussian", "blobs"]

CELLS = 4
"""Blobs: random cells a side, between which the image is interpolated."""
_CHUNK = 1024


def load(
    *,
    kinds: tuple[Kind, ...] = ("uniform", "gaussian", "blobs"),
    train_images: int = 10000,
    test_images: int = 1000,
    image_size: int = 32,
    channels: int = 3,
    seed: int = 0,
) -> Dataset:
    """Draw images of noise; a kind of noise is a class.

    Args:
        kinds: Kinds of noise. uniform: each value is drawn evenly from 0 to 255. gaussian: normal around the middle
            grey with a quarter of the range as standard deviation, clipped. blobs: low frequencies only, 4 x 4 random
            values a channel, enlarged bilinearly.
        train_images: Training images of all kinds together, in turn of the kinds. More images begin with the same ones.
        test_images: Test images of all kinds together, other ones.
        image_size: Height and width in pixels. As a thief's pool take the victim's: resizing would smooth the noise.
        channels: 1 or 3.
        seed: Seed of the images.

    Returns:
        Images of shape (channels, image_size, image_size), classes named after the kinds.

    Raises:
        ConfigError: An option lies outside its range.
    """
    if not kinds or len(set(kinds)) < len(kinds) or set(kinds) - set(_MAKERS):
        raise ConfigError(f"data.kinds={list(kinds)} must name at least one of {', '.join(_MAKERS)}, each once")
    for name, count in (("train_images", train_images), ("test_images", test_images)):
        if count < len(kinds):
            raise ConfigError(f"data.{name}={count} must be at least {len(kinds)}, one image for each of data.kinds")
    if image_size < 1 or channels not in {1, 3}:
        raise ConfigError(f"data.image_size={image_size} must be positive, data.channels={channels} must be 1 or 3")
    shape = (channels, image_size, image_size)
    parts = [_part(kinds, count, shape, seed, part) for part, count in (("train", train_images), ("test", test_images))]
    return Dataset("noise", *parts)


def _part(kinds: tuple[Kind, ...], count: int, shape: tuple[int, int, int], seed: int, part: str) -> ImageSet:
    labels = np.arange(count, dtype=np.int64) % len(kinds)
    images = np.empty((count, *shape), np.uint8)
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
