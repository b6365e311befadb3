"""What every removal is: an attempt to get a watermark out of a model whose weights one holds."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mea_ray.core.errors import DataError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Answers, Images, ImageSet, Labels
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.training.engine import train
from mea_ray.training.objective import CrossEntropy, Objective


@dataclass(frozen=True)
class Holdings:
    """What whoever removes a watermark holds beside the model: no key, no null model, no test image.

    Attributes:
        images: uint8, (N, C, H, W), N >= 1: of a thief, those of his transfer set.
        answers: float32, (N, classes): what the victim's API said of them.
        make_model: Builds an untrained network of the thief's kind.
        training: Keyword arguments of the training engine, as the thief's substitute was trained.

    Raises:
        DataError: There are no images, or images and answers do not fit together.
    """

    images: Images
    answers: Answers
    make_model: Callable[[], nn.Module]
    training: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not len(self.images) or len(self.images) != len(self.answers):
            raise DataError(
                f"a removal needs images with one answer each, got {len(self.images)} images and "
                f"{len(self.answers)} answers"
            )

    @cached_property
    def labels(self) -> Labels:
        """The class that each answer names, int64 (N,)."""
        return self.answers.argmax(1).astype(np.int64)

    def take(self, count: int, seed: int) -> Holdings:
        """Return ``count`` of the images (all if there are fewer), drawn without replacement."""
        chosen = numpy_generator(seed, "holdings").permutation(len(self.images))[:count]
        return Holdings(self.images[chosen], self.answers[chosen], self.make_model, self.training)


class Removal(ABC):
    """An attempt to remove a watermark. Keyword-only constructor parameters, all with defaults, configure it."""

    name: str = ""

    @property
    @abstractmethod
    def strength(self) -> float:
        """How hard it tries, in the unit of its main parameter: what a line of the report runs over."""

    @abstractmethod
    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return a changed copy; ``model`` stays as it is.

        Args:
            model: The suspect, on the CPU; images in [0, 1] to logits.
            held: What the remover holds.
            seed: Seed of everything random.

        Returns:
            A network on the CPU, in eval mode, of the same inputs and outputs.
        """


class Filtered(ImageModel):
    """A network behind a filter of its inputs; what the filter draws is drawn anew, from one seed, in each pass."""

    def __init__(self, model: ImageModel, change: Callable[[Tensor, torch.Generator], Tensor], seed: int) -> None:
        super().__init__(model.shape, model.classes)
        self.inner, self.change, self.seed = model, change, seed
        self.feature_size, self.head = model.feature_size, model.head

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
        DataError: The network's head is none; all networks of the table have one.
    """
    if not isinstance(model.head, nn.Linear):
        raise DataError(f"the head of {type(model).__name__} is {type(model.head).__name__}, a linear layer is needed")
    return model.head


def tune(
    model: ImageModel,
    data: ImageSet,
    held: Holdings,
    seed: int,
    *,
    objective: Objective | None = None,
    **changes: Any,
) -> ImageModel:
    """Train a model further, in place, with the thief's own settings where nothing else is said.

    Args:
        model: The network; parameters that need no gradient stay.
        data: What it is trained on.
        held: Gives the thief's settings.
        seed: Seed of the training.
        objective: The losses; cross-entropy with the labels when None.
        changes: Keyword arguments of the engine that replace the thief's.
    """
    settings = {**held.training, "early_stop_patience": None, "schedule": "cosine", **changes}
    train(model, data.images, data.labels, objective or CrossEntropy(), seed=derive(seed, "tune"), **settings)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def labelled(held: Holdings, classes: int) -> ImageSet:
    """Return the holdings as a labelled set: the label is the class that the API named."""
    return ImageSet(held.images, held.labels, tuple(map(str, range(classes))))


def agreement(model: nn.Module, held: Holdings) -> float:
    """Part of the holdings on which the model names the class that the API named: what a thief knows of accuracy."""
    return metrics.accuracy(metrics.predictions(model, held.images), held.labels)
