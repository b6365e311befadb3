"""Cont-Steal: the substitute's feature of an image is to be nearer to its own embedding than to anything else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.attacks.imitation import EncoderAttack, Imitate
from mea_ray.attacks.learning import Learning
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Answers
from mea_ray.training.objective import Batch
from mea_ray.training.views import Views


class ContSteal(EncoderAttack):
    """Train substitutes with a contrastive loss of their features against the embeddings.

    The victim's embedding is that of the image as it is, asked once; the substitute sees an augmented view of it (the
    paper augments both sides, which would cost a query per view).

    Args:
        temperature: Cosines are divided by it.
        symmetric: Embeddings are anchors, too, and so are each other's negatives, as in the authors' code; the paper
            has the substitute's features as anchors only.
        flip: Probability that a view is mirrored; 0 where left and right matter (digits).
        query_chunk: Images in a query.

    References:
        Sha et al., Can't Steal? Cont-Steal!, CVPR 2023, https://arxiv.org/abs/2201.07513, equation 4.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    overrides = {"augment": ()}

    def __init__(
        self, *, temperature: float = 0.5, symmetric: bool = False, flip: float = 0.5, query_chunk: int = 1024
    ) -> None:
        if query_chunk < 1:
            raise ConfigError(f"query_chunk={query_chunk} must be at least 1 image")
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature} must be positive")
        self.temperature, self.symmetric, self.query_chunk = temperature, symmetric, query_chunk
        self.make_view = Views(flip=flip)

    def objective(self, learning: Learning, answers: Answers) -> Contrast:
        """Return the loss, see the base class."""
        return Contrast(answers, self.temperature, self.symmetric, self.make_view)


class Contrast(Imitate):
    """``ContSteal``'s loss.

    Args:
        answers: float32 (N, D).
        temperature: See ``ContSteal``, as for the rest.
        symmetric: See there.
        make_view: How a view is made.
    """

    def __init__(self, answers: Answers, temperature: float, symmetric: bool, make_view: Views) -> None:
        super().__init__(answers, normalise=True)
        self.temperature, self.symmetric, self.make_view = temperature, symmetric, make_view

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"contrast": loss}``."""
        (said,) = self.embed(model, [self.make_view(batch.images, self.context.generator)])
        return {"contrast": contrast(said, self.targets[batch.indices], self.temperature, symmetric=self.symmetric)}


def contrast(said: Tensor, targets: Tensor, temperature: float, *, symmetric: bool = False) -> Tensor:
    """Mean of -log(exp(s_i t_i / T) / (sum_j exp(s_i t_j / T) + sum_{j != i} exp(s_i s_j / T))), a scalar.

    Args:
        said: float32 (N, D), rows of length 1: s.
        targets: float32 (N, D), rows of length 1: t.
        temperature: T.
        symmetric: Take the mean with the same of s and t exchanged.
    """
    if symmetric:
        return (contrast(said, targets, temperature) + contrast(targets, said, temperature)) / 2
    own = said @ said.T / temperature
    own = own.masked_fill(torch.eye(len(said), dtype=torch.bool, device=said.device), float("-inf"))
    logits = torch.cat([said @ targets.T / temperature, own], dim=1)
    return F.cross_entropy(logits, torch.arange(len(said), device=said.device))
