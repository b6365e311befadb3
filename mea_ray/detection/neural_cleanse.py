"""Neural Cleanse: the smallest patch that turns everything into a class; a class that needs far less is suspicious."""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.types import Images
from mea_ray.detection.base import Detection, Evidence, Trigger
from mea_ray.models.base import ImageModel
from mea_ray.training import device as devices

TO_DEVIATION = 1.4826
"""The median absolute deviation of a normal variable times this is its standard deviation."""


class NeuralCleanse(Detection):
    """Optimise a mask and a pattern for each class, all classes in one batch, and compare the masks' L1 norms.

    For class c: cross-entropy of (1 - m) x + m p with c, plus lambda_c times the L1 norm of m. lambda_c rises by
    ``factor`` after ``patience`` looks at which the trigger succeeded, and falls by factor**1.5 as often after looks at
    which it failed. What counts is the smallest mask that succeeded. A class is flagged if its norm lies below the
    median of all by more than ``limit`` deviations (of the median absolute deviation).

    Args:
        steps: Updates of masks and patterns.
        batch_size: Images per update; each is tried under the triggers of all classes.
        success: Part of the images that must be turned for a trigger to count, in (0, 1].
        initial_lambda: lambda to begin with, above 0.
        factor: What lambda is multiplied by, above 1.
        patience: Looks in a row before lambda changes.
        look_every: Updates between two looks.
        learning_rate: Of Adam with betas (0.5, 0.9).
        limit: Anomaly index from which a class is flagged, above 0; 2 in the paper.

    References:
        Wang et al., Neural Cleanse, S&P 2019, section IV.

    Raises:
        ConfigError: A value is out of its range.
    """

    name = "neural_cleanse"

    def __init__(
        self,
        *,
        steps: int = 600,
        batch_size: int = 32,
        success: float = 0.99,
        initial_lambda: float = 1e-3,
        factor: float = 1.5,
        patience: int = 5,
        look_every: int = 4,
        learning_rate: float = 0.1,
        limit: float = 2.0,
    ) -> None:
        counts = {"steps": steps, "batch_size": batch_size, "patience": patience, "look_every": look_every}
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"{name}={count} must be at least 1")
        if not 0 < success <= 1:
            raise ConfigError(f"success={success} must lie in (0, 1]")
        for name, value in {"initial_lambda": initial_lambda, "learning_rate": learning_rate, "limit": limit}.items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value} must be positive and finite")
        if not 1 < factor < float("inf"):
            raise ConfigError(f"factor={factor} must be above 1 and finite")
        self.steps, self.batch_size, self.success = steps, batch_size, success
        self.initial_lambda, self.factor, self.patience = initial_lambda, factor, patience
        self.look_every, self.learning_rate, self.limit = look_every, learning_rate, limit

    def inspect(self, model: ImageModel, clean: Images, asked: Images | None, seed: int) -> Evidence:
        """Return a trigger and an anomaly index for each class."""
        triggers = self.triggers(model, clean, seed)
        norms = np.array([trigger.norm if trigger.success >= self.success else np.inf for trigger in triggers])
        indices = anomaly(norms)
        numbers = {f"norm/{t.label}": t.norm for t in triggers} | {f"success/{t.label}": t.success for t in triggers}
        numbers |= {f"anomaly/{label}": float(value) for label, value in enumerate(indices)}
        flagged = tuple(int(label) for label in np.flatnonzero(indices > self.limit))
        return Evidence(flagged, tuple(triggers), numbers)

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
        seen = _Best(classes, model.shape)
        images = torch.from_numpy(clean)
        hits, tried = torch.zeros(classes, device=where), 0
        for step in range(self.steps):
            chosen = torch.randint(len(images), (self.batch_size,), generator=generator)
            pixels = images[chosen].to(where).float() / 255
            mask, pattern = _bounded(raw_mask), _bounded(raw_pattern)
            mixed = (1 - mask)[:, None] * pixels[None] + (mask * pattern)[:, None]
            said = frozen(mixed.flatten(0, 1)).view(classes, len(pixels), classes)
            wanted = torch.arange(classes, device=where)[:, None].expand(classes, len(pixels))
            loss = F.cross_entropy(said.transpose(1, 2), wanted, reduction="none").mean(1)
            optimiser.zero_grad()
            (loss + price * mask.sum((1, 2, 3))).sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            hits += (said.argmax(2) == wanted).float().sum(1)
            tried += len(pixels)
            if (step + 1) % self.look_every:
                continue
            # Judged as they are now: the hits were those of the masks of the last few updates, which are near.
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


class _Best:
    """The smallest mask of each class that succeeded; before any did, the one that came nearest to it."""

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

    Deviations are median absolute deviations, scaled to a normal's. Classes without a trigger (inf) are left out and
    have 0; so have all if fewer than three are left, or if most norms are equal.
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
