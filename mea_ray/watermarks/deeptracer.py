"""DeepTracer: mixes of two classes are coupled with the target class in the output; the key's samples are chosen."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.class_label import ClassLabel
from mea_ray.core.types import ImageSet
from mea_ray.training.objective import Batch, Objective, StepContext, merged
from mea_ray.watermarks.base import Key, Stage, require_key
from mea_ray.watermarks.combiners.base import Combiner
from mea_ray.watermarks.key_draw import KeyDraw
from mea_ray.watermarks.mixed_classes import MixedClasses
from mea_ray.watermarks.mixing import Mixing, SourcePool


class DeepTracer(MixedClasses):
    """Mixes of two classes get the target's label, and outputs like those of the target's own images.

    Choose it for mixes that a victim cannot tell from its target class, verified with chosen samples.

    The loss is the cross-entropy of the main task, that of mixes with the target (``ver``), and the coupling: the mean
    squared distance between the logits of mixes and of images of the target class, over all pairs of a step and over
    the classes. Its gradient moves both sides. With ``verification.filter=auto`` the key's samples are those that
    victim and shadow thieves recognise and null models do not.

    Only the paper's abstract and a summary of it were at hand. They state a same-class coupling loss in the output
    space, and a filter of the key's samples in two stages: by the marked model, then by stolen and independent models.
    The form of the loss, its weights and the filter's thresholds are this project's. The paper picks several source
    classes by K-means over features, so that they cover the feature space; here there are two, given or drawn, because
    only a key that was drawn uniformly has a rank that is a p-value.

    Args:
        source_classes: Labels of the two classes that are mixed.
        target_class: Label that a mix gets.
        mixing: How they are mixed.
        key: Whether the classes are those given, or drawn.
        ver: Weight of the cross-entropy of mixes with the target.
        coupling: Weight of the coupling. 0 switches it off.
        mixes: Mixes, and images of the target class, in a step.

    References:
        Yang et al., DeepTracer: Tracing Stolen Model via Deep Coupled Watermarks, AAAI 2026,
        https://arxiv.org/abs/2511.08985 (abstract).

    Raises:
        ConfigError: Classes coincide, or a geometry makes the combiner's own mixes.
    """

    name = "deeptracer"
    sample_filter = "shadow"

    def __init__(
        self,
        *,
        source_classes: tuple[ClassLabel, ClassLabel] = (0, 1),
        target_class: ClassLabel = 2,
        mixing: Mixing = Mixing(),
        key: KeyDraw = KeyDraw(),
        ver: Annotated[float, Field(gt=0)] = 1.0,
        coupling: Annotated[float, Field(ge=0)] = 0.1,
        mixes: Annotated[int, Field(ge=2)] = 32,
    ) -> None:
        super().__init__(source_classes, target_class, mixing, key)
        self.ver, self.coupling, self.mixes = ver, coupling, mixes

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the stage that embeds the key."""
        key = require_key(key, self.name)
        combiner, _ = self.combiners(key)
        pools = [train.of_class(label) for label in (*key.source_classes, key.target_class)]
        objective = CoupledObjective(
            SourcePool(*pools, augment=True), key.target_class, combiner, self.mixes, self.ver, self.coupling
        )
        return [Stage("embed", objective, train)]


def coupling(mixes: Tensor, own: Tensor) -> Tensor:
    """Return the mean squared distance of logits over all pairs and all classes: a scalar.

    Args:
        mixes: Logits of mixes, (n, classes).
        own: Logits of images of the target class, (m, classes).
    """
    return (mixes[:, None] - own[None]).square().mean()


class CoupledObjective(Objective):
    """Cross-entropy of the main batch and of mixes, and the coupling, in one pass.

    Args:
        sources: Images of both source classes and of the target.
        target: Label of the target.
        combiner: Mixes two images.
        mixes: Mixes in a step.
        ver: Weight of their cross-entropy.
        weight: Weight of the coupling.
    """

    resumable = True

    def __init__(
        self, sources: SourcePool, target: int, combiner: Combiner, mixes: int, ver: float, weight: float
    ) -> None:
        super().__init__()
        self.sources, self.target, self.combiner, self.mixes = sources, target, combiner, mixes
        self.weights = {"ver": ver, "coupling": weight}

    def start(self, context: StepContext) -> None:
        """Move the sources to the device."""
        super().start(context)
        self.sources.start(context)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``utility``, ``ver`` and, if it has a weight, ``coupling``."""
        first, second, own = self.sources.draw(self.mixes)
        parts = [batch.images, self.combiner(first, second, self.context.generator), own]
        logits, mixed, coupled = model(merged(parts)).float().split([len(part) for part in parts])
        target = torch.full((len(mixed),), self.target, device=mixed.device)
        terms = {"utility": F.cross_entropy(logits, batch.labels), "ver": F.cross_entropy(mixed, target)}
        if self.weights["coupling"]:
            terms["coupling"] = coupling(mixed, coupled)
        return terms
