"""Triggers reverse-engineered from a model: the smallest patch that turns all images into a class (Neural Cleanse)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mea_ray.core.seeding import derive
from mea_ray.core.types import Images
from mea_ray.models.base import ImageModel
from mea_ray.training import device as devices

TO_DEVIATION = 1.4826
"""The median absolute deviation of a normal variable times this is its standard deviation."""


@dataclass(frozen=True)
class Trigger:
    """A trigger that was reverse-engineered for one class: x becomes (1 - mask) x + mask * pattern.

    Attributes:
        label: The class that it makes a model predict.
        mask: float32 (1, H, W) in [0, 1].
        pattern: float32 (C, H, W) in [0, 1].
        success: Fraction of the images that it was optimised on that the model assigns to the class under it.
    """

    label: int
    mask: npt.NDArray[np.float32]
    pattern: npt.NDArray[np.float32]
    success: float

    @property
    def norm(self) -> float:
        """L1 norm of the mask, in pixels."""
        return float(self.mask.sum())

    def on(self, images: Images) -> Images:
        """Apply the trigger to images: uint8 (N, C, H, W)."""
        mixed = (1 - self.mask) * images.astype(np.float32) + self.mask * self.pattern * 255
        changed: Images = mixed.round().clip(0, 255).astype(np.uint8)
        return changed


@dataclass(frozen=True)
class TriggerSearch:
    """How triggers are searched for; see the parameters of ``detection.neural_cleanse.NeuralCleanse``."""

    steps: int = 600
    batch_size: int = 32
    success: float = 0.99
    initial_lambda: float = 1e-3
    factor: float = 1.5
    patience: int = 5
    look_every: int = 4
    learning_rate: float = 0.1


def reverse_engineered(model: ImageModel, clean: Images, search: TriggerSearch, seed: int) -> list[Trigger]:
    """Reverse-engineer a trigger for each class, all classes in one batch.

    Args:
        model: The network; not modified.
        clean: Images of all classes, uint8 (N, C, H, W).
        search: How.
        seed: Of the first masks and patterns, and of the batches.

    References:
        Wang et al., Neural Cleanse, S&P 2019, section IV.
    """
    where = devices.device()
    frozen = copy.deepcopy(model).requires_grad_(False).eval().to(where)
    generator = torch.Generator().manual_seed(derive(seed, "cleanse"))
    channels, height, width = model.shape
    classes = model.classes
    raw_mask = torch.randn((classes, 1, height, width), generator=generator).to(where).requires_grad_(True)
    raw_pattern = torch.randn((classes, channels, height, width), generator=generator).to(where).requires_grad_(True)
    optimiser = torch.optim.Adam([raw_mask, raw_pattern], search.learning_rate, betas=(0.5, 0.9))
    price = torch.full((classes,), search.initial_lambda, device=where)
    good, bad = torch.zeros(classes, device=where), torch.zeros(classes, device=where)
    seen = _SmallestMasks(classes, model.shape)
    images = torch.from_numpy(clean)
    hits, tried = torch.zeros(classes, device=where), 0
    for step in range(search.steps):
        chosen = torch.randint(len(images), (search.batch_size,), generator=generator)
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
        if (step + 1) % search.look_every:
            continue
        # The hits are those of the masks of the last few updates, which are close to the current ones.
        rate = hits / tried
        seen.update(rate, _bounded(raw_mask).detach(), _bounded(raw_pattern).detach(), search.success)
        worked = rate >= search.success
        good, bad = torch.where(worked, good + 1, 0 * good), torch.where(worked, 0 * bad, bad + 1)
        raised, lowered = good >= search.patience, bad >= search.patience
        price = torch.where(raised, price * search.factor, price)
        price = torch.where(lowered, price / search.factor**1.5, price)
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
