"""Cont-Steal: a contrastive loss pulls the substitute's features of an image towards the victim's embedding."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.attacks.encoder_attack import EmbeddingObjective, EncoderAttack
from mea_ray.attacks.learning import Learning
from mea_ray.core.types import Answers
from mea_ray.training.objective import Batch
from mea_ray.training.views import Probability, Views


class ContSteal(EncoderAttack):
    """Train substitutes with a contrastive loss of their features against the embeddings.

    Choose it against an encoder, to train with a contrastive loss.

    The victim's embedding is that of the unaugmented image, queried once. The substitute sees an augmented view of it.
    The paper augments both sides, which would cost a query per view.

    Args:
        temperature: Cosines are divided by it.
        symmetric: Embeddings are anchors, too, and each other's negatives, as in the authors' code. In the paper only
            the substitute's features are anchors.
        flip: Probability that a view is mirrored; 0 where left and right matter (digits).
        query_chunk: Images in a query.

    References:
        Sha et al., Can't Steal? Cont-Steal!, CVPR 2023, https://arxiv.org/abs/2201.07513, equation 4.
    """

    training_overrides = {"augment": ()}
    compares_images = True

    def __init__(
        self,
        *,
        temperature: Annotated[float, Field(gt=0)] = 0.5,
        symmetric: bool = False,
        flip: Probability = 0.5,
        query_chunk: Annotated[int, Field(ge=1)] = 1024,
    ) -> None:
        self.temperature, self.symmetric, self.query_chunk = temperature, symmetric, query_chunk
        self.make_view = Views(flip=flip)

    def objective(self, learning: Learning, answers: Answers) -> ContrastiveObjective:
        """Return the loss, see the base class."""
        return ContrastiveObjective(answers, self.temperature, self.symmetric, self.make_view)


class ContrastiveObjective(EmbeddingObjective):
    """The loss of ``ContSteal``.

    Args:
        answers: float32 (N, D).
        temperature: See ``ContSteal``.
        symmetric: See ``ContSteal``.
        make_view: Augments a batch.
    """

    def __init__(self, answers: Answers, temperature: float, symmetric: bool, make_view: Views) -> None:
        super().__init__(answers, normalise=True)
        self.temperature, self.symmetric, self.make_view = temperature, symmetric, make_view

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"contrast": loss}``."""
        (features,) = self.embed(model, [self.make_view(batch.images, self.context.generator)])
        targets = self.targets[batch.indices]
        return {"contrast": contrast(features, targets, self.temperature, symmetric=self.symmetric)}


def contrast(features: Tensor, targets: Tensor, temperature: float, *, symmetric: bool = False) -> Tensor:
    """Mean of -log(exp(s_i t_i / T) / (sum_j exp(s_i t_j / T) + sum_{j != i} exp(s_i s_j / T))), a scalar.

    Args:
        features: float32 (N, D), rows of L2 norm 1: s.
        targets: float32 (N, D), rows of L2 norm 1: t.
        temperature: T.
        symmetric: Take the mean with the same loss of s and t exchanged.
    """
    if symmetric:
        return (contrast(features, targets, temperature) + contrast(targets, features, temperature)) / 2
    own = features @ features.T / temperature
    own = own.masked_fill(torch.eye(len(features), dtype=torch.bool, device=features.device), float("-inf"))
    logits = torch.cat([features @ targets.T / temperature, own], dim=1)
    return F.cross_entropy(logits, torch.arange(len(features), device=features.device))
