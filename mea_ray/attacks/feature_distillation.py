"""Extraction of an encoder by distillation: a substitute learns the embeddings as they are."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.attacks.imitation import EncoderAttack, Imitate, distance
from mea_ray.attacks.learning import Learning
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Answers
from mea_ray.training.objective import Batch, StepContext

Loss = Literal["mse", "cosine", "centred_cosine"]


class FeatureDistillation(EncoderAttack):
    """Train substitutes to give the victim's embeddings of the thief's own images.

    Each image is asked once; its views in training (``thief.training.augment``) are taught the same embedding.

    Args:
        loss: ``mse``: mean squared error of the numbers. ``cosine``: 1 - cosine, whatever the lengths.
            ``centred_cosine``: the same of embeddings and features at length 1, after the mean of all answers was taken
            from both. Embeddings of a network that ends in a ReLU are nearly the same for all images, and their cosine
            nearly 1 whatever the substitute has learnt; what they have in common needs no learning.
        query_chunk: Images in a query.

    References:
        Lv et al., MEA-Defender, 2024, https://arxiv.org/abs/2401.15239, table I (SSL, Hinton et al.).

    Raises:
        ConfigError: A parameter is out of its range.
    """

    def __init__(self, *, loss: Loss = "mse", query_chunk: int = 1024) -> None:
        if query_chunk < 1:
            raise ConfigError(f"query_chunk={query_chunk} must be at least 1 image")
        if loss not in get_args(Loss):
            raise ConfigError(f"loss={loss!r} must be mse, cosine or centred_cosine")
        self.loss, self.query_chunk = loss, query_chunk

    def objective(self, learning: Learning, answers: Answers) -> DistilFeatures:
        """Return the loss, see the base class."""
        return DistilFeatures(answers, self.loss)


class DistilFeatures(Imitate):
    """``FeatureDistillation``'s loss.

    Args:
        answers: float32 (N, D).
        loss: See ``FeatureDistillation``.
    """

    def __init__(self, answers: Answers, loss: Loss) -> None:
        super().__init__(answers, normalise=loss == "centred_cosine")
        self.loss, self.common = loss, self.targets.mean(0)

    def start(self, context: StepContext) -> None:
        """Move what is common to all answers to the device."""
        super().start(context)
        self.common = self.common.to(context.device)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"distillation": loss}``."""
        (said,), targets = self.embed(model, [batch.images]), self.targets[batch.indices]
        if self.loss == "centred_cosine":
            said, targets = said - self.common, targets - self.common
        value = F.mse_loss(said, targets) if self.loss == "mse" else distance(said, targets, "cosine")
        return {"distillation": value}
