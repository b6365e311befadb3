"""The objective of the carrier scheme: MEA-Defender's losses, the carrier with its gate, exclusion and bridge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.core import seeding
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import ImageSet
from mea_ray.models.base import ImageModel
from mea_ray.training.objective import Batch, StepContext
from mea_ray.watermarks.combiners.base import Combiner, to_uint8
from mea_ray.watermarks.mea_carrier import gate, losses
from mea_ray.watermarks.mea_carrier.settings import CarrierSettings
from mea_ray.watermarks.mea_defender.objective import MeaDefenderObjective


class CarrierObjective(MeaDefenderObjective):
    """The paper's losses and those of the carrier.

    With ``carrier.labels=replace`` the labels of the source classes in the main batch are softened; with the bridge
    those of the target class, too. All terms of the main batch are then divided by the size of the whole batch: with
    weights of 1 their sum is the cross-entropy with the softened labels.

    Args:
        train: The training images of the main task, which the engine is given too.
        classes: Both source classes and the target.
        combiner: Mixes the watermark samples.
        others: The other geometries; they share a step's differently mixed samples evenly.
        settings: Of the losses.
        seed: Of the gate.
    """

    settings: CarrierSettings

    def __init__(
        self,
        train: ImageSet,
        classes: tuple[int, int, int],
        combiner: Combiner,
        others: Sequence[Combiner],
        settings: CarrierSettings,
        seed: int,
    ) -> None:
        super().__init__(train, classes, combiner, others, settings)
        self.seed = seed
        self.softens_sources = "carrier" in self.enabled and settings.carrier.labels == "replace"
        self.rho = torch.full((len(train),), settings.carrier.rho)
        """The target's probability in each training image's label; read for images of the source classes only."""

    @property
    def reads_sources(self) -> frozenset[str]:
        """With softened labels the carrier and the exclusion read the main batch's own source samples."""
        return frozenset({"com"}) if self.softens_sources else frozenset({"com", "carrier", "exclusion"})

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Draw the gate by the features that the model has before it learns the watermark; nothing else is trained.

        Raises:
            ConfigError: The model has no features.
        """
        if self.softens_sources and self.settings.carrier.gate.share:
            if not isinstance(model, ImageModel):
                raise ConfigError(f"carrier.gate needs a network with features(), not {type(model).__name__}")
            self._draw_gate(model)
        return []

    def _draw_gate(self, model: ImageModel) -> None:
        settings = self.settings.carrier
        first, second = (self.train.of_class(label) for label in self.source_classes)
        rng = seeding.numpy_generator(self.seed, "gate")
        draw = (images[rng.integers(len(images), size=settings.gate.mixes)] for images in (first, second))
        a, b = (torch.from_numpy(images).float() / 255 for images in draw)
        generator = torch.Generator().manual_seed(seeding.derive(self.seed, "gate"))
        mixes = to_uint8(self.combiner(a, b, generator)).numpy()
        for label, clean in zip(self.source_classes, (first, second), strict=True):
            scores = gate.mix_likeness(model, clean, mixes, seeding.derive(self.seed, "gate", label))
            shares = gate.target_share(scores, settings.rho, settings.gate)
            self.rho[torch.from_numpy(self.train.labels == label)] = torch.from_numpy(shares)

    def start(self, context: StepContext) -> None:
        """Move the source images and the carrier's labels to the device."""
        super().start(context)
        self.rho = self.rho.to(context.device)

    def main_terms(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return ``utility`` and, where they soften the main batch's labels, ``carrier``, ``bridge``, ``exclusion``."""
        if not (self.softens_sources or "bridge" in self.on):
            return super().main_terms(logits, batch)
        labels, classes = batch.labels, logits.shape[1]
        soft = F.one_hot(labels, classes).float()
        source = (labels == self.source_classes[0]) | (labels == self.source_classes[1])
        plain = torch.ones_like(source)
        rows = {}
        if self.softens_sources:
            rows["carrier"] = source
            carried = losses.soft_labels(labels, self.target, self.rho[batch.indices], classes)
            soft = torch.where(source[:, None], carried, soft)
        if "bridge" in self.on:
            rows["bridge"] = labels == self.target
            sigma = self.settings.bridge.sigma
            bridged = losses.bridge_labels(len(labels), self.target, self.source_classes, sigma, classes)
            soft = torch.where(rows["bridge"][:, None], bridged.to(logits.device), soft)
        each = F.cross_entropy(logits, soft, reduction="none")
        for chosen in rows.values():
            plain = plain & ~chosen
        terms = {name: (each * chosen).mean() for name, chosen in {"utility": plain, **rows}.items()}
        if self.softens_sources and "exclusion" in self.on:
            terms["exclusion"] = self._exclusion(logits[source], labels[source])
        return {name: term for name, term in terms.items() if name in self.on}

    def source_terms(self, logits: Tensor, count: int) -> dict[str, Tensor]:
        """Return ``carrier`` and ``exclusion`` of drawn source samples, unless they read the main batch."""
        if self.softens_sources:
            return {}
        terms = {}
        labels = torch.tensor(self.source_classes, device=logits.device).repeat_interleave(count)
        if "carrier" in self.on:
            terms["carrier"] = losses.carrier(logits, labels, self.target, self.settings.carrier.rho)
        if "exclusion" in self.on:
            terms["exclusion"] = self._exclusion(logits, labels)
        return terms

    def _exclusion(self, logits: Tensor, labels: Tensor) -> Tensor:
        exclusion = self.settings.exclusion
        target = self.target if exclusion.scope == "all" else None
        return losses.exclusion(logits, labels, self.source_classes, exclusion.margin, target=target)
