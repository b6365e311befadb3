"""The objective of MEA-Defender: all losses from one forward pass per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.core import seeding
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Images, ImageSet
from mea_ray.models.base import ImageModel
from mea_ray.training.objective import Batch, Objective, StepContext, merged
from mea_ray.watermarks.combiners.base import Combiner, to_uint8
from mea_ray.watermarks.mea_defender import gate, losses
from mea_ray.watermarks.mea_defender.weighting import Weighting

MIXED = {"com", "ver", "eva"}
"""The losses on mixed images; if there is nothing but them, the warm-up has nothing to begin with."""


@dataclass(frozen=True)
class Embedding:
    """Settings of ``MeaDefenderObjective``; ``MeaDefender`` documents each one."""

    weights: Mapping[str, float] = field(default_factory=dict)
    watermark_batch: int = 16
    adverse_batch: int = 8
    augment_sources: bool = True
    com_gradient: losses.ComGradient = "watermark"
    com_direction: losses.ComDirection = "watermark_source"
    com_schedule: Literal["constant", "ramp", "pulse"] = "constant"
    com_pulse: float = 6.0
    com_period: int = 10
    eva_label: Literal["random", "soft"] = "random"
    carrier_rho: float = 0.35
    carrier_labels: Literal["extra", "replace"] = "extra"
    exclusion_margin: float = 5.0
    exclusion_scope: Literal["source", "all"] = "source"
    bridge_sigma: float = 0.3
    warmup: float = 0.0
    gate: gate.Gate = field(default_factory=gate.Gate)


class SourcePool:
    """The images of some classes on the training device, as uint8.

    Args:
        *classes: uint8 (N, C, H, W) of each class.
        augment: Augment a drawn image as the main batch is, or only scale it to [0, 1].
    """

    def __init__(self, *classes: Images, augment: bool) -> None:
        self._pools = [torch.from_numpy(images) for images in classes]
        self._augment = augment

    def start(self, context: StepContext) -> None:
        """Move the images to the device."""
        self._context = context
        self._pools = [pool.to(context.device) for pool in self._pools]

    def draw(self, count: int) -> tuple[Tensor, ...]:
        """Draw ``count`` images of each class with replacement: for each float32 (count, C, H, W) in [0, 1]."""
        generator, device = self._context.generator, self._context.device
        rows = [pool[torch.randint(len(pool), (count,), generator=generator).to(device)] for pool in self._pools]
        drawn = torch.cat(rows)
        return (self._context.augment(drawn) if self._augment else drawn.float() / 255).split(count)


class Geometries:
    """Several other geometries, among which a step's differently mixed samples are shared out evenly.

    Args:
        combiners: One for each geometry.
    """

    def __init__(self, combiners: Sequence[Combiner]) -> None:
        self.combiners = list(combiners)
        self._turn = 0

    def __call__(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Mix pair k with geometry k mod G; where G does not divide the pairs, the surplus goes round in turn."""
        kinds = len(self.combiners)
        mixed = []
        for place, combiner in enumerate(self.combiners):
            rows = slice((place + self._turn) % kinds, None, kinds)
            if len(first[rows]):
                mixed.append(combiner(first[rows], second[rows], generator))
        self._turn += 1
        return torch.cat(mixed)


def warmth(epoch: int, epochs: int, warmup: float) -> float:
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


def merged_forward(model: nn.Module, parts: Sequence[Tensor]) -> list[Tensor]:
    """One forward pass over all parts; returns float32 logits, part by part."""
    return list(model(merged(parts)).float().split([len(part) for part in parts]))


class MeaDefenderObjective(Objective):
    """L_util, L_com, L_ver, L_eva (equations 4 to 8), the carrier (and its gate), the exclusion and the bridge term.

    A step's batch is [main; mixes; their clean sources of both classes; differently mixed samples]; a part that only
    losses of weight 0 need is not drawn and not computed.

    Args:
        train: The training images of the main task, which the engine is given too.
        source_classes: Labels of the two that are combined.
        target: Target class.
        combiner: Mixes the watermark samples.
        others: The other geometries; a step's differently mixed samples are shared out evenly among them.
        settings: Weights, batch sizes and switches.
        weighting: How the terms become one gradient; None sums them with their weights.
        seed: Of the gate.
    """

    def __init__(
        self,
        train: ImageSet,
        source_classes: tuple[int, int],
        target: int,
        combiner: Combiner,
        others: Sequence[Combiner],
        settings: Embedding,
        weighting: Weighting | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.train = train
        self.seed = seed
        first, second = (train.of_class(label) for label in source_classes)
        self.sources = SourcePool(first, second, augment=settings.augment_sources)
        self.source_classes = source_classes
        self.target = target
        self.combiner = combiner
        self.others = Geometries(others)
        self.weighting = weighting
        self.weights = dict(settings.weights)
        on = {name for name, weight in settings.weights.items() if weight > 0}
        extra_carrier = "carrier" in on and settings.carrier_labels == "extra"
        self.all_on = on
        self.softens_main = "carrier" in on and not extra_carrier
        self.excludes_main = "exclusion" in on and self.softens_main
        self.rho = torch.full((len(train),), settings.carrier_rho)
        """What the carrier gives each training image; where the label is no source class, nothing reads it."""
        self._switch(on)

    def _switch(self, on: set[str]) -> None:
        """Choose the terms that are computed from now on, and so what a step must draw."""
        self.on = on
        self.needs_mixes = bool(on & {"com", "ver"})
        apart = {"carrier"} if not self.softens_main else set()
        apart |= {"exclusion"} if not self.excludes_main else set()
        self.needs_sources = bool(on & ({"com"} | apart))
        self.needs_adverse = "eva" in on

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Draw the gate by the features that the model has before it learns the watermark; nothing else is trained.

        Raises:
            ConfigError: The model has no features.
        """
        if self.softens_main and self.settings.gate.share:
            if not isinstance(model, ImageModel):
                raise ConfigError(f"carrier_gate needs a network with features(), not {type(model).__name__}")
            self._draw_gate(model)
        return []

    def _draw_gate(self, model: ImageModel) -> None:
        settings = self.settings
        first, second = (self.train.of_class(label) for label in self.source_classes)
        rng = seeding.numpy_generator(self.seed, "gate")
        draw = (images[rng.integers(len(images), size=settings.gate.mixes)] for images in (first, second))
        a, b = (torch.from_numpy(images).float() / 255 for images in draw)
        generator = torch.Generator().manual_seed(seeding.derive(self.seed, "gate"))
        mixes = to_uint8(self.combiner(a, b, generator)).numpy()
        for label, clean in zip(self.source_classes, (first, second), strict=True):
            scores = gate.mix_likeness(model, clean, mixes, seeding.derive(self.seed, "gate", label))
            shares = gate.target_share(scores, settings.carrier_rho, settings.gate)
            self.rho[torch.from_numpy(self.train.labels == label)] = torch.from_numpy(shares)

    def start(self, context: StepContext) -> None:
        """Move the sources and the carrier's labels to the device."""
        super().start(context)
        self.sources.start(context)
        self.rho = self.rho.to(context.device)

    def start_epoch(self, epoch: int) -> None:
        """Set the weights for this epoch: of the mixes' losses while they warm up, and of L_com by its schedule."""
        warm = 1.0 if self.all_on <= MIXED else warmth(epoch, self.context.epochs, self.settings.warmup)
        # A loss of weight 0 is not computed: an aggregator would take its gradient of 0 for the least one.
        self._switch(self.all_on if warm > 0 else self.all_on - MIXED)
        for name in MIXED & self.all_on:
            self.weights[name] = self.settings.weights[name] * warm
        if "com" in self.all_on:
            self.weights["com"] *= self._com_factor(epoch)

    def _com_factor(self, epoch: int) -> float:
        schedule, period = self.settings.com_schedule, self.settings.com_period
        if schedule == "ramp":
            return (epoch + 1) / self.context.epochs
        if schedule == "pulse" and epoch % period == period - 1:
            return self.settings.com_pulse
        return 1.0

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return every switched-on loss by its name."""
        settings = self.settings
        mixes = settings.watermark_batch if self.needs_mixes or self.needs_sources else 0
        adverse = settings.adverse_batch if self.needs_adverse else 0
        parts: dict[str, Tensor] = {"main": batch.images}
        if mixes + adverse:
            first, second = self.sources.draw(mixes + adverse)
            if self.needs_mixes:
                parts["mixes"] = self.combiner(first[:mixes], second[:mixes], self.context.generator)
            if self.needs_sources:
                parts["first"], parts["second"] = first[:mixes], second[:mixes]
            if adverse:
                parts["adverse"] = self.others(first[mixes:], second[mixes:], self.context.generator)
        logits = dict(zip(parts, merged_forward(model, list(parts.values())), strict=True))
        terms = self._main(logits["main"], batch)
        terms.update(self._watermark(logits))
        if self.needs_sources:
            terms.update(self._clean(torch.cat([logits["first"], logits["second"]]), mixes))
        return terms

    def backward(self, terms: dict[str, Tensor], model: nn.Module) -> Tensor:
        """Sum the weighted terms, or let an aggregator weigh their gradients."""
        if self.weighting is None:
            return super().backward(terms, model)
        return self.weighting.backward({n: self.weights.get(n, 1.0) * t for n, t in terms.items()}, model)

    def _main(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        labels = batch.labels
        if not (self.softens_main or "bridge" in self.on):
            return {"utility": F.cross_entropy(logits, labels)} if "utility" in self.on else {}
        # All terms are divided by the whole batch, so that with weights 1 their sum is the cross-entropy of a batch
        # whose labels are softened: the probability that the network learns for the target is then rho.
        settings, classes = self.settings, logits.shape[1]
        soft = F.one_hot(labels, classes).float()
        source = (labels == self.source_classes[0]) | (labels == self.source_classes[1])
        plain = torch.ones_like(source)
        rows = {}
        if self.softens_main:
            rows["carrier"] = source
            carried = losses.soft_labels(labels, self.target, self.rho[batch.indices], classes)
            soft = torch.where(source[:, None], carried, soft)
        if "bridge" in self.on:
            rows["bridge"] = labels == self.target
            bridged = losses.bridge_labels(
                len(labels), self.target, self.source_classes, settings.bridge_sigma, classes
            ).to(logits.device)
            soft = torch.where(rows["bridge"][:, None], bridged, soft)
        each = F.cross_entropy(logits, soft, reduction="none")
        for chosen in rows.values():
            plain = plain & ~chosen
        terms = {name: (each * chosen).mean() for name, chosen in {"utility": plain, **rows}.items()}
        if self.excludes_main:
            terms["exclusion"] = self._exclusion(logits[source], labels[source])
        return {name: term for name, term in terms.items() if name in self.on}

    def _exclusion(self, logits: Tensor, labels: Tensor) -> Tensor:
        settings = self.settings
        target = self.target if settings.exclusion_scope == "all" else None
        return losses.exclusion(logits, labels, self.source_classes, settings.exclusion_margin, target=target)

    def _watermark(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        settings, terms = self.settings, {}
        if "com" in self.on:
            terms["com"] = losses.combination(
                logits["mixes"],
                logits["first"],
                logits["second"],
                direction=settings.com_direction,
                gradient=settings.com_gradient,
            )
        if "ver" in self.on:
            terms["ver"] = losses.verification(logits["mixes"], self.target)
        if "eva" in self.on:
            terms["eva"] = losses.evasion(logits["adverse"], self._adverse_labels(logits["adverse"]))
        return terms

    def _clean(self, logits: Tensor, count: int) -> dict[str, Tensor]:
        settings, terms = self.settings, {}
        labels = torch.tensor(self.source_classes, device=logits.device).repeat_interleave(count)
        if "carrier" in self.on and not self.softens_main:
            terms["carrier"] = losses.carrier(logits, labels, self.target, settings.carrier_rho)
        if "exclusion" in self.on and not self.excludes_main:
            terms["exclusion"] = self._exclusion(logits, labels)
        return terms

    def _adverse_labels(self, logits: Tensor) -> Tensor:
        classes = torch.tensor(self.source_classes, device=logits.device)
        if self.settings.eva_label == "soft":
            return F.one_hot(classes, logits.shape[1]).float().mean(0).expand(len(logits), -1)
        drawn = torch.randint(2, (len(logits),), generator=self.context.generator).to(logits.device)
        return classes[drawn]
