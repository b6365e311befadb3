"""Bring uint8 images to another size and channel count."""

from __future__ import annotations

import numpy as np
import torch

from mea_ray.core.errors import DataError
from mea_ray.core.types import Images
from mea_ray.data.memory import allocate, check_memory

_CHUNK_IMAGES = 4096
_CHUNK_BYTES = 2**28
_LUMA = (0.299, 0.587, 0.114)


def fit(images: Images, shape: tuple[int, int, int]) -> Images:
    """Bring images to ``shape``: resize (bilinear, antialiased) to cover it, crop the middle, convert colour.

    Args:
        images: uint8, shape (N, C, H, W).
        shape: (channels, height, width) wanted. Grey becomes colour by repetition, colour becomes grey by the luma
            weights of ITU-R BT.601.

    Returns:
        uint8, shape (N, *shape); ``images`` itself when nothing has to change.

    Raises:
        DataError: There is no conversion between the channel counts (only 1 to any, and 3 to 1), or the result does not
            fit into memory.
    """
    channels, height, width = shape
    if images.shape[2:] != (height, width):
        images = _resize(images, height, width)
    return _recolour(images, channels)


def _resize(images: Images, height: int, width: int) -> Images:
    from torchvision.transforms.v2 import functional as transforms  # it takes seconds, and most images fit as they are

    scale = max(height / images.shape[2], width / images.shape[3])
    size = [max(height, round(images.shape[2] * scale)), max(width, round(images.shape[3] * scale))]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    channels = images.shape[1]
    out = allocate(len(images), (channels, height, width))
    enlarged = channels * size[0] * size[1]
    check_memory(f"images of {size[1]} x {size[0]} pixels", enlarged, "set a smaller data.image_size")
    chunk = max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // enlarged))
    for start in range(0, len(images), chunk):
        part = torch.from_numpy(np.ascontiguousarray(images[start : start + chunk]))
        resized = transforms.resize(part, size, antialias=True)
        out[start : start + chunk] = resized[:, :, top : top + height, left : left + width].numpy()
    return out


def _recolour(images: Images, channels: int) -> Images:
    have = images.shape[1]
    if have == channels:
        return images
    if have == 1:
        coloured = allocate(len(images), (channels, *images.shape[2:]))
        coloured[:] = images
        return coloured
    if have == 3 and channels == 1:
        out = allocate(len(images), (1, *images.shape[2:]))
        luma = np.asarray(_LUMA, np.float32)
        for start in range(0, len(images), _CHUNK_IMAGES):
            grey = np.einsum("nchw,c->nhw", images[start : start + _CHUNK_IMAGES], luma)
            out[start : start + _CHUNK_IMAGES, 0] = np.round(grey).astype(np.uint8)
        return out
    raise DataError(
        f"cannot turn images of {have} channels into {channels}; only grey (1) to any count and colour (3) to grey are "
        "defined: use a dataset with the victim's channel count"
    )
