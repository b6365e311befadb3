"""What every pretext task is: views of unlabelled images, and a loss of their features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.training.objective import Batch, Objective, merged
from mea_ray.training.views import Views

Jitter = tuple[float, float, float, float]


class Pretext(Objective):
    """The utility loss of an encoder. A subclass writes ``loss``, and ``build_heads`` if it trains heads of its own.

    Views are made of images that were not augmented before. A watermark that adds losses of its own encodes its images
    in the same pass as ``views`` gives, and hands the features of these back to ``loss``.

    Args:
        views: How a view is made.
    """

    least_batch = 2
    """A task contrasts images with each other, or its heads normalise batches."""
    encoded: int = 2
    """Views of an image that go through the encoder; a momentum encoder takes the others."""

    def __init__(self, views: Views) -> None:
        super().__init__()
        self.make_view = views
        self._attached: tuple[nn.Module, list[nn.Parameter]] | None = None

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Build the heads; a later stage of the same model's training goes on with those that it has."""
        if self._attached is None or self._attached[0] is not model:
            self._attached = (model, self.build_heads(model, device))
        return self._attached[1]

    def build_heads(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Build what is trained beside the model, on the device; none unless a subclass says otherwise."""
        return []

    def views(self, batch: Batch) -> list[Tensor]:
        """Draw two views of each image: float32 in [0, 1], each (N, C, H, W)."""
        return [self.make_view(batch.images.float(), self.context.generator) for _ in range(2)]

    @abstractmethod
    def loss(self, features: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
        """Return the loss, a scalar.

        Args:
            features: Of the first ``encoded`` views, each float32 (N, feature_size), with their graph.
            views: All views.
        """

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"utility": loss}``."""
        views = self.views(batch)
        return {"utility": self.loss(encode(model, views[: self.encoded]), views)}


def encode(model: nn.Module, parts: Sequence[Tensor]) -> list[Tensor]:
    """One pass of the encoder over all parts; returns float32 features (N_i, feature_size), part by part."""
    return list(model.features(merged(parts)).float().split([len(part) for part in parts]))  # type: ignore[operator]


def follower(module: nn.Module) -> nn.Module:
    """Return a copy without gradients, which ``follow`` moves."""
    copy = deepcopy(module)
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
    return copy


def follow(pairs: Sequence[tuple[nn.Module, nn.Module]], momentum: float) -> None:
    """Move each follower (second) by (1 - momentum) of the way to what it follows (first)."""
    from lightly.models.utils import update_momentum

    for module, copy in pairs:
        update_momentum(module, copy, momentum)


def check_positive(**values: float) -> None:
    """Refuse values that are not positive.

    Raises:
        ConfigError: One is not.
    """
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name}={value} must be positive")


def check_momentum(momentum: float) -> None:
    """Refuse a momentum outside [0, 1).

    Raises:
        ConfigError: It is.
    """
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum={momentum} must lie in [0, 1); 1 would never move the momentum encoder")
