"""Fine-tuning on the API's answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from mea_ray.core.seeding import derive
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import (
    Epochs,
    LearningRate,
    Prospect,
    Removal,
    ThiefData,
    copied,
    labelled,
    last_layer,
    tune,
)
from mea_ray.training.device import seeded


class FineTuning(Removal):
    """Continue training on the API's hard labels, so that the model may forget the mark.

    Choose it first: the thief goes on training with some labelled images.

    Args:
        layers: Layers that are tuned: ``all`` (FTAL) or the ``last`` (FTLL); ``all_fresh_last`` (RTAL) and
            ``fresh_last`` (RTLL) are the same with a newly initialised last layer.
        epochs: Passes over the thief's images.
        learning_rate: Peak learning rate.
        images: Number of images that are used; null takes all of the thief's.

    References:
        Adi et al., Turning Your Weakness Into a Strength, USENIX Security 2018, section 5.3 (the four kinds).
    """

    name = "fine_tuning"

    def __init__(
        self,
        *,
        layers: Literal["all", "last", "all_fresh_last", "fresh_last"] = "all",
        epochs: Epochs = 5,
        learning_rate: LearningRate = 5e-4,
        images: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        self.layers, self.epochs, self.learning_rate, self.images = layers, epochs, learning_rate, images
        self.needs_features = layers != "all"

    @property
    def strength(self) -> float:
        """Epochs."""
        return float(self.epochs)

    def check(self, prospect: Prospect) -> None:
        """Refuse a head that is not linear where it is tuned by itself, and batches of one image."""
        if self.needs_features:
            last_layer(prospect.model)
        prospect.check_batches(min(prospect.images, self.images or prospect.images))

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the tuned copy."""
        thief = thief if self.images is None else thief.take(self.images, seed)
        tuned = copied(model)
        head = None if self.layers == "all" else last_layer(tuned)
        if head is not None and self.layers in {"all_fresh_last", "fresh_last"}:
            with seeded(derive(seed, "head")):
                nn.init.normal_(head.weight, std=0.01)
                nn.init.zeros_(head.bias)
        if head is not None and self.layers in {"last", "fresh_last"}:
            tunable = {id(parameter) for parameter in head.parameters()}
            for parameter in tuned.parameters():
                parameter.requires_grad_(id(parameter) in tunable)
            for module in tuned.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.0  # its running statistics would change the features, too
        data = labelled(thief, tuned.classes)
        return tune(tuned, data, thief, seed, epochs=self.epochs, learning_rate=self.learning_rate)
