"""How a thief turns answers into a substitute: the same for every attack, and where its own defences sit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Answers
from mea_ray.training.objective import Batch, Objective, StepContext

Loss = Literal["kl", "soft_ce", "l1"]
Mixing = Literal["none", "mixup", "cutmix"]


@dataclass(frozen=True)
class Learning:
    """Loss of a substitute against the victim's answers; the section ``thief.learning`` of a config.

    Attributes:
        temperature: Both answer and substitute are softened by it; None takes the attack's own.
        loss: kl: KL(answer || substitute), batch mean. soft_ce: cross-entropy with the answer (the same gradient).
            l1: sum over the classes of the absolute difference of probabilities, batch mean.
        scale_by_temperature_squared: Multiply the loss by temperature**2, as Hinton et al. do, so that its gradient
            does not shrink with the temperature.
        validation_fraction: Part of the answered images that is held out to stop early on the fidelity there.
        floor: Least probability assumed for a class when the temperature is not 1.
        mixing: Train on mixtures of the transfer set: ``mixup`` blends two images and their targets, ``cutmix`` pastes
            a box of one into the other. Thieves use both as defences against backdoors; no query is asked for it.
        mixing_alpha: Both parameters of the Beta distribution of the mixing ratio.
        label_smoothing: Part of each target that is spread evenly over all classes.
        statistics: Channel statistics that the substitute normalises with: of the thief's own ``pool``, or ``none``
            (pixels in [0, 1] as they are).

    References:
        Hinton et al., 2015, https://arxiv.org/abs/1503.02531; Zhang et al., mixup, https://arxiv.org/abs/1710.09412;
        Yun et al., CutMix, https://arxiv.org/abs/1905.04899.

    Raises:
        ConfigError: A value is out of its range.
    """

    temperature: float | None = None
    loss: Loss = "kl"
    scale_by_temperature_squared: bool = False
    validation_fraction: float = 0.0
    floor: float = 1e-12
    mixing: Mixing = "none"
    mixing_alpha: float = 1.0
    label_smoothing: float = 0.0
    statistics: Literal["pool", "none"] = "pool"

    def __post_init__(self) -> None:
        if self.temperature is not None and self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} must be positive; 1 leaves the answers as they are")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction={self.validation_fraction} must lie in [0, 1)")
        if not 0 < self.floor < 1e-2:
            raise ConfigError(f"floor={self.floor} must lie between 0 and 0.01, both excluded; it stands for zero")
        if self.mixing_alpha <= 0:
            raise ConfigError(f"mixing_alpha={self.mixing_alpha} must be positive; mixing=none switches mixing off")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing={self.label_smoothing} must lie in [0, 1)")
        for name, value, known in (
            ("loss", self.loss, ("kl", "soft_ce", "l1")),
            ("mixing", self.mixing, ("none", "mixup", "cutmix")),
            ("statistics", self.statistics, ("pool", "none")),
        ):
            if value not in known:
                raise ConfigError(f"{name}={value!r} must be one of {', '.join(known)}")

    @property
    def heat(self) -> float:
        """The temperature, 1 if none was chosen."""
        return 1.0 if self.temperature is None else self.temperature

    def soften(self, answers: Tensor) -> Tensor:
        """Turn answers into targets of the loss.

        At temperature T the answer p becomes softmax(log max(p, floor) / T): for p = softmax(z) above the floor this is
        softmax(z / T), which the victim's logits z would have given. At T = 1 rows are only brought to sum 1, since
        top-k answers hide a part, and zeros stay.

        Args:
            answers: float32, (N, classes), negative values count as 0.

        Returns:
            float32, (N, classes), rows sum to 1 (a row of zeros stays one at T = 1 and teaches nothing).
        """
        answers = answers.float().clamp_min(0)
        if self.heat == 1:
            targets = answers / answers.sum(1, keepdim=True).clamp_min(self.floor)
        else:
            targets = F.softmax(answers.clamp_min(self.floor).log() / self.heat, dim=1)
        if not self.label_smoothing:
            return targets
        return (1 - self.label_smoothing) * targets + self.label_smoothing / targets.shape[1]

    def distance(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of substitute logits, (N, classes), against softened targets of that shape: a scalar."""
        log_said = F.log_softmax(logits.float() / self.heat, dim=1)
        if self.loss == "kl":
            value = F.kl_div(log_said, targets, reduction="batchmean")
        elif self.loss == "soft_ce":
            value = -(targets * log_said).sum(1).mean()
        else:
            value = (log_said.exp() - targets).abs().sum(1).mean()
        return (self.heat**2 if self.scale_by_temperature_squared else 1.0) * value

    def mix(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mix a batch with a permutation of itself, by one ratio for the batch, as both papers do.

        Args:
            images: float32, (N, C, H, W).
            targets: float32, (N, classes).
            generator: Random stream on the CPU.
        """
        if self.mixing == "none":
            return images, targets
        ratio = _beta(self.mixing_alpha, generator)
        other = torch.randperm(len(images), generator=generator).to(images.device)
        if self.mixing == "mixup":
            return torch.lerp(images[other], images, ratio), torch.lerp(targets[other], targets, ratio)
        height, width = images.shape[2:]
        tall, wide = (round(side * (1 - ratio) ** 0.5) for side in (height, width))
        # A box is drawn by its centre, and what lies outside of the image is cut off.
        centre = [int(torch.randint(side, (), generator=generator)) for side in (height, width)]
        top, left = (max(middle - size // 2, 0) for middle, size in zip(centre, (tall, wide), strict=True))
        bottom = min(centre[0] - tall // 2 + tall, height)
        right = min(centre[1] - wide // 2 + wide, width)
        pasted = images.clone()
        pasted[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
        kept = 1 - max(bottom - top, 0) * max(right - left, 0) / (height * width)
        return pasted, torch.lerp(targets[other], targets, kept)


def _beta(alpha: float, generator: torch.Generator) -> float:
    # numpy has a beta distribution that takes a seed, torch's takes no generator.
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


class Distil(Objective):
    """One answer per image, taught to every augmented view of it.

    Args:
        learning: The loss.
        answers: float32, (N, classes), of the images that are trained on, in their order.
    """

    resumable = True

    def __init__(self, learning: Learning, answers: Answers) -> None:
        super().__init__()
        self.learning = learning
        self.targets = learning.soften(torch.from_numpy(np.ascontiguousarray(answers)))

    def start(self, context: StepContext) -> None:
        """Move the targets to the device."""
        super().start(context)
        self.targets = self.targets.to(context.device)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"distillation": loss}``."""
        images, targets = self.learning.mix(batch.images, self.targets[batch.indices], self.context.generator)
        return {"distillation": self.learning.distance(model(images), targets)}
