"""Channel statistics of images, exact, without a copy of them as floats."""

from __future__ import annotations

import numpy as np

from mea_ray.core.errors import DataError
from mea_ray.core.types import Images

CHUNK = 4096
"""Images counted at once, which bounds the memory."""


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel, over all images and pixels.

    Computed from a histogram of the 256 values: exact, whatever the number of images.

    Args:
        images: uint8, (N, C, H, W), N >= 1.

    Returns:
        (means, deviations), one each per channel, in units of [0, 1]. A constant channel has the deviation 1, so that
        dividing by it changes nothing.

    Raises:
        DataError: There are no images, or they are not uint8 (N, C, H, W).
    """
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise DataError(f"statistics need uint8 (N, C, H, W) images, at least one; got {images.dtype} {images.shape}")
    values = np.arange(256) / 255.0
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(images), CHUNK):
            counts += np.bincount(images[start : start + CHUNK, channel].ravel(), minlength=256)
        mean = float(counts @ values / counts.sum())
        variance = float(counts @ (values - mean) ** 2 / counts.sum())
        means.append(mean)
        deviations.append(variance**0.5 if variance > 0 else 1.0)
    return tuple(means), tuple(deviations)
