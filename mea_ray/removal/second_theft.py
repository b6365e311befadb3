"""Sequential theft: the substitute is distilled into a new model."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.seeding import derive
from mea_ray.core.types import Answers
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Epochs, Prospect, Removal, ThiefData, labelled, tune
from mea_ray.training.device import seeded
from mea_ray.training.objective import Batch, Objective, StepContext


class SecondTheft(Removal):
    """Train a fresh network on the model's own answers to the thief's images, for one or more generations.

    Choose it to distil the stolen model once more.

    The victim's API is not queried. Each theft may weaken the mark further.

    Args:
        generations: Thefts in a row.
        epochs: Epochs of each; null takes the thief's.
        temperature: Softens the answers of both networks.
    """

    name = "second_theft"

    def __init__(
        self,
        *,
        generations: Annotated[int, Field(ge=1)] = 1,
        epochs: Epochs | None = None,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        self.generations, self.epochs, self.temperature = generations, epochs, temperature

    @property
    def strength(self) -> float:
        """Generations."""
        return float(self.generations)

    def check(self, prospect: Prospect) -> None:
        """Refuse batches of one image."""
        prospect.check_batches(prospect.images, model=prospect.fresh)

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the last generation."""
        left = model
        for generation in range(self.generations):
            answers = metrics.probabilities(left, thief.images)
            with seeded(derive(seed, "weights", generation)):
                fresh = thief.make_model()
            assert isinstance(fresh, ImageModel)
            fresh.mean.copy_(left.mean)
            fresh.std.copy_(left.std)
            changes: dict[str, Any] = {"schedule": thief.training.schedule}
            if self.epochs is not None:
                changes["epochs"] = self.epochs
            objective = AnswerImitation(answers, self.temperature)
            left = tune(
                fresh,
                labelled(thief, fresh.classes),
                thief,
                derive(seed, "generation", generation),
                objective=objective,
                **changes,
            )
        return left


class AnswerImitation(Objective):
    """KL divergence from the network's softened answers to given ones, mean over the batch.

    Args:
        answers: float32 (N, classes), rows sum to 1.
        temperature: Softens both.
    """

    resumable = True

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
        predicted = F.log_softmax(model(batch.images).float() / self.temperature, dim=1)
        return {"imitation": F.kl_div(predicted, self.targets[batch.indices], reduction="batchmean")}
