"""What every pretext task is: views of unlabelled images, and a loss of their features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mea_ray.training.objective import Batch, Objective
from mea_ray.training.views import Views

Jitter = tuple[float, float, float, float]


class Pretext(Objective):
    """The utility loss of an encoder. A subclass writes ``loss``, and ``attach`` if it trains heads of its own.

    Views are made of images that were not augmented before. A watermark that adds losses of its own encodes its images
    in the same pass as ``views`` gives, and hands the features of these back to ``loss``.

    Args:
        views: How a view is made.
    """

    encoded: int = 2
    """Views of an image that go through the encoder; a momentum encoder takes the others."""

    def __init__(self, views: Views) -> None:
        super().__init__()
        self.make_view = views

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
    merged = torch.cat(list(parts))
    if parts[0].is_contiguous(memory_format=torch.channels_last):
        merged = merged.contiguous(memory_format=torch.channels_last)
    return list(model.features(merged).float().split([len(part) for part in parts]))  # type: ignore[operator]
