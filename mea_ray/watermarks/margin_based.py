"""The margin-based watermark (MBW): wrongly labelled images, learnt with a margin around each."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet
from mea_ray.training.objective import Batch, Objective, StepContext, merged
from mea_ray.watermarks.base import Key, Stage, require_key
from mea_ray.watermarks.labelled_queries import LabelledQueries


class MarginBased(LabelledQueries):
    """Images with a wrong label, moved before each step by gradient ascent on its loss, to widen the margin.

    Choose it as the baseline of a memorised set with large margins.

    In each step ``per_batch`` images of the key take ``ascent_steps`` signed steps of 1/255 that make their label less
    likely, and the loss is one mean over the batch's cross-entropies and ``weight`` times those of the moved images.
    The key's images are removed from the training set, where they have their true labels. A few single images are
    learnt slowly, and hardly by a network with dropout: the published constants belong to 78,000 updates of a ResNet
    without it. On short schedules take a network without dropout, fewer images, or a larger ``weight``, and check the
    victim's WSR.

    Args:
        count: Images of the key, half of the training images at most; 100 in the official code.
        per_batch: Of them in each step, drawn with replacement.
        ascent_steps: Ascent steps before each update of the network; 0 is plain wrong labels.
        weight: Weight of a moved image relative to one of the batch.

    References:
        Kim et al., Margin-based Neural Network Watermarking, ICML 2023, https://github.com/matbambbang/margin-based-watermarking.
    """

    name = "mbw"
    version: ClassVar[int] = 2  # the key names the positions of its images otherwise

    def __init__(
        self,
        *,
        count: Annotated[int, Field(ge=1)] = 100,
        per_batch: Annotated[int, Field(ge=1)] = 25,
        ascent_steps: Annotated[int, Field(ge=0)] = 5,
        weight: Annotated[float, Field(gt=0)] = 0.1,
    ) -> None:
        self.count, self.per_batch, self.ascent_steps, self.weight = count, per_batch, ascent_steps, weight

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Draw the images and their wrong labels.

        Raises:
            ConfigError: There are fewer than two classes or two images.
        """
        if len(train) < 2 or train.classes < 2:
            raise ConfigError(
                f"a wrong label needs two classes and two images, got {train.classes} and {len(train)}; take other data"
            )
        key_seed = derive(seed, "key")
        rng = numpy_generator(key_seed, "queries")
        drawn = np.sort(rng.permutation(len(train))[: min(self.count, len(train) // 2)])
        shift = rng.integers(1, train.classes, size=len(drawn))
        settings = {"shape": list(train.shape), "classes": train.classes, "positions": drawn.tolist()}
        tensors = {"images": train.images[drawn], "labels": (train.labels[drawn] + shift) % train.classes}
        # No classes: -1 is no label, so that nothing is mistaken for one.
        return Key(self.name, (-1, -1), -1, key_seed, settings, tensors)

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the stage that embeds the key, on the images that are not the key's."""
        key = require_key(key, self.name)
        others = np.setdiff1d(np.arange(len(train)), np.asarray(key.settings["positions"], np.int64))
        images, labels = (torch.from_numpy(key.tensors[name].copy()) for name in ("images", "labels"))
        objective = MarginObjective(images, labels, self.per_batch, self.ascent_steps, self.weight)
        return [Stage("embed", objective, train.take(others))]

    def unseen(self, key: Key, held_out: ImageSet, count: int, seed: int) -> Images:
        """Draw held-out images."""
        return held_out.images[numpy_generator(seed, "unseen").permutation(len(held_out))[:count]]


class MarginObjective(Objective):
    """One mean over the batch's cross-entropies and ``weight`` times those of moved images of the key.

    Args:
        images: uint8 (n, C, H, W).
        labels: int64 (n,).
        count: Images of the key in a step.
        steps: Signed steps of 1/255 that make their label less likely.
        weight: Of a moved image.
    """

    resumable = True

    def __init__(self, images: Tensor, labels: Tensor, count: int, steps: int, weight: float) -> None:
        super().__init__()
        self.images, self.labels = images, labels
        self.count, self.steps, self.weight = count, steps, weight

    def start(self, context: StepContext) -> None:
        """Move the key to the device."""
        super().start(context)
        self.images, self.labels = self.images.to(context.device), self.labels.to(context.device)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"utility": the mean of everything}``."""
        chosen = torch.randint(len(self.images), (self.count,), generator=self.context.generator)
        chosen = chosen.to(self.images.device)
        labels = self.labels[chosen]
        moved = self.ascend(model, self.images[chosen].float() / 255, labels)
        logits = model(merged([batch.images, moved])).float()
        losses = F.cross_entropy(logits, torch.cat([batch.labels, labels]), reduction="none")
        weights = torch.ones_like(losses)
        weights[len(batch.images) :] = self.weight
        return {"utility": (weights * losses).mean()}

    def ascend(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        """Move pixels, float32 (N, C, H, W), by signed steps that raise the labels' cross-entropy, within [0, 1].

        In eval mode: BatchNorm must not learn the statistics of intermediate images.
        """
        mode = model.training
        model.eval()
        for _ in range(self.steps):
            pixels = pixels.detach().requires_grad_(True)
            loss = F.cross_entropy(model(pixels).float(), labels, reduction="sum")
            pixels = (pixels + torch.autograd.grad(loss, pixels)[0].sign() / 255).clamp(0, 1)
        model.train(mode)
        return pixels.detach()
