"""Pruning: the smallest weights, or the features that clean images use least."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune

from mea_ray.core.errors import ConfigError
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Holdings, Removal, copied, labelled, last_layer, tune
from mea_ray.removal.fine_tuning import check_tuning
from mea_ray.training.objective import CrossEntropy


class Pruning(Removal):
    """Set the smallest weights of all convolutions and linear layers to zero, biases excepted.

    Args:
        rate: Share of the weights, in (0, 1); the paper's figure 11 goes from 0.1 to 0.9.
        scope: The smallest of each ``layer``, or ``global``: of the whole network.
        last_layer: Prune the layer that gives the logits, too.

    References:
        Lv et al., MEA-Defender, 2024, section VI-C (weight pruning); Lukas et al., WRT, S&P 2022 (per layer).

    Raises:
        ConfigError: The rate is out of its range.
    """

    name = "pruning"

    def __init__(self, *, rate: float = 0.5, scope: str = "layer", last_layer: bool = False) -> None:
        _check_rate(rate)
        if scope not in {"layer", "global"}:
            raise ConfigError(f"scope={scope!r} must be layer or global")
        self.rate, self.scope, self.last_layer = rate, scope, last_layer

    @property
    def strength(self) -> float:
        """Share of the weights that are set to zero."""
        return self.rate

    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return the pruned copy."""
        pruned = copied(model)
        spared = None if self.last_layer else last_layer(pruned)
        layers = [m for m in pruned.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m is not spared]
        if self.scope == "global":
            prune.global_unstructured([(m, "weight") for m in layers], prune.L1Unstructured, amount=self.rate)
        for layer in layers:
            if self.scope == "layer":
                prune.l1_unstructured(layer, "weight", amount=self.rate)
            prune.remove(layer, "weight")
        return pruned


class FinePruning(Removal):
    """Cut the features that clean images use least, then tune: a mark may live in neurons that sleep on clean images.

    What is cut are inputs of the last layer, in the order of their mean activation over the thief's images, until the
    agreement with the API has dropped by ``max_loss`` or ``rate`` of them are gone; they stay cut while it is tuned.
    The published code watches the test set for the first; a thief has none, so his own images are watched.

    Args:
        rate: Share of the features that are cut at most, in (0, 1).
        max_loss: Agreement with the API that may be lost before the tuning, in [0, 1]; 1 always cuts ``rate``.
        epochs: Passes of the tuning over the thief's images.
        learning_rate: Its peak.

    References:
        Liu et al., Fine-Pruning, RAID 2018, https://arxiv.org/abs/1805.12185.

    Raises:
        ConfigError: A value is out of its range.
    """

    name = "fine_pruning"
    STEP = 0.02
    """Share of the features that is cut between two looks at the agreement."""

    def __init__(
        self, *, rate: float = 0.9, max_loss: float = 0.1, epochs: int = 5, learning_rate: float = 5e-4
    ) -> None:
        _check_rate(rate)
        check_tuning(epochs, learning_rate)
        if not 0 <= max_loss <= 1:
            raise ConfigError(f"max_loss={max_loss} must lie in [0, 1]; 1 always cuts `rate` of the features")
        self.rate, self.max_loss, self.epochs, self.learning_rate = rate, max_loss, epochs, learning_rate

    @property
    def strength(self) -> float:
        """Share of the features that may be cut."""
        return self.rate

    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return the pruned and tuned copy."""
        pruned = copied(model)
        head = last_layer(pruned)
        features = metrics.features(pruned, held.images)
        asleep = torch.from_numpy(features.mean(0).argsort(kind="stable"))
        logits = torch.from_numpy(features) @ head.weight.detach().T + head.bias.detach()
        said = torch.from_numpy(held.labels)
        allowed = float((logits.argmax(1) == said).float().mean()) - self.max_loss
        most, step = round(self.rate * len(asleep)), max(1, round(self.STEP * len(asleep)))
        cut = 0
        for count in [*range(step, most, step), most]:
            gone = asleep[:count]
            left = logits - torch.from_numpy(features[:, gone.numpy()]) @ head.weight.detach()[:, gone].T
            if float((left.argmax(1) == said).float().mean()) < allowed:
                break
            cut = count
        objective = _Cut(asleep[:cut])
        objective.updated(pruned)
        data = labelled(held, pruned.classes)
        changes = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        return tune(pruned, data, held, seed, objective=objective, **changes)


class _Cut(CrossEntropy):
    """Cross-entropy of a network some of whose features the last layer does not see."""

    def __init__(self, gone: torch.Tensor) -> None:
        super().__init__()
        self.gone = gone

    def updated(self, model: nn.Module) -> None:
        """Cut again what the optimiser moved."""
        assert isinstance(model, ImageModel)
        with torch.no_grad():
            last_layer(model).weight[:, self.gone.to(last_layer(model).weight.device)] = 0


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise ConfigError(f"rate={rate} must lie strictly between 0 and 1; it is the share that is cut")
