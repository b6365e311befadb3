"""Drawn figures and textures: a labelled dataset of another domain that costs no download and fits any image size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Dataset, Images, ImageSet

_CHUNK = 32
Field = npt.NDArray[np.floating[Any]]
"""float (N, H, W)."""


def load(
    *, train_images: int = 6000, test_images: int = 1200, image_size: int = 32, channels: int = 3, seed: int = 0
) -> Dataset:
    """Draw twelve kinds of figures and textures in two random colours, each turned, moved and scaled at random.

    Args:
        train_images: Training images of all kinds together, in turn of the kinds. More images begin with the same ones.
        test_images: Test images of all kinds together, other ones.
        image_size: Height and width in pixels, at least 8.
        channels: 1 or 3.
        seed: Seed of the images.

    Returns:
        Images of shape (channels, image_size, image_size), classes named after the kinds.

    Raises:
        ConfigError: An option lies outside its range.
    """
    for name, count in (("train_images", train_images), ("test_images", test_images)):
        if count < len(_FIELDS):
            raise ConfigError(f"data.{name}={count} must be at least {len(_FIELDS)}, one image for each kind of figure")
    if image_size < 8 or channels not in {1, 3}:
        raise ConfigError(f"data.image_size={image_size} must be at least 8, data.channels={channels} must be 1 or 3")
    shape = (channels, image_size, image_size)
    parts = [_part(count, shape, seed, part) for part, count in (("train", train_images), ("test", test_images))]
    return Dataset("figures", *parts)


def fitting(shape: tuple[int, int, int], *, train_images: int, test_images: int, seed: int) -> Dataset:
    """Draw figures for images of a shape: square, at least as large, grey unless it has three channels.

    ``resize.fit`` brings them to the shape; the other arguments, the result and the errors are those of ``load``.
    """
    count = len(_FIELDS)
    return load(
        train_images=max(count, train_images),
        test_images=max(count, test_images),
        image_size=max(8, *shape[1:]),
        channels=3 if shape[0] == 3 else 1,
        seed=seed,
    )


def _part(count: int, shape: tuple[int, int, int], seed: int, part: str) -> ImageSet:
    labels = np.arange(count, dtype=np.int64) % len(_FIELDS)
    images = np.empty((count, *shape), np.uint8)
    for label, (kind, field) in enumerate(_FIELDS.items()):
        generator = numpy_generator(seed, "figures", part, kind)
        # Whole chunks are drawn, so that the first images do not depend on how many follow.
        places = np.flatnonzero(labels == label)
        for start in range(0, len(places), _CHUNK):
            chosen = places[start : start + _CHUNK]
            images[chosen] = _drawn(field, generator, shape)[: len(chosen)]
    return ImageSet(images, labels, tuple(_FIELDS))


def _drawn(field: Callable[[Field, Field], Field], generator: np.random.Generator, shape: tuple[int, ...]) -> Images:
    """Draw a chunk of one kind: uint8 (_CHUNK, C, H, W)."""
    channels, height, width = shape
    turn = generator.uniform(0, 2 * np.pi, (_CHUNK, 1, 1))
    scale = generator.uniform(0.7, 1.3, (_CHUNK, 1, 1))
    down, across = generator.uniform(-0.3, 0.3, (2, _CHUNK, 1, 1))
    dark, bright = generator.uniform(0, 0.4, (_CHUNK, channels)), generator.uniform(0.6, 1, (_CHUNK, channels))
    swapped = generator.random((_CHUNK, 1)) < 0.5
    paper, ink = (np.where(swapped, one, other)[..., None, None] for one, other in ((bright, dark), (dark, bright)))
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    y, x = (y - down) / scale, (x - across) / scale
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    # Ink where the field is positive, with an edge of about a pixel.
    share = (1 / (1 + np.exp(-np.clip(field(u, v) * height, -30, 30))))[:, None]
    pixels = paper + (ink - paper) * share
    noise = generator.normal(0, 0.02, pixels.shape)
    return np.round(np.clip(pixels + noise, 0, 1) * 255).astype(np.uint8)


def _polygon(u: Field, v: Field, sides: int, size: float) -> Field:
    angles = 2 * np.pi * np.arange(sides) / sides
    return size - np.max([np.cos(a) * u + np.sin(a) * v for a in angles], axis=0)


def _bar(u: Field, v: Field) -> Field:
    return np.minimum(0.18 - np.abs(u), 0.75 - np.abs(v))


_FIELDS: dict[str, Callable[[Field, Field], Field]] = {
    "stripes": lambda u, v: 0.2 * np.sin(9 * u),
    "checks": lambda u, v: 0.3 * np.sin(7 * u) * np.sin(7 * v),
    "dots": lambda u, v: 0.2 * (np.cos(8 * u) + np.cos(8 * v) - 0.8),
    "rings": lambda u, v: 0.2 * np.sin(11 * np.hypot(u, v)),
    "spiral": lambda u, v: 0.2 * np.sin(9 * np.hypot(u, v) + 2 * np.arctan2(v, u)),
    "spokes": lambda u, v: np.hypot(u, v) * 0.3 * np.sin(6 * np.arctan2(v, u)),
    "disc": lambda u, v: 0.55 - np.hypot(u, v),
    "square": lambda u, v: _polygon(u, v, 4, 0.5),
    "triangle": lambda u, v: _polygon(u, v, 3, 0.35),
    "cross": lambda u, v: np.maximum(_bar(u, v), _bar(v, u)),
    "frame": lambda u, v: 0.12 - np.abs(_polygon(u, v, 4, 0.55)),
    "ramp": lambda u, v: 0.08 * u,
}
"""Kind to its field over the plane: ink where it is above 0. The image reaches from -1 to 1 before it is moved."""
