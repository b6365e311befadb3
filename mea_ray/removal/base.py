"""What every removal is: an attempt to remove a watermark from a model whose weights the thief has."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mea_ray.config import TrainingConfig
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Answers, Images, ImageSet, Labels
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.training.engine import train
from mea_ray.training.loader import normalises_batches
from mea_ray.training.objective import CrossEntropy, Objective
from mea_ray.training.snapshot import Snapshots

Epochs = Annotated[int, Field(ge=1)]
LearningRate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
"""A fraction strictly between 0 and 1."""


@dataclass(frozen=True)
class ThiefData:
    """What a removal may use beside the model: no key, no null model, no test image.

    Attributes:
        images: The images of the thief's transfer set, uint8, (N, C, H, W), N >= 1.
        answers: The API's answers to them, float32, (N, classes).
        make_model: Builds an untrained network of the thief's architecture.
        training: How the thief's substitute was trained.
        snapshots: Where the removal's trainings are stored from epoch to epoch, in the order of its calls of
            ``tune``; None keeps none.

    Raises:
        DataError: There are no images, or images and answers do not fit together.
    """

    images: Images
    answers: Answers
    make_model: Callable[[], nn.Module]
    training: TrainingConfig
    snapshots: Snapshots | None = None

    def __post_init__(self) -> None:
        if not len(self.images) or len(self.images) != len(self.answers):
            raise DataError(
                f"a removal needs images with one answer each, got {len(self.images)} images and "
                f"{len(self.answers)} answers"
            )

    @cached_property
    def labels(self) -> Labels:
        """The most probable class of each answer, int64 (N,)."""
        classes: Labels = self.answers.argmax(1)
        return classes.astype(np.int64)

    def take(self, count: int, seed: int) -> ThiefData:
        """Return ``count`` of the images (all if there are fewer), drawn without replacement."""
        chosen = numpy_generator(seed, "holdings").permutation(len(self.images))[:count]
        return replace(self, images=self.images[chosen], answers=self.answers[chosen])


def part_of(images: int, share: float | None) -> int:
    """Return the number of images in a share, at least one; all if there is no share."""
    return images if share is None else max(1, round(share * images))


@dataclass(frozen=True)
class Prospect:
    """What a removal can check before anything is trained.

    Attributes:
        images: Answered images that the thief will hold.
        model: A network of the suspect's kind, without memory or weights (on torch's ``meta`` device).
        fresh: One of the thief's own architecture, likewise.
        training: How the thief's substitute is trained.
    """

    images: int
    model: ImageModel
    fresh: ImageModel
    training: TrainingConfig

    def check_batches(self, images: int, batch_size: int | None = None, model: ImageModel | None = None) -> None:
        """Refuse a training that would normalise batches of a single image.

        Args:
            images: Images that are trained on.
            batch_size: Images in a batch; the thief's when None.
            model: The network; the suspect's when None.

        Raises:
            ConfigError: The network has batch normalisation, and every batch would be one image.
        """
        size = self.training.batch_size if batch_size is None else batch_size
        if min(images, size) < 2 and normalises_batches(self.model if model is None else model):
            raise ConfigError(
                f"a network with batch normalisation cannot be trained on {images} image{'s' * (images != 1)} in "
                f"batches of {size}; raise thief.budgets, the removal's images or the batch size, or leave it out"
            )


class Removal(ABC):
    """An attempt to remove a watermark. Keyword-only constructor parameters, all with defaults, configure it."""

    name: str = ""
    needs_features: bool = False
    """Whether it reads or replaces the last layer, which a network without features does not have."""

    @property
    @abstractmethod
    def strength(self) -> float:
        """Value of the main parameter, in its unit: the position along a line of the report's figure."""

    def check(self, prospect: Prospect) -> None:
        """Refuse what ``remove`` could not finish, before anything is trained. By default nothing is refused.

        Args:
            prospect: What there will be.

        Raises:
            ConfigError: There are too few images or classes, or an option does not fit them.
            DataError: Images that the removal needs cannot be loaded or brought to the model's images.
        """
        return

    @abstractmethod
    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return a changed copy. ``model`` is not modified.

        Args:
            model: The suspect, on the CPU; images in [0, 1] to logits.
            thief: The thief's images and answers.
            seed: Seed of all randomness.

        Returns:
            A network on the CPU, in eval mode, with the same inputs and outputs.
        """


class Filtered(ImageModel):
    """A network behind a filter of its inputs. Every forward pass draws the filter's randomness from the same seed."""

    def __init__(self, model: ImageModel, change: Callable[[Tensor, torch.Generator], Tensor], seed: int) -> None:
        super().__init__(model.shape, model.classes)
        self.inner, self.change, self.seed = model, change, seed
        self.feature_size, self.channels_last, self.has_features = (
            model.feature_size,
            model.channels_last,
            model.has_features,
        )
        if model.has_features:
            self.head = model.head

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of filtered images, see the base class."""
        if self.has_features:
            return super().forward(x)
        logits: Tensor = self.inner(self.change(x, torch.Generator().manual_seed(self.seed)))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Return the network's features of filtered images."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.inner.features(self.change(x, generator))


def copied(model: ImageModel) -> ImageModel:
    """Return a copy that shares nothing with the model, in eval mode."""
    return copy.deepcopy(model).eval()


def last_layer(model: ImageModel) -> nn.Linear:
    """Return the layer that gives the logits.

    Raises:
        DataError: The network's head is not a linear layer.
    """
    if not isinstance(model.head, nn.Linear):
        raise DataError(
            f"the head of {type(model).__name__} is {type(model.head).__name__}, but a linear layer is needed"
        )
    return model.head


def tune(
    model: ImageModel,
    data: ImageSet,
    thief: ThiefData,
    seed: int,
    *,
    objective: Objective | None = None,
    **changes: Any,
) -> ImageModel:
    """Train a model further, in place, with the thief's training settings.

    Args:
        model: The network. Parameters that need no gradient are not changed.
        data: The training set.
        thief: Provides the training settings.
        seed: Seed of the training.
        objective: The losses; cross-entropy with the labels when None.
        changes: Training settings that replace the thief's.
    """
    training = thief.training.changed(**{"early_stop_patience": None, "schedule": "cosine", **changes})
    train(
        model,
        data.images,
        data.labels,
        objective or CrossEntropy(),
        training,
        seed=derive(seed, "tune"),
        snapshots=None if thief.snapshots is None else thief.snapshots.next(),
    )
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def labelled(thief: ThiefData, classes: int) -> ImageSet:
    """Return the thief's images with the API's most probable classes as labels."""
    return ImageSet(thief.images, thief.labels, tuple(map(str, range(classes))))


def agreement(model: nn.Module, thief: ThiefData) -> float:
    """Return the fraction of the thief's images on which model and API agree: a thief's estimate of the accuracy."""
    return metrics.accuracy(metrics.predictions(model, thief.images), thief.labels)
