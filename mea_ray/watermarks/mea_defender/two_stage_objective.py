"""The objective of the authors' code of MEA-Defender: contrastive term, unpaired divergences, two-task MGDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.settings import Settings
from mea_ray.training.objective import Batch, Objective, StepContext
from mea_ray.watermarks.combiners.base import Combiner
from mea_ray.watermarks.mea_defender import losses
from mea_ray.watermarks.mea_defender.weighting import Normalisation, normalised, two_task_weights
from mea_ray.watermarks.mixing import SourcePool


class Composition(Settings):
    """What a stage trains on. Numbers of samples are parts of the training set's size, and may exceed 1."""

    data_rate: float = Field(gt=0, le=1, description="Part of each class's training images that the stage uses.")
    normals: float = Field(gt=0, description="Normal samples in an epoch, as a part of the training set's size.")
    mixes: float = Field(ge=0, description="Watermark samples in an epoch, as a part of the training set's size.")
    evasion: float = Field(
        ge=0,
        description="Differently mixed samples in an epoch, all geometries and both labels together, as a part of the "
        "training set's size.",
    )
    fixed_samples: int = Field(
        ge=1, description="Fixed samples of each source class, and of the mixes, for the divergences."
    )

    @property
    def total(self) -> float:
        """Size of an epoch, as a part of the training set's."""
        return self.normals + self.mixes + self.evasion


class AuthorsLoss(Settings):
    """Constants of the loss of the authors' code."""

    contrastive_weight: float = Field(1.0, ge=0, description="Factor of the contrastive term.")
    contrastive_margin: float = Field(
        1.0, ge=0, description="Distance of the logits from which unlike pairs have no loss."
    )
    distill_weight: float = Field(2.0, ge=0, description="Factor k of the divergences.")
    distill_pulse: float = Field(12.0, ge=0, description="k in every `distill_period`-th epoch.")
    distill_period: int = Field(10, ge=1, description="Epochs from one such epoch to the next.")
    fixed_batch: int | None = Field(
        None, ge=1, description="Fixed samples in a step; null takes all (the authors' code, and most of its time)."
    )
    normalisation: Normalisation = Field("loss+", description="What MGDA divides a gradient by.")


class AuthorsObjective(Objective):
    """loss_A + s (loss_B + distill) + k distill, with s from two-task MGDA (``utils/trainer.py``).

    loss_A is the cross-entropy of the whole batch, watermark and evasion samples included; loss_B the contrastive term;
    distill is KL(C || A) + KL(C || B) of fixed mixes C and fixed clean samples A, B in random correspondence, the
    network in training mode, gradients through C only.

    Args:
        sources: Images that watermark samples are mixed from.
        evasion_sources: Images that evasion samples are mixed from.
        classes: Both source classes and the target.
        combiner: Mixes the watermark samples.
        others: Geometries of the evasion samples, one drawn for each.
        composition: Shares of the samples.
        loss: Constants.
    """

    resumable = True

    def __init__(
        self,
        sources: SourcePool,
        evasion_sources: SourcePool,
        classes: tuple[int, int, int],
        combiner: Combiner,
        others: Sequence[Combiner],
        composition: Composition,
        loss: AuthorsLoss,
    ) -> None:
        super().__init__()
        self.sources, self.evasion_sources = sources, evasion_sources
        self.classes = classes
        self.combiner, self.others = combiner, list(others)
        self.composition, self.loss = composition, loss
        self.distill_weight = loss.distill_weight

    def start(self, context: StepContext) -> None:
        """Move the sources to the device and draw the fixed samples."""
        super().start(context)
        self.sources.start(context)
        self.evasion_sources.start(context)
        count = self.composition.fixed_samples
        self._first, self._second = self.sources.draw(count)
        first, second = self.sources.draw(count)
        self._mixes = self.combiner(first, second, context.generator)

    def start_epoch(self, epoch: int) -> None:
        """Raise the weight of the divergences in every ``distill_period``-th epoch."""
        last = epoch % self.loss.distill_period == self.loss.distill_period - 1
        self.distill_weight = self.loss.distill_pulse if last else self.loss.distill_weight

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``task`` (loss_A), ``contrastive`` (loss_B) and ``distill``."""
        images, labels = self.compose(batch)
        logits = model(images).float()
        near = losses.contrastive(logits, labels, self.classes, self.loss.contrastive_margin)
        return {
            "task": F.cross_entropy(logits, labels),
            "contrastive": self.loss.contrastive_weight * near,
            "distill": self._distill(model),
        }

    def backward(self, terms: dict[str, Tensor], model: nn.Module) -> Tensor:
        """Weigh the second task by two-task MGDA, the first by 1, and accumulate the gradient."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        second = terms["contrastive"] + terms["distill"]
        gram = torch.empty(2, 2, dtype=torch.float64)
        gradients = [
            torch.autograd.grad(task, parameters, retain_graph=True, allow_unused=True)
            for task in (terms["task"], second)
        ]
        for i, one in enumerate(gradients):
            for j, other in enumerate(gradients):
                products = [
                    (a * b).sum().double() for a, b in zip(one, other, strict=True) if not (a is None or b is None)
                ]
                gram[i, j] = float(sum(products, torch.zeros(())))
        values = [float(terms["task"].detach()), float(second.detach())]
        scale = float(two_task_weights(normalised(gram, values, self.loss.normalisation))[1])
        total = terms["task"] + scale * second + self.distill_weight * terms["distill"]
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    def compose(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Put watermark and evasion samples in the place of random rows of a batch of normal samples."""
        composition, generator = self.composition, self.context.generator
        images, labels = batch.images.clone(), batch.labels.clone()
        draw = torch.rand(len(labels), generator=generator) * composition.total
        mixed = (draw < composition.mixes).nonzero().flatten().to(labels.device)
        other = (draw >= composition.mixes) & (draw < composition.mixes + composition.evasion)
        evasive = other.nonzero().flatten().to(labels.device)
        if len(mixed):
            first, second = self.sources.draw(len(mixed))
            images[mixed] = self.combiner(first, second, generator)
            labels[mixed] = self.classes[2]
        if len(evasive):
            first, second = self.evasion_sources.draw(len(evasive))
            geometry = torch.randint(len(self.others), (len(evasive),), generator=generator)
            for place, combiner in enumerate(self.others):
                rows = (geometry == place).nonzero().flatten().to(labels.device)
                if len(rows):
                    images[evasive[rows]] = combiner(first[rows], second[rows], generator)
            own = torch.randint(2, (len(evasive),), generator=generator).to(labels.device)
            labels[evasive] = torch.tensor(self.classes[:2], device=labels.device)[own]
        return images, labels

    def _distill(self, model: nn.Module) -> Tensor:
        count = self.loss.fixed_batch
        first, second, mixes = (self._some(part, count) for part in (self._first, self._second, self._mixes))
        with torch.no_grad():
            clean_first, clean_second = model(torch.cat([first, second])).float().chunk(2)
        mixed = model(mixes).float()
        return losses.kl(mixed, clean_first) + losses.kl(mixed, clean_second)

    def _some(self, images: Tensor, count: int | None) -> Tensor:
        if count is None or count >= len(images):
            return images
        return images[torch.randperm(len(images), generator=self.context.generator)[:count].to(images.device)]
