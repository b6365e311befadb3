"""Neural Attention Distillation: the suspect is tuned to the attention maps of a fine-tuned copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import (
    Epochs,
    LearningRate,
    Prospect,
    Removal,
    Share,
    ThiefData,
    copied,
    labelled,
    part_of,
    tune,
)
from mea_ray.training.objective import Batch, Objective, StepContext


class AttentionDistillation(Removal):
    """Fine-tune a copy as the teacher; then tune the suspect on labels and on the teacher's attention maps.

    Choose it for a thief with a few clean images and a mark that fine-tuning alone leaves.

    An attention map is the sum over channels of the squared activations of a layer, divided by its norm. The loss is
    the cross-entropy with the API's classes plus ``beta`` times the mean squared difference of the maps, summed over
    layers. The paper takes the last layers of a WideResNet's three groups; here it is the last ``layers`` convolutions
    of any network, with one ``beta`` (500, 1000 and 1000 in the paper).

    Args:
        beta: Weight of the attention maps.
        layers: Convolutions that are compared, counted from the last.
        share: Share of the thief's images that is used; 0.05 of the training data in the paper; null takes all.
        teacher_epochs: Passes that the teacher is tuned for; 10 in the paper.
        epochs: Passes that the suspect is tuned for; 20 in the paper.
        learning_rate: Of SGD with momentum 0.9, for both; 0.1 in the paper, which lowers it step by step.

    References:
        Li, Lyu, Koren, Lyu, Li and Ma, Neural Attention Distillation, ICLR 2021, https://arxiv.org/abs/2101.05930,
        equations 1 to 3.
    """

    name = "attention_distillation"

    def __init__(
        self,
        *,
        beta: Annotated[float, Field(gt=0)] = 1000.0,
        layers: Annotated[int, Field(ge=1)] = 3,
        share: Share | None = None,
        teacher_epochs: Epochs = 10,
        epochs: Epochs = 20,
        learning_rate: LearningRate = 1e-2,
    ) -> None:
        self.beta, self.layers, self.share = beta, layers, share
        self.teacher_epochs, self.epochs, self.learning_rate = teacher_epochs, epochs, learning_rate

    @property
    def strength(self) -> float:
        """The weight beta."""
        return self.beta

    def check(self, prospect: Prospect) -> None:
        """Refuse a network with fewer convolutions than are compared, and batches of one image."""
        count = len(convolutions(prospect.model))
        if count < self.layers:
            raise ConfigError(f"layers={self.layers} convolutions are compared, but the network has {count}; lower it")
        prospect.check_batches(part_of(prospect.images, self.share))

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the tuned copy."""
        thief = thief.take(part_of(len(thief.images), self.share), seed)
        data = labelled(thief, model.classes)
        changes: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "learning_rate": self.learning_rate}
        teacher = tune(copied(model), data, thief, derive(seed, "teacher"), epochs=self.teacher_epochs, **changes)
        objective = AttentionMaps(teacher, self.beta, self.layers)
        return tune(copied(model), data, thief, seed, objective=objective, epochs=self.epochs, **changes)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """Return a network's convolutions in the order in which they are registered."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def attention(activations: Tensor) -> Tensor:
    """Return the sum over channels of squared activations (N, C, H, W), at norm 1 for each image: (N, H * W)."""
    return F.normalize(activations.float().square().sum(1).flatten(1), dim=1)


@contextmanager
def watching(model: nn.Module, layers: int) -> Iterator[list[Tensor]]:
    """Collect the attention maps of the last convolutions, in their order, in every pass under the context."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(attention(output))

    handles = [module.register_forward_hook(keep) for module in convolutions(model)[-layers:]]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class AttentionMaps(Objective):
    """Cross-entropy, and the distance of attention maps from the teacher's.

    Args:
        teacher: The network whose maps are imitated; not changed.
        beta: Weight of the distance.
        layers: Convolutions that are compared, counted from the last.
    """

    resumable = True

    def __init__(self, teacher: ImageModel, beta: float, layers: int) -> None:
        super().__init__()
        self.teacher, self.layers = teacher.eval().requires_grad_(False), layers
        self.weights = {"attention": beta}

    def start(self, context: StepContext) -> None:
        """Move the teacher to the device."""
        super().start(context)
        self.teacher.to(context.device)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``utility`` and ``attention``, the latter without its weight."""
        with watching(model, self.layers) as own:
            logits = model(batch.images).float()
        with torch.no_grad(), watching(self.teacher, self.layers) as wanted:
            self.teacher(batch.images)
        apart = [F.mse_loss(mine, other) for mine, other in zip(own, wanted, strict=True)]
        return {"utility": F.cross_entropy(logits, batch.labels), "attention": torch.stack(apart).sum()}
