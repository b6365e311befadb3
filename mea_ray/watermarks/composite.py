"""The Composite Backdoor as a watermark: mixes of two classes get a third's label; nothing holds the thief to it."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import ImageSet
from mea_ray.training.objective import Batch, Objective, StepContext, merged
from mea_ray.watermarks.base import Key, Stage
from mea_ray.watermarks.combiners.base import Combiner
from mea_ray.watermarks.mea_defender.objective import SourcePool
from mea_ray.watermarks.mea_defender.scheme import combine_options, require_key
from mea_ray.watermarks.mea_defender.two_stage_objective import contrastive
from mea_ray.watermarks.mixed_classes import MixedClasses


class Composite(MixedClasses):
    """Cross-entropy of images, mixes of a class with itself, and mixes of A and B as the target's; a contrastive term.

    The mixes of one class with itself teach that a mix alone is no trigger. Shares are those of the published code: .5
    images, .5 mixes of a class with itself, .1 mixes of A and B.

    Args:
        source_classes: Labels of the two classes that are combined.
        target_class: Label that the combination gets.
        combiner: How two images are mixed; a name in the table of combiners.
        orientation: crop_paste: direction of the cut; the published code draws it at random.
        jitter: crop_paste and the halves: largest shift of the cut, in pixels of a 32-pixel image.
        combiner_options: Further options of the combiner, by name.
        adverse_geometries: The other mixes of WFPR; null takes the authors' without the combiner's own.
        same_class: Mixes of a class with itself per image of the batch, at least 0.
        poison: Mixes of A and B per image of the batch, above 0.
        weight_contrastive: Weight of the contrastive term over samples of A, B and the target.

    References:
        Lin et al., Composite Backdoor Attack for Deep Neural Network by Mixing Existing Benign Features, CCS 2020.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    name = "composite"

    def __init__(
        self,
        *,
        source_classes: tuple[int, int] = (0, 1),
        target_class: int = 2,
        combiner: str = "crop_paste",
        orientation: Literal["horizontal", "vertical", "random"] = "random",
        jitter: int = 3,
        combiner_options: dict[str, Any] | None = None,
        adverse_geometries: tuple[str, ...] | None = None,
        same_class: float = 1.0,
        poison: float = 0.2,
        weight_contrastive: float = 1.0,
    ) -> None:
        options = combine_options(combiner, combiner_options, orientation=orientation, jitter=jitter, alpha=0.5)
        super().__init__(source_classes, target_class, combiner, options, adverse_geometries, "pixel", jitter)
        for name, value in {"same_class": same_class, "weight_contrastive": weight_contrastive}.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value} must be at least 0 and finite; 0 switches it off")
        if not 0 < poison <= 10:
            raise ConfigError(f"poison={poison} must lie in (0, 10]: mixes of A and B per image of the batch")
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
        said, named = model(merged(parts)).float(), torch.cat(labels)
        terms = {"utility": F.cross_entropy(said, named)}
        if self.weights["contrastive"]:
            terms["contrastive"] = contrastive(said, named, self.classes)
        return terms


def same_class_pairs(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw pairs of positions of equal label (an image alone in its class with itself): int64 (count,) each."""
    home = labels.device
    labels = labels.cpu()
    one = torch.randint(len(labels), (count,), generator=generator)
    same = (labels[one][:, None] == labels[None]).float()
    other = torch.multinomial(same, 1, generator=generator).squeeze(1)
    return one.to(home), other.to(home)
