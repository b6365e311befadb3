"""Extraction of an encoder by distillation: a substitute is trained to give the victim's embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.attacks.encoder_attack import EmbeddingObjective, EncoderAttack, distance
from mea_ray.attacks.learning import Learning
from mea_ray.core.types import Answers
from mea_ray.training.objective import Batch, StepContext

FeatureLoss = Literal["mse", "cosine", "centred_cosine"]


class FeatureDistillation(EncoderAttack):
    """Train substitutes to give the victim's embeddings of the thief's own images.

    Choose it first against an encoder.

    Each image is queried once; its augmented views (``thief.training.augment``) are trained towards the same embedding.

    Args:
        loss: ``mse``: mean squared error. ``cosine``: 1 - cosine, whatever the lengths. ``centred_cosine``: the same of
            embeddings and features scaled to length 1, from both of which the mean of all answers is subtracted.
            Embeddings of a network that ends in a ReLU are nearly the same for all images, so their cosine is nearly 1
            whatever the substitute has learned; what they have in common need not be learned.
        query_chunk: Images in a query.

    References:
        Lv et al., MEA-Defender, 2024, https://arxiv.org/abs/2401.15239, table I (SSL, Hinton et al.).
    """

    def __init__(self, *, loss: FeatureLoss = "mse", query_chunk: Annotated[int, Field(ge=1)] = 1024) -> None:
        self.loss, self.query_chunk = loss, query_chunk

    def objective(self, learning: Learning, answers: Answers) -> FeatureObjective:
        """Return the loss, see the base class."""
        return FeatureObjective(answers, self.loss)


class FeatureObjective(EmbeddingObjective):
    """The loss of ``FeatureDistillation``.

    Args:
        answers: float32 (N, D).
        loss: See ``FeatureDistillation``.
    """

    def __init__(self, answers: Answers, loss: FeatureLoss) -> None:
        super().__init__(answers, normalise=loss == "centred_cosine")
        self.loss, self.common = loss, self.targets.mean(0)

    def start(self, context: StepContext) -> None:
        """Move the targets and their mean to the device."""
        super().start(context)
        self.common = self.common.to(context.device)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"distillation": loss}``."""
        (features,), targets = self.embed(model, [batch.images]), self.targets[batch.indices]
        if self.loss == "centred_cosine":
            features, targets = features - self.common, targets - self.common
        value = F.mse_loss(features, targets) if self.loss == "mse" else distance(features, targets, "cosine")
        return {"distillation": value}
