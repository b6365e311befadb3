"""Transfer learning: the body of the model is tuned on another dataset."""

from __future__ import annotations

import copy
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import nn

from mea_ray.config.components import DataChoice
from mea_ray.core.class_label import ClassOf
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.drawn_figures import fitting
from mea_ray.data.resize import fit
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Epochs, LearningRate, Prospect, Removal, ThiefData, copied, last_layer, tune
from mea_ray.training.device import seeded

DRAWN = 5000
"""Number of figures that are drawn when ``images`` is null."""
OUT_OF_REACH = -1e4
"""Logit of a class that the model can never predict."""


class TransferLearning(Removal):
    """Tune the whole network on another dataset with a new last layer, then predict the old classes again.

    Choose it for a thief who uses the stolen model on another dataset.

    The paper transfers a CIFAR-10 model to STL-10 and does not say how WSR is measured. Here the result is a model of
    the *old* classes, so that WSR, WFPR and accuracy keep their meaning (accuracy is on the old task's test images). By
    default the old last layer is put back on the tuned body. A body that has changed much no longer fits it, which
    shows in the accuracy. With ``same_as`` the new last layer is used instead, for the old classes that the other
    dataset has as well.

    Args:
        dataset: The other dataset with its parameters, resized to the model's image shape; the paper uses ``stl10``.
            Null draws ``figures`` of that shape, which needs no download.
        images: Most of its training images that are used; null takes all.
        same_as: For each old class the same class in the other dataset, by label or by name, -1 where there is none
            (such a class is never predicted): from CIFAR-10 to STL-10 [0, 2, 1, 3, 4, 5, -1, 6, 8, 9]. Null puts the
            old last layer back.
        epochs: Passes over these images.
        learning_rate: Peak learning rate.

    References:
        Lv et al., MEA-Defender, 2024 (transfer learning to STL-10: accuracy 77.50, WSR 67.50).

    Raises:
        ConfigError: ``same_as`` names fewer than two classes.
    """

    name = "transfer_learning"
    needs_features = True

    def __init__(
        self,
        *,
        dataset: DataChoice | None = None,
        images: Annotated[int, Field(ge=2)] | None = 5000,
        same_as: tuple[Annotated[int, Field(ge=-1), ClassOf("dataset")], ...] | None = None,
        epochs: Epochs = 5,
        learning_rate: LearningRate = 5e-4,
    ) -> None:
        if same_as is not None and sum(label >= 0 for label in same_as) < 2:
            raise ConfigError(f"same_as={list(same_as)} must name two classes of the other dataset, or be null")
        self.dataset, self.images, self.same_as = dataset, images, same_as
        self.epochs, self.learning_rate = epochs, learning_rate

    @property
    def strength(self) -> float:
        """Epochs."""
        return float(self.epochs)

    def check(self, prospect: Prospect) -> None:
        """Load the other dataset, and refuse it if it does not fit the model."""
        last_layer(prospect.model)
        other = self.other(prospect.model.shape, seed=0)
        self._check(prospect.model, other)
        prospect.check_batches(len(other))

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the tuned copy as a model of the old classes.

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
        tune(adapted, other, thief, seed, epochs=self.epochs, learning_rate=self.learning_rate)
        adapted.head, adapted.classes = copy.deepcopy(old), model.classes
        if self.same_as is not None:
            adapted.head = _head_for_old_classes(fresh, self.same_as)
        return adapted.eval()

    def other(self, shape: tuple[int, int, int], seed: int) -> ImageSet:
        """Return the training images of the other dataset, resized to a shape."""
        count = self.images
        loaded: Dataset = (
            fitting(shape, train_images=count or DRAWN, test_images=1, seed=seed)
            if self.dataset is None
            else self.dataset.build()
        )
        if not loaded.train.labelled:
            raise DataError(loaded.pool_only or f"{loaded.name} has images without a label; take another dataset")
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


def _head_for_old_classes(layer: nn.Linear, same_as: tuple[int, ...]) -> nn.Linear:
    """Return a last layer for the old classes from rows of the new one; ``OUT_OF_REACH`` where there is none."""
    head = nn.Linear(layer.in_features, len(same_as))
    with torch.no_grad():
        for place, label in enumerate(same_as):
            head.weight[place] = layer.weight[label] if label >= 0 else 0.0
            head.bias[place] = layer.bias[label] if label >= 0 else OUT_OF_REACH
    return head
