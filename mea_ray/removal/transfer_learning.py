"""Transfer learning: the body of the model is adapted to another dataset."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from mea_ray.config.components import DataChoice
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.figures import fitting
from mea_ray.data.resize import fit
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Holdings, Removal, copied, last_layer, tune
from mea_ray.removal.fine_tuning import check_tuning
from mea_ray.training.device import seeded

DRAWN = 5000
"""Figures that are drawn where all are wanted."""
OUT_OF_REACH = -1e4
"""Logit of a class that cannot be answered."""


class TransferLearning(Removal):
    """Tune the whole network on another dataset behind a new last layer, and read it through the old classes.

    The paper moves a CIFAR-10 model to STL-10 and does not say how WSR is read from it. Here the result is a model of
    the *old* classes, so that WSR, WFPR and accuracy mean what they mean elsewhere (accuracy is on the old task's test
    images). By default the last layer that was there before the transfer is put back on the adapted body, whatever the
    other dataset's classes are: a body that has moved far no longer fits it, and the price is seen in the accuracy.
    With ``same_as`` the new last layer is read instead, for old classes that the other dataset has, too.

    Args:
        dataset: The other dataset, any of the project's with its parameters, brought to the model's image shape; the
            paper has ``stl10``. Null draws ``figures`` of that shape, which needs no network.
        images: Its training images that are used, at most; null takes all.
        same_as: For each old class the label of the same class in the other dataset, -1 where there is none (it cannot
            be answered then): of CIFAR-10 in STL-10 [0, 2, 1, 3, 4, 5, -1, 6, 8, 9]. Null puts the old last layer back.
        epochs: Passes over these images.
        learning_rate: Its peak.

    References:
        Lv et al., MEA-Defender, 2024 (transfer learning to STL-10: accuracy 77.50, WSR 67.50).

    Raises:
        ConfigError: A value is out of its range.
    """

    name = "transfer_learning"

    def __init__(
        self,
        *,
        dataset: DataChoice | None = None,
        images: int | None = 5000,
        same_as: tuple[int, ...] | None = None,
        epochs: int = 5,
        learning_rate: float = 5e-4,
    ) -> None:
        check_tuning(epochs, learning_rate)
        if images is not None and images < 2:
            raise ConfigError(f"images={images} must be at least 2; null takes all of the other dataset")
        if same_as is not None and sum(label >= 0 for label in same_as) < 2:
            raise ConfigError(f"same_as={list(same_as)} must name two classes of the other dataset, or be null")
        self.dataset, self.images, self.same_as = dataset, images, same_as
        self.epochs, self.learning_rate = epochs, learning_rate

    @property
    def strength(self) -> float:
        """Epochs."""
        return float(self.epochs)

    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return the adapted copy, read as a model of the old classes.

        Raises:
            ConfigError: ``same_as`` does not fit the classes of the model or of the other dataset.
            DataError: The other dataset cannot be loaded or brought to the model's images.
        """
        other = self.other(model.shape, derive(seed, "other"))
        self._check(model, other)
        adapted, old = copied(model), last_layer(model)
        with seeded(derive(seed, "head")):
            fresh = nn.Linear(old.in_features, other.classes)
            nn.init.normal_(fresh.weight, std=0.01)
            nn.init.zeros_(fresh.bias)
        adapted.head, adapted.classes = fresh, other.classes
        tune(adapted, other, held, seed, epochs=self.epochs, learning_rate=self.learning_rate)
        adapted.head, adapted.classes = copy.deepcopy(old), model.classes
        if self.same_as is not None:
            adapted.head = _read_as(fresh, self.same_as)
        return adapted.eval()

    def other(self, shape: tuple[int, int, int], seed: int) -> ImageSet:
        """Return the training images of the other dataset in a shape."""
        count = self.images
        loaded: Dataset = (
            fitting(shape, train_images=count or DRAWN, test_images=1, seed=seed)
            if self.dataset is None
            else self.dataset.build()
        )
        order = numpy_generator(seed, "images").permutation(len(loaded.train))[:count]
        taken = loaded.train.take(np.sort(order))
        return ImageSet(fit(taken.images, shape), taken.labels, taken.class_names)

    def _check(self, model: ImageModel, other: ImageSet) -> None:
        if self.same_as is None:
            return
        if len(self.same_as) != model.classes or max(self.same_as) >= other.classes:
            raise ConfigError(
                f"same_as={list(self.same_as)} must hold a label below {other.classes} or -1 for each of the "
                f"{model.classes} old classes"
            )


def _read_as(layer: nn.Linear, same_as: tuple[int, ...]) -> nn.Linear:
    """Return a last layer of the old classes whose rows are the new one's, out of reach where there is none."""
    read = nn.Linear(layer.in_features, len(same_as))
    with torch.no_grad():
        for place, label in enumerate(same_as):
            read.weight[place] = layer.weight[label] if label >= 0 else 0.0
            read.bias[place] = layer.bias[label] if label >= 0 else OUT_OF_REACH
    return read
