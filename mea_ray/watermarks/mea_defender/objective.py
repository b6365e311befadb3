"""The objective of MEA-Defender: all losses from one forward pass per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.core.types import ImageSet
from mea_ray.training.objective import Batch, Objective, StepContext, merged
from mea_ray.watermarks.combiners.base import Combiner
from mea_ray.watermarks.mea_defender import losses
from mea_ray.watermarks.mea_defender.settings import PaperSettings
from mea_ray.watermarks.mea_defender.weighting import make_weighting
from mea_ray.watermarks.mixing import Geometries, SourcePool

MIXED = frozenset({"com", "ver", "eva"})
"""The losses on mixed images. They warm up, unless there is no other loss."""


def warmup_factor(epoch: int, epochs: int, warmup: float) -> float:
    """0 in the first half of the warm-up, rising linearly to 1 in its second; 1 in the last epoch at the latest.

    Args:
        epoch: From 0.
        epochs: Of the whole training.
        warmup: Part of the epochs, in [0, 1).
    """
    length = warmup * epochs
    if not length or epoch + 1 >= min(length, epochs):
        return 1.0
    return max(0.0, 2 * (epoch + 1) / length - 1)


class MeaDefenderObjective(Objective):
    """L_util, L_com, L_ver and L_eva (equations 4 to 8).

    A step's batch is [main; mixes; their clean sources of both classes; differently mixed samples]. Parts that only
    losses of weight 0 need are not drawn.

    Args:
        train: The training images of the main task, which the engine is given too.
        classes: Both source classes and the target.
        combiner: Mixes the watermark samples.
        others: The other geometries; they share a step's differently mixed samples evenly.
        settings: Of the losses.
    """

    resumable = True

    def __init__(
        self,
        train: ImageSet,
        classes: tuple[int, int, int],
        combiner: Combiner,
        others: Sequence[Combiner],
        settings: PaperSettings,
    ) -> None:
        super().__init__()
        self.train = train
        self.source_classes, self.target = classes[:2], classes[2]
        self.combiner, self.others = combiner, Geometries(others)
        self.settings: PaperSettings = settings
        first, second = (train.of_class(label) for label in self.source_classes)
        self.sources = SourcePool(first, second, augment=settings.samples.augment)
        method = settings.weights
        self.weighting = make_weighting(method.method, method.normalisation, method.smoothing)
        self.full_weights = settings.loss_weights()
        self.weights = dict(self.full_weights)
        self.enabled = frozenset(name for name, weight in self.full_weights.items() if weight > 0)
        self.on = self.enabled

    @property
    def reads_sources(self) -> frozenset[str]:
        """The losses that read clean source images drawn beside the main batch."""
        return frozenset({"com"})

    def start(self, context: StepContext) -> None:
        """Move the source images to the device."""
        super().start(context)
        self.sources.start(context)

    def start_epoch(self, epoch: int) -> None:
        """Set the weights for this epoch: the warm-up of the losses on mixes, and the schedule of L_com."""
        alone = self.enabled <= MIXED
        factor = 1.0 if alone else warmup_factor(epoch, self.context.epochs, self.settings.warmup)
        # A loss of weight 0 is left out: an aggregator would take its gradient of 0 for the smallest one.
        self.on = self.enabled if factor > 0 else self.enabled - MIXED
        for name in MIXED & self.enabled:
            self.weights[name] = self.full_weights[name] * factor
        if "com" in self.enabled:
            self.weights["com"] *= self._com_factor(epoch)

    def memory(self) -> dict[str, Any]:
        """Return whose turn it is among the geometries, and the weighting's smoothed weights."""
        weighting = {} if self.weighting is None else self.weighting.memory()
        return {"turn": self.others.turn, "weighting": weighting}

    def recall(self, memory: dict[str, Any]) -> None:
        """See the base class."""
        self.others.turn = memory["turn"]
        if self.weighting is not None:
            self.weighting.recall(memory["weighting"])

    def _com_factor(self, epoch: int) -> float:
        com = self.settings.com
        if com.schedule == "ramp":
            return (epoch + 1) / self.context.epochs
        if com.schedule == "pulse" and epoch % com.period == com.period - 1:
            return com.pulse
        return 1.0

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return every enabled loss by its name."""
        parts = {"main": batch.images, **self._draw()}
        outputs = model(merged(list(parts.values()))).float().split([len(part) for part in parts.values()])
        logits = dict(zip(parts, outputs, strict=True))
        terms = self.main_terms(logits["main"], batch) | self._mixed_terms(logits)
        if "first" in parts:
            terms |= self.source_terms(torch.cat([logits["first"], logits["second"]]), len(parts["first"]))
        return terms

    @property
    def sums_terms(self) -> bool:
        """See the base class; an aggregator does not sum."""
        return self.weighting is None

    def backward(self, terms: dict[str, Tensor], model: nn.Module) -> Tensor:
        """Sum the weighted terms, or let an aggregator weigh their gradients."""
        if self.weighting is None:
            return super().backward(terms, model)
        return self.weighting.backward({name: self.weights.get(name, 1.0) * t for name, t in terms.items()}, model)

    def main_terms(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the main batch, given its logits (N, classes)."""
        return {"utility": F.cross_entropy(logits, batch.labels)} if "utility" in self.on else {}

    def source_terms(self, logits: Tensor, count: int) -> dict[str, Tensor]:
        """Return the further losses of drawn source images, given logits (2 count, classes), one class after the other.

        There are none in the paper.
        """
        return {}

    def _draw(self) -> dict[str, Tensor]:
        """Draw the parts of a step's batch beside the main one."""
        needs_mixes, needs_sources = bool(self.on & {"com", "ver"}), bool(self.on & self.reads_sources)
        samples, generator = self.settings.samples, self.context.generator
        mixes = samples.mixes if needs_mixes or needs_sources else 0
        adverse = samples.adverse if "eva" in self.on else 0
        parts: dict[str, Tensor] = {}
        if mixes + adverse:
            first, second = self.sources.draw(mixes + adverse)
            if needs_mixes:
                parts["mixes"] = self.combiner(first[:mixes], second[:mixes], generator)
            if needs_sources:
                parts["first"], parts["second"] = first[:mixes], second[:mixes]
            if adverse:
                parts["adverse"] = self.others(first[mixes:], second[mixes:], generator)
        return parts

    def _mixed_terms(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        com, terms = self.settings.com, {}
        if "com" in self.on:
            terms["com"] = losses.combination(
                logits["mixes"], logits["first"], logits["second"], direction=com.direction, gradient=com.gradient
            )
        if "ver" in self.on:
            terms["ver"] = losses.verification(logits["mixes"], self.target)
        if "eva" in self.on:
            terms["eva"] = losses.evasion(logits["adverse"], self._adverse_labels(logits["adverse"]))
        return terms

    def _adverse_labels(self, logits: Tensor) -> Tensor:
        classes = torch.tensor(self.source_classes, device=logits.device)
        if self.settings.eva.label == "soft":
            return F.one_hot(classes, logits.shape[1]).float().mean(0).expand(len(logits), -1)
        drawn = torch.randint(2, (len(logits),), generator=self.context.generator).to(logits.device)
        return classes[drawn]
