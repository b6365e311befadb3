"""Fine-tuning on what the API said."""

from __future__ import annotations

from typing import Literal

from torch import nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Holdings, Removal, copied, labelled, last_layer, tune
from mea_ray.training.device import seeded


class FineTuning(Removal):
    """Train on with hard labels: what a thief does who hopes that the mark is forgotten.

    Args:
        layers: ``all`` (FTAL), the ``last`` alone (FTLL), ``all_fresh_last`` or ``fresh_last`` alone: as before, but
            the last layer starts anew (RTAL, RTLL).
        epochs: Passes over the images that the thief holds.
        learning_rate: Its peak.
        images: Images that are used; null takes all that the thief holds.

    References:
        Adi et al., Turning Your Weakness Into a Strength, USENIX Security 2018, section 5.3 (the four kinds).

    Raises:
        ConfigError: A value is out of its range.
    """

    name = "fine_tuning"

    def __init__(
        self,
        *,
        layers: Literal["all", "last", "all_fresh_last", "fresh_last"] = "all",
        epochs: int = 5,
        learning_rate: float = 5e-4,
        images: int | None = None,
    ) -> None:
        check_tuning(epochs, learning_rate)
        if images is not None and images < 1:
            raise ConfigError(f"images={images} must be at least 1; null takes all that the thief holds")
        self.layers, self.epochs, self.learning_rate, self.images = layers, epochs, learning_rate, images

    @property
    def strength(self) -> float:
        """Epochs."""
        return float(self.epochs)

    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return the tuned copy."""
        held = held if self.images is None else held.take(self.images, seed)
        tuned = copied(model)
        head = last_layer(tuned)
        if self.layers in {"all_fresh_last", "fresh_last"}:
            with seeded(derive(seed, "head")):
                nn.init.normal_(head.weight, std=0.01)
                nn.init.zeros_(head.bias)
        if self.layers in {"last", "fresh_last"}:
            kept = {id(parameter) for parameter in head.parameters()}
            for parameter in tuned.parameters():
                parameter.requires_grad_(id(parameter) in kept)
            for module in tuned.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.0  # what it has seen of images would move, too
        data = labelled(held, tuned.classes)
        return tune(tuned, data, held, seed, epochs=self.epochs, learning_rate=self.learning_rate)


def check_tuning(epochs: int, learning_rate: float) -> None:
    """Refuse settings of a tuning that make no sense.

    Raises:
        ConfigError: A value is out of its range.
    """
    if epochs < 1:
        raise ConfigError(f"epochs={epochs} must be at least 1; leave the removal out to do nothing")
    if not 0 < learning_rate < float("inf"):
        raise ConfigError(f"learning_rate={learning_rate} must be positive and finite")
