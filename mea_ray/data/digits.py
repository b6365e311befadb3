"""Handwritten digits that come with scikit-learn: real images that need no download."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.options import Fraction, ImageSize
from mea_ray.data.resize import fit
from mea_ray.data.splits import stratified

_SPLIT_SEED = 0


def load(*, image_size: Annotated[ImageSize, Field(ge=8)] = 16, test_fraction: Fraction = 0.4) -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits, grey, 8 x 8 pixels, enlarged: a first try without a download.

    Choose it first: it needs no download.

    There is no published test split; a fixed, stratified one is cut off. By default it has 70 or more images of each
    digit, and half of them make 1,000 distinct watermark samples for verification.

    Args:
        image_size: Height and width in pixels; the originals have 8.
        test_fraction: Fraction of the images that becomes test.

    Returns:
        Images of shape (1, image_size, image_size), classes ``"0"`` to ``"9"``.
    """
    from sklearn.datasets import load_digits  # imported here because it takes a second

    raw = load_digits()
    # Values are counts from 0 to 16 of inked pixels in a 4 x 4 block of the scan.
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    everything = ImageSet(
        fit(images, (1, image_size, image_size)), raw.target.astype(np.int64), tuple(map(str, range(10)))
    )
    train, test = stratified(everything, np.arange(len(everything)), test_fraction, _SPLIT_SEED, "test")
    return Dataset("digits", everything.take(train), everything.take(test))
