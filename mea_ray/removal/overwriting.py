"""Overwriting: the thief embeds a mark of its own, of the same kind, over the owner's."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Epochs, LearningRate, Prospect, Removal, ThiefData, copied, labelled, tune


class Overwriting(Removal):
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

    def __init__(
        self,
        *,
        share: Annotated[float, Field(gt=0, le=10)] = 0.2,
        epochs: Epochs = 5,
        learning_rate: LearningRate = 5e-4,
    ) -> None:
        self.share, self.epochs, self.learning_rate = share, epochs, learning_rate

    @property
    def strength(self) -> float:
        """Mixes per clean image."""
        return self.share

    def check(self, prospect: Prospect) -> None:
        """Refuse fewer than three classes, and images that can only be of two."""
        if prospect.model.classes < 3 or prospect.images < 3:
            raise ConfigError(
                f"a second mark needs images of 3 classes, got {prospect.model.classes} classes and "
                f"{prospect.images} images"
            )
        prospect.check_batches(prospect.images + max(1, round(self.share * prospect.images)))

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the tuned copy.

        Raises:
            ConfigError: The thief's images are of fewer than three classes.
        """
        tuned = copied(model)
        clean = labelled(thief, tuned.classes)
        key = second_key(clean, derive(seed, "key"))
        mixes = halves(clean, key, max(1, round(self.share * len(clean))), derive(seed, "mixes"))
        both = ImageSet(
            np.concatenate([clean.images, mixes]),
            np.concatenate([clean.labels, np.full(len(mixes), key[2], np.int64)]),
            clean.class_names,
        )
        return tune(tuned, both, thief, seed, epochs=self.epochs, learning_rate=self.learning_rate)


def second_key(clean: ImageSet, seed: int) -> tuple[int, int, int]:
    """Draw two source classes and a target from the classes that have images.

    Raises:
        ConfigError: There are fewer than three.
    """
    present = np.unique(clean.labels)
    if len(present) < 3:
        raise ConfigError(f"a second mark needs images of 3 classes, and the API named {len(present)}; ask for more")
    first, second, target = numpy_generator(seed, "second").choice(present, size=3, replace=False).tolist()
    return first, second, target


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
