"""What every pretext task is: random views of unlabelled images, and a loss of their features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.models.base import ImageModel
from mea_ray.training.objective import Batch, Objective, load_module_state, merged, module_state
from mea_ray.training.views import Views

Positive = Annotated[float, Field(gt=0)]
Width = Annotated[int, Field(ge=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
"""Share of a momentum encoder that each update keeps; 1 would never move it."""


class Pretext(Objective):
    """The utility loss of an encoder.

    A subclass defines ``loss``, and ``build_heads`` if it trains heads. Views are made of images that were not
    augmented before. A watermark with losses of its own encodes its images in the same forward pass as ``views``, and
    hands the features of the views to ``loss``.

    Args:
        views: How a view is made.
    """

    least_batch = 2
    """A task contrasts images with each other, or its heads normalise batches."""
    encoded: int = 2
    """Number of views that go through the encoder with gradients. A momentum encoder takes the others."""

    def __init__(self, views: Views) -> None:
        super().__init__()
        self.make_view = views
        self.momentum_pairs: list[tuple[nn.Module, nn.Module]] = []
        """Each module with its momentum copy: the encoder's and the head's."""
        self._attached: tuple[nn.Module, list[nn.Parameter]] | None = None

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Build the heads. A later stage of the same model's training continues with the heads that it has."""
        if self._attached is None or self._attached[0] is not model:
            self._attached = (model, self.build_heads(model, device))
        return self._attached[1]

    def build_heads(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Build the heads that are trained with the model, on the device; return their parameters."""
        return []

    def modules(self) -> dict[str, nn.Module]:
        """Return the heads and copies by name: of a head, the engine knows the parameters only, not the buffers."""
        return {}

    def memory(self) -> dict[str, Any]:
        """Return the state of all ``modules``."""
        return {name: module_state(module) for name, module in self.modules().items()}

    def recall(self, memory: dict[str, Any]) -> None:
        """See the base class."""
        for name, module in self.modules().items():
            load_module_state(module, memory[name])

    def views(self, batch: Batch) -> list[Tensor]:
        """Draw two views of each image: float32 in [0, 1], each (N, C, H, W)."""
        return [self.make_view(batch.images.float(), self.context.generator) for _ in range(2)]

    def momentum_copies(self) -> dict[str, nn.Module]:
        """Return the momentum encoder and its head by name, for ``modules``."""
        (_, encoder), (_, head) = self.momentum_pairs
        return {"momentum_encoder": encoder, "momentum_head": head}

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
    """Encode all parts in one forward pass; return float32 features (N_i, feature_size), part by part."""
    features: Tensor = image_model(model).features(merged(parts))
    return list(torch.split(features.float(), [len(part) for part in parts]))


def feature_size(model: nn.Module) -> int:
    """Return the length of a model's features."""
    return image_model(model).feature_size


def image_model(model: nn.Module) -> ImageModel:
    """Return the encoder itself, also where the engine has compiled it.

    Raises:
        ConfigError: It is not one of this package's networks.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, ImageModel):
        raise ConfigError(f"{type(inner).__name__} is not a network of mea_ray.models, so it has no features to train")
    return inner


def momentum_copy(module: nn.Module) -> nn.Module:
    """Return a copy without gradients, for ``update_momentum_copies``."""
    copy = deepcopy(module)
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
    return copy


def update_momentum_copies(pairs: Sequence[tuple[nn.Module, nn.Module]], momentum: float) -> None:
    """Move each copy (second) by 1 - ``momentum`` of the way to its original (first)."""
    from lightly.models.utils import update_momentum

    for module, copy in pairs:
        update_momentum(module, copy, momentum)
