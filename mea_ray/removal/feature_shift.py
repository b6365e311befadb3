"""Feature Shift Tuning: a new last layer, kept away from the old one, makes the features move."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

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
    last_layer,
    part_of,
    tune,
)
from mea_ray.removal.new_head import AwayFromOldHead, draw_head, linear_head


class FeatureShiftTuning(Removal):
    """Tune all layers under a new head whose weights keep their norm and turn away from the old ones.

    Choose it where fine-tuning fails because the mark is entangled with clean features.

    The loss is the cross-entropy with the API's classes plus ``alpha`` times the inner product of the head's weights
    with those that it had. After every update the weights are brought back to their old norm. Unlike `wrk`, nothing but
    clean images is learnt.

    Args:
        alpha: Weight of the inner product; 0.1 in the paper for CIFAR-10.
        share: Share of the thief's images that is used; 0.02 of the training data in the paper.
        epochs: Passes over these images; 10 in the paper.
        learning_rate: Of SGD with momentum 0.9; 0.01 in the paper.

    References:
        Min, Qin, Shen and Cheng, Towards Stable Backdoor Purification through Feature Shift Tuning, NeurIPS 2023,
        https://arxiv.org/abs/2310.01875, equation 1 and algorithm 1.
    """

    name = "feature_shift"
    needs_features = True

    def __init__(
        self,
        *,
        alpha: Annotated[float, Field(ge=0)] = 0.1,
        share: Share | None = None,
        epochs: Epochs = 10,
        learning_rate: LearningRate = 1e-2,
    ) -> None:
        self.alpha, self.share, self.epochs, self.learning_rate = alpha, share, epochs, learning_rate

    @property
    def strength(self) -> float:
        """The weight alpha."""
        return self.alpha

    def check(self, prospect: Prospect) -> None:
        """Refuse a head that is not linear, and batches of one image."""
        last_layer(prospect.model)
        prospect.check_batches(part_of(prospect.images, self.share))

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the tuned copy."""
        thief = thief.take(part_of(len(thief.images), self.share), seed)
        shifted = copied(model)
        objective = ShiftedHead(draw_head(shifted, seed), self.alpha)
        changes: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0}
        changes["learning_rate"] = self.learning_rate
        data = labelled(thief, shifted.classes)
        return tune(shifted, data, thief, seed, objective=objective, epochs=self.epochs, **changes)


class ShiftedHead(AwayFromOldHead):
    """The same with the weights at their old norm after each update: a new head that only turns away."""

    def updated(self, model: nn.Module) -> None:
        """Bring the head's weights back to the old norm."""
        head = linear_head(model)
        with torch.no_grad():
            head.weight *= self.old.norm() / head.weight.norm()
