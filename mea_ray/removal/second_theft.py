"""Sequential theft: the substitute is stolen in its turn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.types import Answers
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Holdings, Removal, labelled, tune
from mea_ray.training.device import seeded
from mea_ray.training.objective import Batch, Objective, StepContext


class SecondTheft(Removal):
    """Train a fresh network on the model's own answers to the thief's images; again, for more generations.

    Nothing is asked of the victim's API. What a mark loses in one theft it may lose once more in each.

    Args:
        generations: Thefts in a row, at least 1.
        epochs: Epochs of each; null takes the thief's.
        temperature: Both sides are softened by it, above 0.

    Raises:
        ConfigError: A value is out of its range.
    """

    name = "second_theft"

    def __init__(self, *, generations: int = 1, epochs: int | None = None, temperature: float = 1.0) -> None:
        if generations < 1:
            raise ConfigError(f"generations={generations} must be at least 1")
        if epochs is not None and epochs < 1:
            raise ConfigError(f"epochs={epochs} must be at least 1; null takes the thief's")
        if not 0 < temperature < float("inf"):
            raise ConfigError(f"temperature={temperature} must be positive and finite; 1 softens nothing")
        self.generations, self.epochs, self.temperature = generations, epochs, temperature

    @property
    def strength(self) -> float:
        """Generations."""
        return float(self.generations)

    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return the last generation."""
        left = model
        for generation in range(self.generations):
            answers = metrics.probabilities(left, held.images)
            with seeded(derive(seed, "weights", generation)):
                fresh = held.make_model()
            assert isinstance(fresh, ImageModel)
            fresh.mean.copy_(left.mean)
            fresh.std.copy_(left.std)
            changes = {"schedule": held.training.get("schedule", "one_cycle")}
            if self.epochs is not None:
                changes["epochs"] = self.epochs
            objective = Imitate(answers, self.temperature)
            left = tune(
                fresh,
                labelled(held, fresh.classes),
                held,
                derive(seed, "generation", generation),
                objective=objective,
                **changes,
            )
        return left


class Imitate(Objective):
    """KL of a model's softened answers and of the network's, mean over the batch.

    Args:
        answers: float32 (N, classes), rows sum to 1.
        temperature: Both sides are softened by it.
    """

    def __init__(self, answers: Answers, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.targets = F.softmax(torch.from_numpy(answers).clamp_min(1e-12).log() / temperature, dim=1)

    def start(self, context: StepContext) -> None:
        """Move the answers to the device."""
        super().start(context)
        self.targets = self.targets.to(context.device)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"imitation": KL}``."""
        said = F.log_softmax(model(batch.images).float() / self.temperature, dim=1)
        return {"imitation": F.kl_div(said, self.targets[batch.indices], reduction="batchmean")}
