"""Drawn figures and textures: a labelled dataset of another domain, in any image size, without a download."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Dataset, Images, ImageSet
from mea_ray.data.memory import allocate, check_memory
from mea_ray.data.options import Channels, Count, ImageSize

_CHUNK = 32
_BYTES = 40
"""Memory for each value while a chunk is drawn: five arrays of float64."""
Plane = npt.NDArray[np.float64]
"""float64, (N, H, W)."""


def _polygon(u: Plane, v: Plane, sides: int, size: float) -> Plane:
    angles = 2 * np.pi * np.arange(sides) / sides
    farthest: Plane = np.max([np.cos(a) * u + np.sin(a) * v for a in angles], axis=0)
    return size - farthest


def _bar(u: Plane, v: Plane) -> Plane:
    return np.minimum(0.18 - np.abs(u), 0.75 - np.abs(v))


_FIELDS: dict[str, Callable[[Plane, Plane], Plane]] = {
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
"""Each kind's function of the plane; ink is drawn where it is positive. Unshifted, coordinates go from -1 to 1."""
KINDS = len(_FIELDS)
OfEachKind = Annotated[Count, Field(ge=KINDS)]
"""At least one image of each kind."""


def load(
    *,
    train_images: OfEachKind = 6000,
    test_images: OfEachKind = 1200,
    image_size: Annotated[ImageSize, Field(ge=8)] = 32,
    channels: Channels = 3,
    seed: int = 0,
) -> Dataset:
    """Draw twelve kinds of figures and textures: labelled images of another domain.

    Choose it as a pool of images of another domain that needs no download.

    Each image has two random colours and a random rotation, shift and scale.

    Args:
        train_images: Training images, spread evenly over the kinds. A larger number adds images and changes none.
        test_images: Test images, spread evenly over the kinds; none is a training image.
        image_size: Height and width in pixels.
        channels: 1 (grey) or 3 (colour).
        seed: Seed of the images.

    Returns:
        Images of shape (channels, image_size, image_size), classes named after the kinds.

    Raises:
        DataError: The images do not fit into memory.
    """
    shape = (channels, image_size, image_size)
    train, test = _part(train_images, shape, seed, "train"), _part(test_images, shape, seed, "test")
    return Dataset("figures", train, test)


def fitting(shape: tuple[int, int, int], *, train_images: int, test_images: int, seed: int) -> Dataset:
    """Draw figures that ``resize.fit`` can bring to a shape: square, at least as large, grey unless it has 3 channels.

    Args:
        shape: (channels, height, width) wanted.
        train_images: See ``load``, at least one of each kind.
        test_images: See ``load``, at least one of each kind.
        seed: Seed of the images.
    """
    return load(
        train_images=max(KINDS, train_images),
        test_images=max(KINDS, test_images),
        image_size=max(8, *shape[1:]),
        channels=3 if shape[0] == 3 else 1,
        seed=seed,
    )


def _part(count: int, shape: tuple[int, int, int], seed: int, part: str) -> ImageSet:
    check_memory("figures of this size", _CHUNK * math.prod(shape) * _BYTES, "set a smaller data.image_size")
    images = allocate(count, shape)
    labels = np.arange(count, dtype=np.int64) % KINDS
    for label, (kind, field) in enumerate(_FIELDS.items()):
        generator = numpy_generator(seed, "figures", part, kind)
        # Whole chunks are drawn, so that the first images do not depend on how many follow.
        places = np.flatnonzero(labels == label)
        for start in range(0, len(places), _CHUNK):
            chosen = places[start : start + _CHUNK]
            images[chosen] = _drawn(field, generator, shape)[: len(chosen)]
    return ImageSet(images, labels, tuple(_FIELDS))


def _drawn(field: Callable[[Plane, Plane], Plane], generator: np.random.Generator, shape: tuple[int, ...]) -> Images:
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
