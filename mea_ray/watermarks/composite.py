"""The Composite Backdoor as a watermark: mixes of two classes get a third's label; nothing makes a thief learn it."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.config.components import CombinerChoice
from mea_ray.core.class_label import ClassLabel
from mea_ray.core.types import ImageSet
from mea_ray.training.objective import Batch, Objective, StepContext, merged
from mea_ray.watermarks.base import Key, Stage, require_key
from mea_ray.watermarks.combiners.base import Combiner
from mea_ray.watermarks.key_draw import KeyDraw
from mea_ray.watermarks.mea_defender.losses import contrastive
from mea_ray.watermarks.mixed_classes import MixedClasses
from mea_ray.watermarks.mixing import Mixing, SourcePool


class Composite(MixedClasses):
    """Cross-entropy of images, mixes of a class with itself, and mixes of A and B as the target's; a contrastive term.

    Choose it as the baseline: the same mixes without the losses against theft.

    The mixes of one class with itself teach that a mix alone is no trigger. Shares are those of the published code: .5
    images, .5 mixes of a class with itself, .1 mixes of A and B.

    Args:
        source_classes: Labels of the two classes that are mixed.
        target_class: Label that a mix gets.
        mixing: How they are mixed; halves cut in a random direction, as in the published code.
        key: Whether the classes are those given, or drawn.
        same_class: Mixes of a class with itself per image of the batch.
        poison: Mixes of A and B per image of the batch.
        weight_contrastive: Weight of the contrastive term over samples of A, B and the target. 0 switches it off.

    References:
        Lin et al., Composite Backdoor Attack for Deep Neural Network by Mixing Existing Benign Features, CCS 2020.

    Raises:
        ConfigError: Classes coincide, or a geometry makes the combiner's own mixes.
    """

    name = "composite"

    def __init__(
        self,
        *,
        source_classes: tuple[ClassLabel, ClassLabel] = (0, 1),
        target_class: ClassLabel = 2,
        mixing: Mixing = Mixing(combiner=CombinerChoice(name="crop_paste", orientation="random")),
        key: KeyDraw = KeyDraw(),
        same_class: Annotated[float, Field(ge=0)] = 1.0,
        poison: Annotated[float, Field(gt=0, le=10)] = 0.2,
        weight_contrastive: Annotated[float, Field(ge=0)] = 1.0,
    ) -> None:
        super().__init__(source_classes, target_class, mixing, key)
        self.same_class, self.poison, self.weight_contrastive = same_class, poison, weight_contrastive

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the stage that embeds the key."""
        key = require_key(key, self.name)
        combiner, _ = self.combiners(key)
        first, second = (train.of_class(label) for label in key.source_classes)
        objective = CompositeObjective(
            SourcePool(first, second, augment=True),
            (*key.source_classes, key.target_class),
            combiner,
            (self.same_class, self.poison, self.weight_contrastive),
        )
        return [Stage("embed", objective, train)]


class CompositeObjective(Objective):
    """Mean cross-entropy of the whole pass [images; mixes of one class; mixes of A and B], and the contrastive term.

    Args:
        sources: Images of A and B.
        classes: A, B and the target.
        combiner: Mixes two images.
        shares: Mixes of one class and of A and B per image of the batch, and the contrastive term's weight.
    """

    resumable = True

    def __init__(
        self,
        sources: SourcePool,
        classes: tuple[int, int, int],
        combiner: Combiner,
        shares: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.sources, self.classes, self.combiner = sources, classes, combiner
        self.same_class, self.poison, weight = shares
        self.weights = {"contrastive": weight}

    def start(self, context: StepContext) -> None:
        """Move the sources to the device."""
        super().start(context)
        self.sources.start(context)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``utility`` (cross-entropy of everything) and, if it has a weight, ``contrastive``."""
        generator, count = self.context.generator, len(batch.images)
        parts, labels = [batch.images], [batch.labels]
        wanted = round(self.same_class * count)
        if wanted:
            one, other = same_class_pairs(batch.labels, wanted, generator)
            parts.append(self.combiner(batch.images[one].float(), batch.images[other].float(), generator))
            labels.append(batch.labels[one])
        first, second = self.sources.draw(max(1, round(self.poison * count)))
        parts.append(self.combiner(first, second, generator))
        labels.append(torch.full((len(first),), self.classes[2], device=batch.labels.device))
        logits, named = model(merged(parts)).float(), torch.cat(labels)
        terms = {"utility": F.cross_entropy(logits, named)}
        if self.weights["contrastive"]:
            terms["contrastive"] = contrastive(logits, named, self.classes)
        return terms


def same_class_pairs(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw pairs of positions of equal label (an image alone in its class with itself): int64 (count,) each."""
    home = labels.device
    labels = labels.cpu()
    one = torch.randint(len(labels), (count,), generator=generator)
    same = (labels[one][:, None] == labels[None]).float()
    other = torch.multinomial(same, 1, generator=generator).squeeze(1)
    return one.to(home), other.to(home)
