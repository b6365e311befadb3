"""WRK: perturb the decision boundaries, then retrain with a last layer that is pushed away from the old one."""

from __future__ import annotations

import copy
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet, Labels
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import (
    Epochs,
    LearningRate,
    Prospect,
    Removal,
    ThiefData,
    copied,
    labelled,
    last_layer,
    tune,
)
from mea_ray.removal.new_head import AwayFromOldHead, draw_head


class Wrk(Removal):
    """Watermark Removal attacK: perturbed images with random labels, then a fresh last layer.

    Choose it as the strongest published removal.

    Step 1: some of the thief's images take one signed gradient step that raises the logit of a random class, and get a
    random label that differs from the API's. Step 2: the last layer is initialised anew, and all layers are trained on
    the thief's images and the perturbed ones, with a penalty that pushes the new last layer away from the old one:
    CE + alpha * sum(W * W_old).

    The published code steps and clips to [0, 1] in *normalised* space, never draws class 0 (the watermark's label in
    its experiments), and normalises with other statistics than its victim. Here pixels are moved in [0, 1] and all
    classes are drawn.

    Args:
        moved: Number of images that are perturbed.
        step: Size of the step, for pixels in [0, 1]; 0.4 is about the published 2 standard deviations of CIFAR-10.
        alpha: Weight of the penalty; 0 switches it off.
        images: Number of the thief's images that are used; the published code has 5% of CIFAR-10. Null takes all.
        epochs: Passes over the images.
        learning_rate: Peak learning rate of SGD with momentum.
        batch_size: Images per step.

    References:
        Class-Feature Watermarks and WRK, 2025; https://github.com/ClassFeatureWatermark.
    """

    name = "wrk"
    needs_features = True

    def __init__(
        self,
        *,
        moved: Annotated[int, Field(ge=1)] = 128,
        step: Annotated[float, Field(gt=0, le=1)] = 0.4,
        alpha: Annotated[float, Field(ge=0)] = 0.01,
        images: Annotated[int, Field(ge=1)] | None = 2500,
        epochs: Epochs = 10,
        learning_rate: LearningRate = 1e-3,
        batch_size: Annotated[int, Field(ge=1)] = 32,
    ) -> None:
        self.moved, self.step, self.alpha, self.images = moved, step, alpha, images
        self.epochs, self.learning_rate, self.batch_size = epochs, learning_rate, batch_size

    @property
    def strength(self) -> float:
        """Size of the step."""
        return self.step

    def check(self, prospect: Prospect) -> None:
        """Refuse a single class, which leaves no wrong label, a head that is not linear, and batches of one image."""
        last_layer(prospect.model)
        if prospect.model.classes < 2:
            raise ConfigError("wrk gives images another class than the API's; the data have only one")
        images = min(prospect.images, self.images or prospect.images)
        prospect.check_batches(images + min(images, self.moved), self.batch_size)

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the retrained copy."""
        thief = thief if self.images is None else thief.take(self.images, seed)
        broken = copied(model)
        images, labels = self.move(broken, thief.take(self.moved, derive(seed, "moved")), derive(seed, "step"))
        clean = labelled(thief, broken.classes)
        both = ImageSet(
            np.concatenate([clean.images, images]), np.concatenate([clean.labels, labels]), clean.class_names
        )
        objective = AwayFromOldHead(draw_head(broken, seed), self.alpha)
        changes = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "learning_rate": self.learning_rate}
        return tune(
            broken,
            both,
            thief,
            seed,
            objective=objective,
            epochs=self.epochs,
            batch_size=self.batch_size,
            **changes,
        )

    def move(self, model: ImageModel, thief: ThiefData, seed: int) -> tuple[Images, Labels]:
        """Return perturbed images, uint8, and their random labels, all different from the API's: step 1."""
        rng = numpy_generator(seed, "classes")
        count, classes = len(thief.images), model.classes
        towards = torch.from_numpy(rng.integers(classes, size=count))
        pixels = (torch.from_numpy(thief.images).float() / 255).requires_grad_(True)
        frozen = copy.deepcopy(model).requires_grad_(False).eval()
        gradients = []
        for some, goal in zip(torch.split(pixels, 256), torch.split(towards, 256), strict=True):
            gradients.append(torch.autograd.grad(frozen(some).gather(1, goal[:, None]).sum(), some)[0])
        moved = (pixels.detach() + self.step * torch.cat(gradients).sign()).clamp(0, 1)
        others = (thief.labels + rng.integers(1, classes, size=count)) % classes
        return (moved * 255).round().to(torch.uint8).numpy(), others.astype(np.int64)
