"""SimCLR: the two views of an image should be closer to each other than to the views of any other image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mea_ray.pretext.base import Positive, Pretext, Width, feature_size
from mea_ray.training.views import CropScale, Jitter, Probability, Views


class SimClr(Pretext):
    """Normalised, temperature-scaled cross-entropy between the projections of two views (NT-Xent).

    Choose it first for an encoder: it needs the fewest settings.

    Args:
        temperature: Cosine similarities are divided by it.
        projection: Length of a projection.
        crop_scale: Smallest and largest part of the image's area that a view's crop takes.
        jitter: Largest change of brightness, contrast, saturation (in [0, 1]) and hue (in [0, 0.5]).
        grey: Probability that a view loses its colours.
        flip: Probability that a view is mirrored; 0 where left and right matter (digits).

    References:
        Chen et al., SimCLR, 2020, https://arxiv.org/abs/2002.05709, equation 1.

    Raises:
        ConfigError: A setting of the views is out of its range.
    """

    resumable = True

    def __init__(
        self,
        *,
        temperature: Positive = 0.5,
        projection: Width = 128,
        crop_scale: CropScale = (0.2, 1.0),
        jitter: Jitter = (0.4, 0.4, 0.4, 0.1),
        grey: Probability = 0.2,
        flip: Probability = 0.5,
    ) -> None:
        super().__init__(Views(crop_scale=crop_scale, jitter=jitter, grey=grey, flip=flip))
        self.temperature, self.projection = temperature, projection

    def build_heads(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Build the projection head."""
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead

        size = feature_size(model)
        self.head = SimCLRProjectionHead(size, size, self.projection).to(device)
        self.criterion = NTXentLoss(temperature=self.temperature)
        return list(self.head.parameters())

    def modules(self) -> dict[str, nn.Module]:
        """See the base class."""
        return {"head": self.head}

    def loss(self, features: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
        """Return NT-Xent of the two views, see the base class."""
        projected = self.head(torch.cat(list(features))).float()
        first, second = projected.split(len(features[0]))
        loss: Tensor = self.criterion(first, second)
        return loss
