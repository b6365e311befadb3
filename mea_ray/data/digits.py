"""Handwritten digits that come with scikit-learn: real images that need no download."""

from __future__ import annotations

import numpy as np

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.resize import fit
from mea_ray.data.splits import stratified

_SPLIT_SEED = 0


def load(*, image_size: int = 16, test_fraction: float = 0.4) -> Dataset:
    """Load 1797 grey images of the ten digits, 8 x 8 pixels, enlarged.

    The publisher gives no test split; a fixed, stratified one is cut off. At the default it holds 70 or more images of
    each digit, so that half of them make 1,000 distinct watermark samples for verification.

    Args:
        image_size: Height and width in pixels, at least 8.
        test_fraction: Part of the images that is test, between 0 and 1.

    Returns:
        Images of shape (1, image_size, image_size), classes ``"0"`` to ``"9"``.

    Raises:
        ConfigError: An option lies outside its range.
    """
    if image_size < 8:
        raise ConfigError(f"data.image_size={image_size} must be at least 8, the size of the originals")
    if not 0 < test_fraction < 1:
        raise ConfigError(f"data.test_fraction={test_fraction} must lie between 0 and 1, both excluded")
    from sklearn.datasets import load_digits  # imported late: it takes a second that nobody else should pay

    raw = load_digits()
    # Values are counts from 0 to 16 of inked pixels in a 4 x 4 block of the scan.
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    everything = ImageSet(
        fit(images, (1, image_size, image_size)), raw.target.astype(np.int64), tuple(map(str, range(10)))
    )
    train, test = stratified(everything, np.arange(len(everything)), test_fraction, _SPLIT_SEED, "test")
    return Dataset("digits", everything.take(train), everything.take(test))
