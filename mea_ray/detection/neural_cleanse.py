"""Neural Cleanse: the smallest patch that turns all images into a class. Classes that need far less are flagged."""

from __future__ import annotations

import copy
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mea_ray.core.seeding import derive
from mea_ray.core.types import Images
from mea_ray.detection.base import Count, Detection, DetectionReport, Positive, Trigger
from mea_ray.models.base import ImageModel
from mea_ray.training import device as devices

TO_DEVIATION = 1.4826
"""The median absolute deviation of a normal variable times this is its standard deviation."""


class NeuralCleanse(Detection):
    """Optimise a mask and a pattern for each class, all classes in one batch, and compare the masks' L1 norms.

    Choose it first: the standard search for a backdoor's target class.

    The loss of class c is the cross-entropy of (1 - m) x + m p with c, plus lambda_c times the L1 norm of m. lambda_c
    is multiplied by ``factor`` after ``patience`` checks in a row at which the trigger succeeded, and divided by
    factor**1.5 after as many at which it failed. The smallest mask that succeeded is reported. A class is flagged if
    its norm lies below the median of all classes by more than ``limit`` scaled median absolute deviations.

    Args:
        steps: Updates of masks and patterns.
        batch_size: Images per update; each gets the triggers of all classes.
        success: Fraction of the images that a trigger must turn into its class to succeed.
        initial_lambda: Initial value of lambda.
        factor: Factor on lambda.
        patience: Checks in a row before lambda changes.
        look_every: Updates between two checks.
        learning_rate: Learning rate of Adam with betas (0.5, 0.9).
        limit: Anomaly index from which a class is flagged; 2 in the paper.

    References:
        Wang et al., Neural Cleanse, S&P 2019, section IV.
    """

    name = "neural_cleanse"

    def __init__(
        self,
        *,
        steps: Count = 600,
        batch_size: Count = 32,
        success: Annotated[float, Field(gt=0, le=1)] = 0.99,
        initial_lambda: Positive = 1e-3,
        factor: Annotated[float, Field(gt=1)] = 1.5,
        patience: Count = 5,
        look_every: Count = 4,
        learning_rate: Positive = 0.1,
        limit: Positive = 2.0,
    ) -> None:
        self.steps, self.batch_size, self.success = steps, batch_size, success
        self.initial_lambda, self.factor, self.patience = initial_lambda, factor, patience
        self.look_every, self.learning_rate, self.limit = look_every, learning_rate, limit

    def inspect(self, model: ImageModel, clean: Images, samples: Images | None, seed: int) -> DetectionReport:
        """Return a trigger and an anomaly index for each class."""
        triggers = self.triggers(model, clean, seed)
        norms = np.array([trigger.norm if trigger.success >= self.success else np.inf for trigger in triggers])
        indices = anomaly(norms)
        numbers = {f"norm/{t.label}": t.norm for t in triggers} | {f"success/{t.label}": t.success for t in triggers}
        numbers |= {f"anomaly/{label}": float(value) for label, value in enumerate(indices)}
        flagged = tuple(int(label) for label in np.flatnonzero(indices > self.limit))
        return DetectionReport(flagged, tuple(triggers), numbers)

    def triggers(self, model: ImageModel, clean: Images, seed: int) -> list[Trigger]:
        """Reverse-engineer a trigger for each class."""
        where = devices.device()
        frozen = copy.deepcopy(model).requires_grad_(False).eval().to(where)
        generator = torch.Generator().manual_seed(derive(seed, "cleanse"))
        channels, height, width = model.shape
        classes = model.classes
        raw_mask = torch.randn((classes, 1, height, width), generator=generator).to(where).requires_grad_(True)
        raw_pattern = (
            torch.randn((classes, channels, height, width), generator=generator).to(where).requires_grad_(True)
        )
        optimiser = torch.optim.Adam([raw_mask, raw_pattern], self.learning_rate, betas=(0.5, 0.9))
        price = torch.full((classes,), self.initial_lambda, device=where)
        good, bad = torch.zeros(classes, device=where), torch.zeros(classes, device=where)
        seen = _SmallestMasks(classes, model.shape)
        images = torch.from_numpy(clean)
        hits, tried = torch.zeros(classes, device=where), 0
        for step in range(self.steps):
            chosen = torch.randint(len(images), (self.batch_size,), generator=generator)
            pixels = images[chosen].to(where).float() / 255
            mask, pattern = _bounded(raw_mask), _bounded(raw_pattern)
            mixed = (1 - mask)[:, None] * pixels[None] + (mask * pattern)[:, None]
            logits = frozen(mixed.flatten(0, 1)).view(classes, len(pixels), classes)
            wanted = torch.arange(classes, device=where)[:, None].expand(classes, len(pixels))
            loss = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(1)
            optimiser.zero_grad()
            (loss + price * mask.sum((1, 2, 3))).sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            hits += (logits.argmax(2) == wanted).float().sum(1)
            tried += len(pixels)
            if (step + 1) % self.look_every:
                continue
            # The hits are those of the masks of the last few updates, which are close to the current ones.
            rate = hits / tried
            seen.update(rate, _bounded(raw_mask).detach(), _bounded(raw_pattern).detach(), self.success)
            worked = rate >= self.success
            good, bad = torch.where(worked, good + 1, 0 * good), torch.where(worked, 0 * bad, bad + 1)
            raised, lowered = good >= self.patience, bad >= self.patience
            price = torch.where(raised, price * self.factor, price)
            price = torch.where(lowered, price / self.factor**1.5, price)
            good, bad = torch.where(raised, 0 * good, good), torch.where(lowered, 0 * bad, bad)
            hits, tried = torch.zeros_like(hits), 0
        return seen.triggers()


def _bounded(raw: Tensor) -> Tensor:
    return (torch.tanh(raw) + 1) / 2


class _SmallestMasks:
    """The smallest successful mask of each class; while none succeeded, the one with the highest success rate."""

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        self.norm = np.full(classes, np.inf)
        self.rate = np.full(classes, -1.0)
        self.done = np.zeros(classes, bool)
        self.mask = np.ones((classes, 1, height, width), np.float32)
        self.pattern = np.full((classes, channels, height, width), 0.5, np.float32)

    def update(self, rate: Tensor, mask: Tensor, pattern: Tensor, success: float) -> None:
        rates, norms = rate.cpu().numpy(), mask.sum((1, 2, 3)).cpu().numpy()
        for label, (now, norm) in enumerate(zip(rates, norms, strict=True)):
            better = norm < self.norm[label] if self.done[label] else now > self.rate[label]
            first = now >= success and not self.done[label]
            if first or (better and (now >= success or not self.done[label])):
                self.done[label] |= now >= success
                self.norm[label], self.rate[label] = norm, now
                self.mask[label], self.pattern[label] = mask[label].cpu().numpy(), pattern[label].cpu().numpy()

    def triggers(self) -> list[Trigger]:
        return [
            Trigger(label, self.mask[label], self.pattern[label], max(0.0, float(self.rate[label])))
            for label in range(len(self.norm))
        ]


def anomaly(norms: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return how many deviations each norm lies *below* the median, at least 0: float64 (classes,).

    Deviations are median absolute deviations, scaled to the standard deviation of a normal distribution. Classes
    without a trigger (inf) are left out and have 0. All have 0 if fewer than three are left or most norms are equal.
    """
    finite = np.isfinite(norms)
    indices = np.zeros(len(norms))
    if finite.sum() < 3:
        return indices
    known = norms[finite]
    median = np.median(known)
    deviation = TO_DEVIATION * np.median(np.abs(known - median))
    if deviation > 0:
        indices[finite] = np.maximum(0.0, (median - known) / deviation)
    return indices
