"""Overwriting: the thief embeds a mark of its own, of the same kind, over the owner's."""

from __future__ import annotations

import numpy as np

from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet, Labels
from mea_ray.removal.mixed_tuning import MixedTuning


class Overwriting(MixedTuning):
    """Fine-tune on clean images, and on mixes of two classes that the thief's own key names, with its target.

    Choose it for a thief who knows the scheme and puts a second mark over the first.

    The thief draws two source classes and a target from the classes that its images have. A mix is the top half of an
    image of the first class above the bottom half of one of the second.

    Args:
        share: Mixes per clean image.
        epochs: Passes over clean images and mixes.
        learning_rate: Peak learning rate.

    References:
        Lukas et al., SoK: How Robust is Image Classification Deep Neural Network Watermarking?, S&P 2022, table I
        (overwriting: a mark of the same scheme is embedded with another key).
    """

    name = "overwriting"
    what = "a second mark needs images of 3 classes"
    least_images = 3

    def mixes(self, clean: ImageSet, count: int, seed: int) -> tuple[Images, Labels]:
        """Return mixes of the thief's own key, with its target."""
        key = second_key(clean, derive(seed, "key"))
        return halves(clean, key, count, derive(seed, "mixes")), np.full(count, key[2], np.int64)


def second_key(clean: ImageSet, seed: int) -> tuple[int, int, int]:
    """Draw two source classes and a target from the classes that have images.

    If the API named two classes only, they are the sources, and the target is a class without images. If it named one,
    both sources are that class.
    """
    present, rng = np.unique(clean.labels), numpy_generator(seed, "second")
    if len(present) >= 3:
        first, second, target = rng.choice(present, size=3, replace=False).tolist()
        return first, second, target
    absent = np.setdiff1d(np.arange(clean.classes), present)
    return int(present[0]), int(present[-1]), int(rng.choice(absent))


def halves(clean: ImageSet, key: tuple[int, int, int], count: int, seed: int) -> Images:
    """Put top halves of the first source class above bottom halves of the second: uint8 (count, C, H, W)."""
    rng = numpy_generator(seed, "halves")
    top, bottom = (
        images[rng.integers(len(images), size=count)] for images in (clean.of_class(label) for label in key[:2])
    )
    mixes = bottom.copy()
    cut = mixes.shape[2] // 2
    mixes[:, :, :cut] = top[:, :, :cut]
    return mixes
