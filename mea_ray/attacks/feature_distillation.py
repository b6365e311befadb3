"""Extraction of an encoder by distillation: a substitute learns the embeddings as they are."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.attacks.imitation import EncoderAttack, Imitate, distance
from mea_ray.attacks.learning import Learning
from mea_ray.errors import ConfigError
from mea_ray.training.objective import Batch
from mea_ray.types import Answers


class FeatureDistillation(EncoderAttack):
    """Train substitutes to give the victim's embeddings of the thief's own images.

    Each image is asked once; its views in training (``thief.training.augment``) are taught the same embedding.

    Args:
        loss: ``mse``: mean squared error of the numbers. ``cosine``: 1 - cosine, whatever the lengths.
        query_chunk: Images in a query.

    References:
        Lv et al., MEA-Defender, 2024, https://arxiv.org/abs/2401.15239, table I (SSL, Hinton et al.).

    Raises:
        ConfigError: A parameter is out of its range.
    """

    def __init__(self, *, loss: Literal["mse", "cosine"] = "mse", query_chunk: int = 1024) -> None:
        if query_chunk < 1:
            raise ConfigError(f"query_chunk={query_chunk} must be at least 1 image")
        if loss not in {"mse", "cosine"}:
            raise ConfigError(f"loss={loss!r} must be mse or cosine")
        self.loss, self.query_chunk = loss, query_chunk

    def objective(self, learning: Learning, answers: Answers) -> DistilFeatures:
        """Return the loss, see the base class."""
        return DistilFeatures(answers, self.loss)


class DistilFeatures(Imitate):
    """``FeatureDistillation``'s loss.

    Args:
        answers: float32 (N, D).
        loss: ``mse`` or ``cosine``.
    """

    def __init__(self, answers: Answers, loss: Literal["mse", "cosine"]) -> None:
        super().__init__(answers, normalise=False)
        self.loss = loss

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"distillation": loss}``."""
        (said,), targets = self.embed(model, [batch.images]), self.targets[batch.indices]
        value = F.mse_loss(said, targets) if self.loss == "mse" else distance(said, targets, "cosine")
        return {"distillation": value}
