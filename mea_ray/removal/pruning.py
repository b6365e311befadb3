"""Pruning of the smallest weights, and of the features that clean images use least."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.utils import prune

from mea_ray.core.errors import ConfigError
from mea_ray.evaluation import metrics
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
    tune,
)
from mea_ray.training.objective import CrossEntropy


class Pruning(Removal):
    """Set the smallest weights of all convolutions and linear layers to zero, biases excepted.

    Choose it to remove small weights; the accuracy falls early.

    Args:
        rate: Fraction of the weights; the paper's figure 11 goes from 0.1 to 0.9.
        scope: ``layer``: the smallest weights of each layer; ``global``: of the whole network.
        last_layer: Prune the layer that gives the logits, too.

    References:
        Lv et al., MEA-Defender, 2024, section VI-C (weight pruning); Lukas et al., WRT, S&P 2022 (per layer).
    """

    name = "pruning"

    def __init__(
        self, *, rate: Share = 0.5, scope: Literal["layer", "global"] = "layer", last_layer: bool = False
    ) -> None:
        self.rate, self.scope, self.last_layer = rate, scope, last_layer
        self.needs_features = not last_layer

    @property
    def strength(self) -> float:
        """Fraction of the weights that are set to zero."""
        return self.rate

    def check(self, prospect: Prospect) -> None:
        """Refuse a network whose last layer is not linear, or that has no other layer to prune."""
        spared = None if self.last_layer else last_layer(prospect.model)
        if not any(isinstance(m, (nn.Conv2d, nn.Linear)) and m is not spared for m in prospect.model.modules()):
            raise ConfigError(
                f"{type(prospect.model).__name__} has no convolution or linear layer before the last one; set "
                "last_layer=true"
            )

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the pruned copy."""
        pruned = copied(model)
        spared = None if self.last_layer else last_layer(pruned)
        layers = [m for m in pruned.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m is not spared]
        if self.scope == "global":
            prune.global_unstructured([(m, "weight") for m in layers], prune.L1Unstructured, amount=self.rate)
        for layer in layers:
            if self.scope == "layer":
                prune.l1_unstructured(layer, "weight", amount=self.rate)  # type: ignore[no-untyped-call]
            prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
        return pruned


class FinePruning(Removal):
    """Prune the features that clean images use least, then fine-tune: a mark may be in neurons that they ignore.

    Choose it against marks in neurons that clean images do not use.

    Inputs of the last layer are pruned in the order of their mean activation over the thief's images, until the
    agreement with the API has dropped by ``max_loss`` or the fraction ``rate`` is pruned. They stay pruned during the
    fine-tuning. The published code limits the loss on the test set; a thief has none, so the thief's images are used.

    Args:
        rate: Largest fraction of the features that are pruned.
        max_loss: Agreement with the API that may be lost before the fine-tuning; 1 always prunes ``rate``.
        epochs: Passes of the fine-tuning over the thief's images.
        learning_rate: Peak learning rate of the fine-tuning.

    References:
        Liu et al., Fine-Pruning, RAID 2018, https://arxiv.org/abs/1805.12185.
    """

    name = "fine_pruning"
    needs_features = True
    STEP = 0.02
    """Fraction of the features that is pruned between two checks of the agreement."""

    def __init__(
        self,
        *,
        rate: Share = 0.9,
        max_loss: Annotated[float, Field(ge=0, le=1)] = 0.1,
        epochs: Epochs = 5,
        learning_rate: LearningRate = 5e-4,
    ) -> None:
        self.rate, self.max_loss, self.epochs, self.learning_rate = rate, max_loss, epochs, learning_rate

    @property
    def strength(self) -> float:
        """Largest fraction of the features that are pruned."""
        return self.rate

    def check(self, prospect: Prospect) -> None:
        """Refuse a head that is not linear, and batches of one image."""
        last_layer(prospect.model)
        prospect.check_batches(prospect.images)

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the pruned and tuned copy."""
        pruned = copied(model)
        head = last_layer(pruned)
        features = metrics.features(pruned, thief.images)
        order = torch.from_numpy(features.mean(0).argsort(kind="stable"))  # least active first
        logits = torch.from_numpy(features) @ head.weight.detach().T + head.bias.detach()
        labels = torch.from_numpy(thief.labels)
        allowed = float((logits.argmax(1) == labels).float().mean()) - self.max_loss
        most, step = round(self.rate * len(order)), max(1, round(self.STEP * len(order)))
        pruned_count = 0
        for count in [*range(step, most, step), most]:
            gone = order[:count]
            left = logits - torch.from_numpy(features[:, gone.numpy()]) @ head.weight.detach()[:, gone].T
            if float((left.argmax(1) == labels).float().mean()) < allowed:
                break
            pruned_count = count
        objective = _WithPrunedFeatures(order[:pruned_count])
        objective.updated(pruned)
        data = labelled(thief, pruned.classes)
        changes = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        return tune(pruned, data, thief, seed, objective=objective, **changes)


class _WithPrunedFeatures(CrossEntropy):
    """Cross-entropy of a network whose last layer ignores some features."""

    def __init__(self, gone: torch.Tensor) -> None:
        super().__init__()
        self.gone = gone

    def updated(self, model: nn.Module) -> None:
        """Set the weights of pruned features to zero again after the optimiser changed them."""
        assert isinstance(model, ImageModel)
        with torch.no_grad():
            last_layer(model).weight[:, self.gone.to(last_layer(model).weight.device)] = 0
