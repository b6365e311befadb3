"""The objectives of the class-feature watermark: the merged class beside the task, and the fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet, Labels
from mea_ray.evaluation import metrics
from mea_ray.training.objective import Batch, Objective, StepContext, merged
from mea_ray.watermarks.adi import BesideObjective
from mea_ray.watermarks.ewe import watch
from mea_ray.watermarks.mixed_classes import evenly

FITTED_ON = 5000
"""Training images whose logits give the classes' directions, at most."""


@dataclass(frozen=True)
class Domain:
    """Images of another domain, in the task's shape, distinct within each part.

    Attributes:
        trained: uint8 (N, C, H, W): candidates for the watermark.
        held_out: uint8: candidates for its verification, of the same classes.
        apart: uint8: images of the classes that are no part of the watermark.
        names: Names of the watermark's classes.
        apart_names: Names of the others.
    """

    trained: Images
    held_out: Images
    apart: Images
    names: tuple[str, ...]
    apart_names: tuple[str, ...]


class MergeObjective(BesideObjective):
    """Mean cross-entropy of the batch and of a few watermark images beside it; chooses these images when it starts.

    Args:
        domain: The candidates.
        target: Label of all watermark images.
        counts: Images that are chosen to train on, and to verify with.
        per_batch: Watermark images beside each batch.
        seed: Of the choice among equals.
    """

    def __init__(self, domain: Domain, target: int, counts: tuple[int, int], per_batch: int, seed: int) -> None:
        super().__init__(torch.empty(0), torch.empty(0), per_batch)
        self.domain, self.target, self.counts, self.seed = domain, target, counts, seed
        self.chosen: tuple[Images, Images] | None = None

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Choose by what the network of the task alone predicts for the candidates; nothing else is trained."""
        model.eval()
        parts = []
        for candidates, count in zip((self.domain.trained, self.domain.held_out), self.counts, strict=True):
            named = metrics.predictions(model, candidates, device=device)
            parts.append(candidates[balanced_choice(named, count, derive(self.seed, "balanced"))])
        model.train()
        self.chosen = (parts[0], parts[1])
        self.images = torch.from_numpy(parts[0])
        self.labels = torch.full((len(parts[0]),), self.target)
        return []


class TieObjective(Objective):
    """The fine-tuning that ties the watermark to the task, see ``ClassFeature``.

    Args:
        merge: Holds the watermark images, once it was trained.
        train: The training images of the task.
        layers: Last layers whose outputs are representations.
        weights: Of ``mark``, ``similarity`` and ``drift``.
    """

    resumable = True

    def __init__(self, merge: MergeObjective, train: ImageSet, layers: int, weights: dict[str, float]) -> None:
        super().__init__()
        self.merge, self.train, self.layers = merge, train, layers
        self.weights = dict(weights)
        self.directions: Tensor | None = None

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Remember the network as it is; nothing is trained beside the model."""
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        return []

    def start(self, context: StepContext) -> None:
        """Move the watermark images to the device."""
        super().start(context)
        self.images, self.labels = (each.to(context.device) for each in (self.merge.images, self.merge.labels))

    def start_epoch(self, epoch: int) -> None:
        """Let the classes' directions be found again."""
        self.directions = None

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``stability`` and, with their weights, ``mark``, ``similarity`` and ``drift``."""
        if self.directions is None and self.weights["drift"]:
            some = self.train.take(evenly(np.arange(len(self.train)), FITTED_ON))
            logits_of_some = metrics.logits(model, some.images, device=self.context.device)
            self.directions = principal_directions(logits_of_some, some.labels).to(self.context.device)
        chosen = torch.randint(len(self.images), (self.merge.count,), generator=self.context.generator)
        chosen = chosen.to(self.images.device)
        marks = self.images[chosen].float() / 255
        count = len(batch.images)
        logits, hidden = watch(model, merged([batch.images, marks]), self.layers, rectified=False)
        logits = logits.float()
        with torch.no_grad():
            before = self.teacher(batch.images).float().softmax(1)
        terms = {
            # The mean over images *and* classes, as in the published code, which the other weights belong to.
            "stability": F.kl_div(logits[:count].log_softmax(1), before, reduction="none").mean(),
            "mark": F.cross_entropy(logits[count:], self.labels[chosen]),
        }
        if self.weights["similarity"]:
            terms["similarity"] = -similarity(hidden, count)
        if self.directions is not None:
            terms["drift"] = drift(logits[count:], self.directions)
        return terms


def similarity(hidden: Sequence[Tensor], count: int) -> Tensor:
    """Cosine of the mean of the first ``count`` rows and of the mean of the rest, summed over layers: a scalar.

    Args:
        hidden: float32 (N, D) of each layer.
        count: Rows of images of the task; the others are watermark images.
    """
    return torch.stack([F.cosine_similarity(x[:count].mean(0), x[count:].mean(0), dim=0) for x in hidden]).sum()


def drift(logits: Tensor, directions: Tensor) -> Tensor:
    """Mean over directions and all ordered pairs of rows (a row and itself, too) of their distance: a scalar.

    Args:
        logits: float32 (N, classes) of watermark images.
        directions: float32 (D, classes), rows of length 1.
    """
    along = logits @ directions.T
    return (along[:, None] - along[None]).abs().mean()


def principal_directions(logits: npt.NDArray[np.float32], labels: Labels) -> Tensor:
    """First principal direction of the logits of each class that has two images: float32 (D, classes), length 1.

    Args:
        logits: float32 (N, classes).
        labels: int64 (N,).
    """
    directions = []
    for label in np.unique(labels):
        rows = torch.from_numpy(logits[labels == label]).double()
        if len(rows) > 1:
            directions.append(torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[0])
    return torch.stack(directions).float() if directions else torch.zeros(0, logits.shape[1])


def balanced_choice(named: Labels, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Choose ``count`` positions (all if there are fewer), as evenly over the labels as possible: sorted int64.

    Args:
        named: int64 (N,): predicted label of each candidate.
        count: Positions wanted.
        seed: Of the choice among equals.
    """
    order = numpy_generator(seed, "order").permutation(len(named))
    turn = np.zeros(len(named), np.int64)
    for label in np.unique(named):
        members = order[named[order] == label]
        turn[members] = np.arange(len(members))
    # The first of each label, then the second of each, and so on.
    return np.sort(order[np.argsort(turn[order], kind="stable")][:count])
