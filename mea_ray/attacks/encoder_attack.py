"""The base class of attacks on encoders: a substitute's features are trained towards the victim's embeddings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.attacks.learning import Learning
from mea_ray.attacks.query_attack import Queries, QueryAttack, Thief
from mea_ray.config import LearningConfig, TrainingConfig
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Answers
from mea_ray.training.objective import Objective, StepContext, merged

Distance = Literal["l2", "l1", "cosine"]


class EmbeddingObjective(Objective):
    """Base of the losses between a substitute's features and the victim's embeddings.

    If the features have another length than the embeddings, a linear map between them is trained along and then
    discarded: the stolen encoder is what comes before it.

    Args:
        answers: float32 (N, D), of the training images, in their order.
        normalise: Scale embeddings, and the features compared with them, to L2 norm 1.
    """

    resumable = True

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
        """Return the substitute's embeddings, float32 (N_i, D) for each part, of one pass over all parts."""
        embeddings = self.map(model.features(merged(parts))).float()  # type: ignore[operator]
        if self.normalise:
            embeddings = F.normalize(embeddings, dim=1)
        return list(embeddings.split([len(part) for part in parts]))


class EncoderAttack(QueryAttack):
    """An attack on a feature API: queries its pool in a random order, each image once. A subclass writes ``objective``.

    ``thief.learning`` is about probabilities: every setting but ``statistics`` must keep its default.
    """

    learns_from = "features"

    @abstractmethod
    def objective(self, learning: Learning, answers: Answers) -> Objective:
        """Make the loss against these embeddings, float32 (N, D)."""

    def check(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: TrainingConfig,
        learning: LearningConfig = LearningConfig(),
        *,
        labelled: bool = True,
    ) -> None:
        """Refuse what ``run`` could not finish; see ``Attack.check``."""
        defaults = LearningConfig()
        for name, value in learning:
            default = getattr(defaults, name)
            if name != "statistics" and value != default:
                raise ConfigError(
                    f"thief.learning.{name}={value!r} is for answers that are probabilities; this attack is trained on "
                    f"embeddings: leave it at {default!r}"
                )
        if training.early_stop_patience is not None:
            raise ConfigError(
                f"thief.training.early_stop_patience={training.early_stop_patience} stops on agreement of classes, "
                "which embeddings do not name; set it to null"
            )
        super().check(pool_size, budgets, training, learning, labelled=labelled)

    def queries(self, thief: Thief) -> Queries:
        """Query the pool in a random order."""
        return thief.query_pool(self.query_chunk)


def distance(features: Tensor, targets: Tensor, kind: Distance) -> Tensor:
    """Return the mean distance between rows, a scalar.

    Args:
        features: float32 (N, D).
        targets: float32 (N, D).
        kind: ``l2``: Euclidean, not squared. ``l1``: sum of absolute differences. ``cosine``: 1 - cosine.
    """
    if kind == "cosine":
        return 1 - F.cosine_similarity(features, targets, dim=1).mean()
    if kind == "l1":
        return (features - targets).abs().sum(1).mean()
    # The square root has an infinite slope at 0, and a student without error must not get a gradient of NaN.
    return ((features - targets).square().sum(1) + 1e-12).sqrt().mean()
