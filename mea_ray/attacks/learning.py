"""How a thief learns from answers: the loss of every attack's substitute, and the thief's own defences.

The settings are the section ``thief.learning`` of a config, see ``mea_ray.config.LearningConfig``.

References:
    Hinton et al., 2015, https://arxiv.org/abs/1503.02531; Zhang et al., mixup, https://arxiv.org/abs/1710.09412;
    Yun et al., CutMix, https://arxiv.org/abs/1905.04899.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mea_ray.attacks.unlean import unlean
from mea_ray.config import LearningConfig
from mea_ray.core.types import Answers
from mea_ray.training.objective import Batch, OutputLoss, StepContext


class Learning(LearningConfig):
    """The settings of ``thief.learning``, with what they mean for targets, batches and losses."""

    @property
    def effective_temperature(self) -> float:
        """The temperature, 1 if none was chosen."""
        return 1.0 if self.temperature is None else self.temperature

    def clean(self, answers: Answers) -> Answers:
        """Return all answers of a transfer set, float32 (N, classes), as they are trained on.

        Only ``answers=unlean`` changes anything here: what is done to each answer by itself is left to ``soften``.
        """
        return unlean(answers) if self.answers == "unlean" else answers

    def soften(self, answers: Tensor) -> Tensor:
        """Turn answers into targets of the loss.

        At temperature T the answer p becomes softmax(log max(p, floor) / T). For p = softmax(z) above the floor this is
        softmax(z / T), which the victim's logits z would have given. At T = 1 rows are only scaled to sum 1, because
        top-k answers hide a part, and zeros stay zeros.

        Before that, ``answers=argmax`` makes p one-hot and ``answers=sharpen`` raises it to the power ``sharpness``.

        Args:
            answers: float32, (N, classes), negative values count as 0.

        Returns:
            float32, (N, classes), rows sum to 1. A row of zeros stays one at T = 1 and has no gradient.
        """
        answers = answers.float().clamp_min(0)
        if self.answers == "argmax":
            answers = F.one_hot(answers.argmax(1), answers.shape[1]).float()
        elif self.answers == "sharpen":
            answers = answers.pow(self.sharpness)
        if self.effective_temperature == 1:
            targets = answers / answers.sum(1, keepdim=True).clamp_min(self.floor)
        else:
            targets = F.softmax(answers.clamp_min(self.floor).log() / self.effective_temperature, dim=1)
        if not self.label_smoothing:
            return targets
        return (1 - self.label_smoothing) * targets + self.label_smoothing / targets.shape[1]

    def distance(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of substitute logits, (N, classes), against softened targets of that shape: a scalar."""
        log_predicted = F.log_softmax(logits.float() / self.effective_temperature, dim=1)
        if self.loss == "kl":
            # What F.kl_div computes, bit for bit; torch.func.vmap knows these operations, and not that one.
            value = (torch.xlogy(targets, targets) - targets * log_predicted).sum() / len(targets)
        elif self.loss == "soft_ce":
            value = -(targets * log_predicted).sum(1).mean()
        else:
            value = (log_predicted.exp() - targets).abs().sum(1).mean()
        return (self.effective_temperature**2 if self.scale_by_temperature_squared else 1.0) * value

    def mix(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mix a batch with a permutation of itself, with one ratio for the batch, as both papers do.

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
        # A box is drawn by its centre, and the part outside of the image is cut off.
        centre = [int(torch.randint(side, (), generator=generator)) for side in (height, width)]
        top, left = (max(middle - size // 2, 0) for middle, size in zip(centre, (tall, wide), strict=True))
        bottom = min(centre[0] - tall // 2 + tall, height)
        right = min(centre[1] - wide // 2 + wide, width)
        pasted = images.clone()
        pasted[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
        unchanged = 1 - max(bottom - top, 0) * max(right - left, 0) / (height * width)
        return pasted, torch.lerp(targets[other], targets, unchanged)


def _beta(alpha: float, generator: torch.Generator) -> float:
    # numpy has a beta distribution that takes a seed, torch's takes no generator.
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


class DistillationObjective(OutputLoss):
    """Distillation: every augmented view of an image is trained towards the one answer to the image.

    Args:
        learning: The loss.
        answers: float32, (N, classes), of the training images, in their order.
    """

    resumable = True

    def __init__(self, learning: Learning, answers: Answers) -> None:
        super().__init__()
        self.learning = self.settings = learning
        self.targets = learning.soften(torch.from_numpy(np.ascontiguousarray(answers)))

    def start(self, context: StepContext) -> None:
        """Move the targets to the device."""
        super().start(context)
        self.targets = self.targets.to(context.device)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return images and softened answers, mixed where ``thief.learning.mixing`` says so."""
        return self.learning.mix(batch.images, self.targets[batch.indices], self.context.generator)

    def losses(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return ``{"distillation": loss}``."""
        return {"distillation": self.learning.distance(outputs, targets)}
