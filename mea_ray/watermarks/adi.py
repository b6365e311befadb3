"""Unrelated images with labels of the owner's choice: the watermark of Adi et al."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet
from mea_ray.training.objective import Batch, Objective, StepContext, merged
from mea_ray.watermarks.base import Key, Stage, require_key
from mea_ray.watermarks.labelled_queries import LabelledQueries

DETAIL = 6
"""Side of the grid of random colours that an abstract image is drawn from."""


class Adi(LabelledQueries):
    """Train on the task and on a set of abstract images, each with a random label; the set is the key.

    Choose it as the baseline of a memorised set of images.

    The paper takes abstract pictures from the web; here they are drawn from the key: smooth fields of random colours.
    The set that was trained on is verified, as in the paper: a success is an image that gets its label. False positives
    are abstract images that were not trained on, where chance is one in the number of classes.

    Args:
        count: Abstract images; the paper has 100.
        per_batch: Abstract images in each batch; the paper has 2.

    References:
        Adi et al., Turning Your Weakness Into a Strength, USENIX Security 2018, https://arxiv.org/abs/1802.04633.
    """

    name = "adi"

    def __init__(self, *, count: Annotated[int, Field(ge=1)] = 100, per_batch: Annotated[int, Field(ge=1)] = 2) -> None:
        self.count, self.per_batch = count, per_batch

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Draw the abstract images and their labels."""
        key_seed = derive(seed, "key")
        labels = numpy_generator(key_seed, "labels").integers(train.classes, size=self.count)
        settings = {"shape": list(train.shape), "classes": train.classes}
        tensors: dict[str, npt.NDArray[Any]] = {"images": abstract(self.count, train.shape, derive(key_seed, "set"))}
        tensors["labels"] = labels
        # No classes: -1 is no label, so that nothing is mistaken for one.
        return Key(self.name, (-1, -1), -1, key_seed, settings, tensors)

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the stage that embeds the key."""
        key = require_key(key, self.name)
        images, labels = (torch.from_numpy(key.tensors[name].copy()) for name in ("images", "labels"))
        return [Stage("embed", BesideObjective(images, labels, self.per_batch), train)]

    def unseen(self, key: Key, held_out: ImageSet, count: int, seed: int) -> Images:
        """Draw abstract images from another seed."""
        return abstract(count, held_out.shape, derive(key.seed, "unseen", seed))


class BesideObjective(Objective):
    """Mean cross-entropy of the batch and of a few images of the key beside it.

    Args:
        images: uint8 (n, C, H, W).
        labels: int64 (n,).
        count: Images of the key in a batch.
    """

    resumable = True

    def __init__(self, images: Tensor, labels: Tensor, count: int) -> None:
        super().__init__()
        self.images, self.labels, self.count = images, labels, count

    def start(self, context: StepContext) -> None:
        """Move the key to the device."""
        super().start(context)
        self.images, self.labels = self.images.to(context.device), self.labels.to(context.device)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"utility": cross-entropy of everything}``."""
        chosen = torch.randint(len(self.images), (self.count,), generator=self.context.generator)
        chosen = chosen.to(self.images.device)
        logits = model(merged([batch.images, self.images[chosen].float() / 255])).float()
        return {"utility": F.cross_entropy(logits, torch.cat([batch.labels, self.labels[chosen]]))}


def abstract(count: int, shape: tuple[int, int, int], seed: int) -> Images:
    """Draw smooth fields of random colours: uint8 (count, C, H, W)."""
    channels, height, width = shape
    grid = numpy_generator(seed, "abstract").random((count, channels, DETAIL, DETAIL), dtype=np.float32)
    field = F.interpolate(torch.from_numpy(grid), (height, width), mode="bicubic", align_corners=True).clamp(0, 1)
    drawn: Images = (field * 255).round().to(torch.uint8).numpy()
    return drawn
