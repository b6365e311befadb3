"""WRK: break what the network says near decision borders, then train the last layer anew, away from what it was."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet, Labels
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Holdings, Removal, copied, labelled, last_layer, tune
from mea_ray.removal.fine_tuning import check_tuning
from mea_ray.training.device import seeded
from mea_ray.training.objective import Batch, CrossEntropy, StepContext


class Wrk(Removal):
    """Watermark Removal attacK: samples pushed towards random classes under random labels, then a fresh last layer.

    Step 1: images of the thief are moved by one signed gradient step that raises the logit of a random class, and get
    a random label other than what the API had named. Step 2: the last layer starts anew, and all layers are trained on
    the thief's images and these, with a penalty that keeps the new last layer from the old one:
    CE + alpha * sum(W * W_old).

    The published code takes its step and clips to [0, 1] in *normalised* space, never draws class 0, which is the
    watermark's label in its experiments, and normalises with other statistics than its victim. Here pixels are moved
    in [0, 1] and all classes are drawn.

    Args:
        moved: Images that are moved.
        step: Size of the step in units of [0, 1], above 0; 0.4 is about the published 2 deviations of CIFAR-10.
        alpha: Weight of the penalty, at least 0.
        images: Images of the thief that are used; the published code has 5% of CIFAR-10. Null takes all.
        epochs: Passes.
        learning_rate: Its peak, of plain SGD with momentum.
        batch_size: Images per step.

    References:
        Class-Feature Watermarks and WRK, 2025; https://github.com/ClassFeatureWatermark.

    Raises:
        ConfigError: A value is out of its range.
    """

    name = "wrk"

    def __init__(
        self,
        *,
        moved: int = 128,
        step: float = 0.4,
        alpha: float = 0.01,
        images: int | None = 2500,
        epochs: int = 10,
        learning_rate: float = 1e-3,
        batch_size: int = 32,
    ) -> None:
        check_tuning(epochs, learning_rate)
        if moved < 1 or batch_size < 1 or (images is not None and images < 1):
            raise ConfigError(f"moved={moved}, batch_size={batch_size} and images={images} must be at least 1")
        if not 0 < step <= 1:
            raise ConfigError(f"step={step} must lie in (0, 1]: images are in [0, 1]")
        if not 0 <= alpha < float("inf"):
            raise ConfigError(f"alpha={alpha} must be at least 0 and finite; 0 switches the penalty off")
        self.moved, self.step, self.alpha, self.images = moved, step, alpha, images
        self.epochs, self.learning_rate, self.batch_size = epochs, learning_rate, batch_size

    @property
    def strength(self) -> float:
        """Size of the step."""
        return self.step

    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return the broken and retrained copy."""
        held = held if self.images is None else held.take(self.images, seed)
        broken = copied(model)
        images, labels = self.move(broken, held.take(self.moved, derive(seed, "moved")), derive(seed, "step"))
        clean = labelled(held, broken.classes)
        both = ImageSet(
            np.concatenate([clean.images, images]), np.concatenate([clean.labels, labels]), clean.class_names
        )
        head = last_layer(broken)
        objective = _Away(head.weight.detach().clone(), self.alpha)
        with seeded(derive(seed, "head")):
            head.reset_parameters()  # uniform within 1 / sqrt(inputs), as the published code draws it
        changes = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "learning_rate": self.learning_rate}
        return tune(
            broken,
            both,
            held,
            seed,
            objective=objective,
            epochs=self.epochs,
            batch_size=self.batch_size,
            **changes,
        )

    def move(self, model: ImageModel, held: Holdings, seed: int) -> tuple[Images, Labels]:
        """Return moved images, uint8, and their random labels, none of them the API's: step 1."""
        rng = numpy_generator(seed, "classes")
        count, classes = len(held.images), model.classes
        towards = torch.from_numpy(rng.integers(classes, size=count))
        pixels = (torch.from_numpy(held.images).float() / 255).requires_grad_(True)
        frozen = copy.deepcopy(model).requires_grad_(False).eval()
        gradients = []
        for some, goal in zip(pixels.split(256), towards.split(256), strict=True):
            gradients.append(torch.autograd.grad(frozen(some).gather(1, goal[:, None]).sum(), some)[0])
        moved = (pixels.detach() + self.step * torch.cat(gradients).sign()).clamp(0, 1)
        others = (held.labels + rng.integers(1, classes, size=count)) % classes
        return (moved * 255).round().to(torch.uint8).numpy(), others.astype(np.int64)


class _Away(CrossEntropy):
    """Cross-entropy, and alpha times the inner product of the last layer's weights with what they were."""

    def __init__(self, old: Tensor, alpha: float) -> None:
        super().__init__()
        self.old, self.alpha = old, alpha

    def start(self, context: StepContext) -> None:
        """Move the old weights to the device."""
        super().start(context)
        self.old = self.old.to(context.device)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"utility": cross-entropy, "away": alpha * sum(W * W_old)}``."""
        terms = super().terms(model, batch)
        if self.alpha:
            head = model.head
            assert isinstance(head, nn.Linear)
            terms["away"] = self.alpha * (head.weight.float() * self.old).sum()
        return terms
