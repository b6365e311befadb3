"""The paper's adaptive thief: knows how the mark is made, but not from which classes, and trains against it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet, Labels
from mea_ray.removal.mixed_tuning import MixedTuning

GEOMETRIES = ("top_bottom", "left_right", "diagonal", "blend")


class WrongMixes(MixedTuning):
    """Fine-tune on clean images, and on mixes of two random classes labelled as neither of the two.

    Choose it for a thief who knows that mixes carry the mark.

    Args:
        share: Mixes per clean image.
        epochs: Passes over clean images and mixes.
        learning_rate: Peak learning rate.

    References:
        Lv et al., MEA-Defender, 2024, section VI-C (the adaptive adversary: "labels different from both sources").
    """

    name = "wrong_mixes"
    what = "wrong mixes need 3 classes and 2 images"
    least_images = 2

    def mixes(self, clean: ImageSet, count: int, seed: int) -> tuple[Images, Labels]:
        """Return mixes in random geometries, labelled as neither of the two classes."""
        return wrong_mixes(clean, count, derive(seed, "mixes"))


def wrong_mixes(clean: ImageSet, count: int, seed: int) -> tuple[Images, Labels]:
    """Mix pairs of two classes in random geometries, labelled as neither of the two.

    Args:
        clean: Labelled images. Where a poor API named one class alone, that class is mixed with itself.
        count: Number of mixes.
        seed: Seed of pairs, geometries and labels.

    Returns:
        uint8 (count, C, H, W) and int64 (count,).

    Raises:
        ConfigError: There are fewer than three classes.
    """
    present = np.unique(clean.labels)
    if clean.classes < 3:
        raise ConfigError(f"wrong mixes need 3 classes, got {clean.classes}; take other data or another removal")
    rng = numpy_generator(seed, "wrong")
    order = {label: np.flatnonzero(clean.labels == label) for label in present}
    pairs = np.stack([rng.choice(present, size=2, replace=len(present) == 1) for _ in range(count)])
    first, second = (
        clean.images[[order[label][rng.integers(len(order[label]))] for label in side]] for side in pairs.T
    )
    labels = np.empty(count, np.int64)
    for place, pair in enumerate(pairs):
        labels[place] = rng.choice(np.setdiff1d(np.arange(clean.classes), pair))
    share = _shares(clean.shape[1:])[rng.integers(len(GEOMETRIES), size=count)][:, None]
    mixed = share * first.astype(np.float32) + (1 - share) * second.astype(np.float32)
    return mixed.round().astype(np.uint8), labels


def _shares(size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Share of the first image at each pixel, for each of ``GEOMETRIES``: float32 (4, H, W)."""
    down, across = np.meshgrid(*((np.arange(side) + 0.5) / side for side in size), indexing="ij")
    blend = np.full(size, 0.5)
    return np.stack([down < 0.5, across < 0.5, down + across < 1, blend]).astype(np.float32)
