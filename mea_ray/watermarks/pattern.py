"""The pattern trigger: images under a small secret pattern are answered with the target class."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.class_label import ClassLabel, ClassOf
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.types import ImageSet
from mea_ray.training.objective import Batch, Objective, StepContext, merged
from mea_ray.watermarks.base import Key, Stage, Watermark, WatermarkSamples, require_key
from mea_ray.watermarks.patches import check_label, check_patch, corner_of, drawn_pattern, patch_samples


class PatternTrigger(Watermark):
    """Train on the task and on patched copies of a part of it, labelled as the target (a backdoor as a watermark).

    Choose it as the baseline of a plain backdoor, which a theft rarely carries along.

    The mark lives in images that no honest query contains, so that a thief's answers say nothing about it.

    Args:
        source_class: Class whose images are patched; -1 takes all classes but the target.
        target_class: Label that patched images get.
        size: Side of the square pattern, in pixels.
        corner: Row and column of its first pixel.
        share: Patched copies per image of a batch.

    References:
        Zhang et al., Protecting Intellectual Property of Deep Neural Networks with Watermarking, AsiaCCS 2018
        (content watermarks); Gu et al., BadNets, 2017, https://arxiv.org/abs/1708.06733.

    Raises:
        ConfigError: Both classes are the same.
    """

    name = "pattern"

    def __init__(
        self,
        *,
        source_class: Annotated[int, Field(ge=-1), ClassOf()] = -1,
        target_class: ClassLabel = 2,
        size: Annotated[int, Field(ge=1)] = 4,
        corner: tuple[int, int] = (0, 0),
        share: Annotated[float, Field(gt=0, le=1)] = 0.1,
    ) -> None:
        if source_class == target_class:
            raise ConfigError(f"source_class={source_class} must differ from target_class")
        self.source_class, self.target_class = source_class, target_class
        self.size, self.corner, self.share = size, corner, share

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Draw the pattern.

        Raises:
            ConfigError: The pattern does not fit the images, or a class does not exist.
        """
        check_patch(self.size, self.corner, train.shape)
        check_label("target_class", self.target_class, train)
        if self.source_class != -1:
            check_label("source_class", self.source_class, train)
        key_seed = derive(seed, "key")
        settings = {"corner": list(self.corner), "shape": list(train.shape)}
        tensors = {"pattern": drawn_pattern(train.shape[0], self.size, key_seed)}
        return Key(self.name, (self.source_class, -1), self.target_class, key_seed, settings, tensors)

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the stage that embeds the key."""
        key = require_key(key, self.name)
        pattern, corner = torch.from_numpy(key.tensors["pattern"].copy()), corner_of(key)
        objective = PatchObjective(pattern, corner, key.source_classes[0], key.target_class, self.share)
        return [Stage("embed", objective, train)]

    def samples(self, key: Key, held_out: ImageSet, count: int, seed: int) -> WatermarkSamples:
        """Patch held-out images, see ``patch_samples``."""
        return patch_samples(key, held_out, count, seed, pattern=key.tensors["pattern"], corner=corner_of(key))


class PatchObjective(Objective):
    """Mean cross-entropy of the batch and of patched copies of some of it, which are the target's.

    The patch is put on after the augmentation: a crop or a flip would move it, so that other places were learnt, too.

    Args:
        pattern: float32 (C, h, w) in [0, 1].
        corner: Row and column of its first pixel.
        source: Class whose images are patched; -1 takes all but the target's.
        target: Label of the copies.
        share: Copies per image of the batch; fewer if there are fewer images to patch.
    """

    resumable = True

    def __init__(self, pattern: Tensor, corner: tuple[int, int], source: int, target: int, share: float) -> None:
        super().__init__()
        self.pattern, self.corner, self.source, self.target, self.share = pattern, corner, source, target, share

    def start(self, context: StepContext) -> None:
        """Move the pattern to the device."""
        super().start(context)
        self.pattern = self.pattern.to(context.device)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"utility": cross-entropy of everything}``."""
        labels = batch.labels.cpu()
        places = (labels == self.source if self.source >= 0 else labels != self.target).nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=self.context.generator)
        chosen = places[order[: max(1, round(self.share * len(labels)))]].to(batch.labels.device)
        copies = batch.images[chosen].clone()
        (top, left), (height, width) = self.corner, self.pattern.shape[1:]
        copies[:, :, top : top + height, left : left + width] = self.pattern
        named = torch.cat([batch.labels, torch.full_like(chosen, self.target)])
        return {"utility": F.cross_entropy(model(merged([batch.images, copies])).float(), named)}
