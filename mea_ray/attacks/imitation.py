"""What the thieves of encoders share: a substitute whose features imitate the embeddings that were answered."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.attacks.driver import Queries, Thief, TransferAttack
from mea_ray.attacks.learning import Learning
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Answers
from mea_ray.training.objective import Objective, StepContext, merged

Distance = Literal["l2", "l1", "cosine"]


class Imitate(Objective):
    """Base of the losses of features against embeddings.

    A substitute whose features have another length than the embeddings gets a linear map to them, which is trained
    beside it and thrown away: what is stolen is what comes before it.

    Args:
        answers: float32 (N, D), of the images that are trained on, in their order.
        normalise: Bring embeddings, and what imitates them, to length 1.
    """

    def __init__(self, answers: Answers, *, normalise: bool) -> None:
        super().__init__()
        self.normalise = normalise
        targets = torch.from_numpy(np.ascontiguousarray(answers))
        self.targets = F.normalize(targets, dim=1) if normalise else targets

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Build the map to the embeddings' length, where one is needed."""
        own, wanted = int(model.feature_size), self.targets.shape[1]  # type: ignore[arg-type]
        self.map: nn.Module = nn.Identity() if own == wanted else nn.Linear(own, wanted).to(device)
        return list(self.map.parameters())

    def start(self, context: StepContext) -> None:
        """Move the targets to the device."""
        super().start(context)
        self.targets = self.targets.to(context.device)

    def embed(self, model: nn.Module, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return what imitates the embeddings, float32 (N_i, D) for each part, of one pass over all of them."""
        said = self.map(model.features(merged(parts))).float()  # type: ignore[operator]
        return list((F.normalize(said, dim=1) if self.normalise else said).split([len(part) for part in parts]))


class EncoderAttack(TransferAttack):
    """An attack on a feature API: asks its pool in a random order, each image once. A subclass writes ``objective``.

    ``thief.learning`` is about probabilities; all of it but ``statistics`` must be left alone.
    """

    learns_from = "features"

    @abstractmethod
    def objective(self, learning: Learning, answers: Answers) -> Objective:
        """Make the loss against these embeddings."""

    def check(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: Mapping[str, Any],
        learning: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse what ``run`` could not finish; see ``Attack.check``."""
        chosen = dict(learning or {})
        plain = Learning(statistics=chosen.get("statistics", "pool"))
        for name, value in chosen.items():
            if value != getattr(plain, name, value):
                raise ConfigError(
                    f"thief.learning.{name}={value!r} is for answers that are probabilities; this attack imitates "
                    f"embeddings: leave it at {getattr(plain, name)!r}"
                )
        if training.get("early_stop_patience") is not None:
            raise ConfigError(
                f"thief.training.early_stop_patience={training['early_stop_patience']} stops on agreement of classes, "
                "which embeddings do not name; set it to null"
            )
        super().check(pool_size, budgets, training, learning)

    def queries(self, thief: Thief) -> Queries:
        """Ask the pool in a random order."""
        return thief.pool_in_order(self.query_chunk)


def distance(said: Tensor, targets: Tensor, kind: Distance) -> Tensor:
    """Mean distance of rows, a scalar.

    Args:
        said: float32 (N, D).
        targets: float32 (N, D).
        kind: ``l2``: Euclidean, not squared. ``l1``: sum of absolute differences. ``cosine``: 1 - cosine.

    Raises:
        ConfigError: Another kind.
    """
    if kind == "cosine":
        return 1 - F.cosine_similarity(said, targets, dim=1).mean()
    if kind == "l1":
        return (said - targets).abs().sum(1).mean()
    if kind == "l2":
        # The root's slope at 0 is infinite; a student that is right already must not get a gradient of NaN.
        return ((said - targets).square().sum(1) + 1e-12).sqrt().mean()
    raise ConfigError(f"distance={kind!r} must be l2, l1 or cosine")
