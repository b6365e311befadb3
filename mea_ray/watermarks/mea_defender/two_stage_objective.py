"""The objective of the authors' code of MEA-Defender: contrastive term, unpaired divergences, two-task MGDA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.training.objective import Batch, Objective, StepContext
from mea_ray.watermarks.combiners.base import Combiner
from mea_ray.watermarks.mea_defender import losses
from mea_ray.watermarks.mea_defender.objective import SourcePool
from mea_ray.watermarks.mea_defender.weighting import MinNorm, Normalisation


@dataclass(frozen=True)
class Composition:
    """What a stage trains on; numbers are parts of the training set's size, all but ``data_rate`` may exceed 1.

    Attributes:
        data_rate: Part of each class that is used at all.
        normals: Normal samples in an epoch.
        mixes: Watermark samples in an epoch.
        evasion: Differently mixed samples in an epoch.
        fixed_samples: Fixed samples of each source class and of the mixes for the divergences.
    """

    data_rate: float
    normals: float
    mixes: float
    evasion: float
    fixed_samples: int

    @property
    def total(self) -> float:
        """Size of an epoch, as a part of the training set's."""
        return self.normals + self.mixes + self.evasion


@dataclass(frozen=True)
class AuthorsLoss:
    """Constants of the loss; ``MeaDefenderTwoStage`` documents them."""

    contrastive_weight: float = 1.0
    contrastive_margin: float = 1.0
    distill_weight: float = 2.0
    distill_pulse: float = 12.0
    distill_period: int = 10
    fixed_batch: int | None = None
    gradient_normalisation: Normalisation = "loss+"


def contrastive(logits: Tensor, labels: Tensor, classes: Sequence[int], margin: float = 1.0) -> Tensor:
    """The authors' contrastive term over consecutive samples of the source and target classes.

    Pairs (k, k + 1) of those samples; .5 [t d^2 + (1 - t) relu(margin - sqrt(d^2 + 1e-9))^2] with t = 1 for equal
    labels and d the distance of the logits; the mean over the pairs is divided by their number once more. Without a
    pair it is 0 (the authors' code stops with an error there).

    Args:
        logits: (N, classes).
        labels: int64 (N,).
        classes: Source and target classes; other samples do not count.
        margin: Distance from which unlike pairs are left alone.
    """
    counted = torch.isin(labels, torch.tensor(classes, device=labels.device))
    logits, labels = logits[counted], labels[counted]
    pairs = len(labels) - 1
    if pairs < 1:
        return logits.sum() * 0
    squared = (logits[1:] - logits[:-1]).square().sum(1)
    like = (labels[1:] == labels[:-1]).float()
    unlike = F.relu(margin - (squared + 1e-9).sqrt()).square()
    return (0.5 * (like * squared + (1 - like) * unlike)).mean() / pairs


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
        self.minimum = MinNorm(loss.gradient_normalisation)
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
        near = contrastive(logits, labels, self.classes, self.loss.contrastive_margin)
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
        scale = float(self.minimum.weights_of(gram, [float(terms["task"].detach()), float(second.detach())])[1])
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
        answers = model(mixes).float()
        return losses.kl(answers, clean_first) + losses.kl(answers, clean_second)

    def _some(self, images: Tensor, count: int | None) -> Tensor:
        if count is None or count >= len(images):
            return images
        return images[torch.randperm(len(images), generator=self.context.generator)[:count].to(images.device)]
