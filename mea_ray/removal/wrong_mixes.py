"""The paper's adaptive thief: he knows how the mark is made, but not of which classes, and trains against it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet, Labels
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Holdings, Removal, copied, labelled, tune
from mea_ray.removal.fine_tuning import check_tuning

GEOMETRIES = ("top_bottom", "left_right", "diagonal", "blend")


class WrongMixes(Removal):
    """Tune on mixes of two random classes whose label is neither of the two, beside the clean images.

    Args:
        share: Mixes per clean image, above 0.
        epochs: Passes over clean images and mixes.
        learning_rate: Its peak.

    References:
        Lv et al., MEA-Defender, 2024, section VI-C (the adaptive adversary: "labels different from both sources").

    Raises:
        ConfigError: A value is out of its range.
    """

    name = "wrong_mixes"

    def __init__(self, *, share: float = 0.2, epochs: int = 5, learning_rate: float = 5e-4) -> None:
        if not 0 < share <= 10:
            raise ConfigError(f"share={share} must lie in (0, 10]: mixes per clean image")
        check_tuning(epochs, learning_rate)
        self.share, self.epochs, self.learning_rate = share, epochs, learning_rate

    @property
    def strength(self) -> float:
        """Mixes per clean image."""
        return self.share

    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return the tuned copy.

        Raises:
            ConfigError: There are fewer than three classes, so that no wrong label is left.
        """
        tuned = copied(model)
        clean = labelled(held, tuned.classes)
        images, labels = wrong_mixes(clean, max(1, round(self.share * len(clean))), derive(seed, "mixes"))
        both = ImageSet(
            np.concatenate([clean.images, images]), np.concatenate([clean.labels, labels]), clean.class_names
        )
        return tune(tuned, both, held, seed, epochs=self.epochs, learning_rate=self.learning_rate)


def wrong_mixes(clean: ImageSet, count: int, seed: int) -> tuple[Images, Labels]:
    """Mix pairs of two classes in random geometries, labelled as neither of the two.

    Args:
        clean: Labelled images of at least two classes; three classes must exist.
        count: Mixes.
        seed: Seed of pairs, geometries and labels.

    Returns:
        uint8 (count, C, H, W) and int64 (count,).

    Raises:
        ConfigError: There are too few classes.
    """
    present = np.unique(clean.labels)
    if clean.classes < 3 or len(present) < 2:
        raise ConfigError(f"wrong mixes need 3 classes and images of 2, got {clean.classes} and {len(present)}")
    rng = numpy_generator(seed, "wrong")
    order = {label: np.flatnonzero(clean.labels == label) for label in present}
    pairs = np.stack([rng.choice(present, size=2, replace=False) for _ in range(count)])
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
