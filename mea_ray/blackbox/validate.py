"""What a query API checks before it charges anything."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from mea_ray.core.errors import BadQuery


def check_images(images: Any, shape: tuple[int, int, int], max_images: int | None = None) -> None:
    """Refuse images that a query API cannot answer.

    Args:
        images: What was sent: must be a numpy array, uint8 or float32 in [0, 1], (N, *shape), N >= 1.
        shape: (channels, height, width) that the victim takes.
        max_images: Largest N; None for no limit.

    Raises:
        BadQuery: Anything is wrong with them; the message says what was got and what is accepted.
    """
    if not isinstance(images, np.ndarray):
        raise BadQuery(f"images must be a numpy array, got {type(images).__name__}; convert them with numpy.asarray")
    if images.dtype not in (np.uint8, np.float32):
        raise BadQuery(f"images must be uint8 in 0..255 or float32 in [0, 1], got {images.dtype}; convert them first")
    if images.ndim != 4 or images.shape[1:] != tuple(shape):
        expected = ", ".join(map(str, shape))
        raise BadQuery(f"images must have shape (N, {expected}), got {images.shape}; reshape or resize them")
    if len(images) == 0:
        raise BadQuery("a query must hold at least 1 image, got 0")
    if max_images is not None and len(images) > max_images:
        raise BadQuery(
            f"a request may hold {max_images} images, got {len(images)}; split it (`service.request_images`)"
        )
    if images.dtype == np.float32:
        low, high = float(images.min()), float(images.max())
        # NaN fails every comparison, so this one line refuses NaN, infinities and values out of range.
        if not (low >= 0.0 and high <= 1.0):
            raise BadQuery(f"float32 images must lie in [0, 1] without NaN, got {low} to {high}; scale them first")


def image_digest(images: np.ndarray) -> str:
    """Return a hash of type, shape and content: 32 hexadecimal digits."""
    state = hashlib.sha256(f"{images.dtype}{images.shape}".encode())
    state.update(np.ascontiguousarray(images).data)
    return state.hexdigest()[:32]
