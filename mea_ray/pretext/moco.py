"""MoCo v2: a view must be distinguished from a queue of other images, as a momentum encoder encodes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mea_ray.pretext.base import (
    Momentum,
    Positive,
    Pretext,
    Width,
    encode,
    feature_size,
    momentum_copy,
    update_momentum_copies,
)
from mea_ray.training.views import CropScale, Jitter, Probability, Views


class Moco(Pretext):
    """Cross-entropy of a query against its own key and a queue of earlier keys (InfoNCE).

    Choose it for an encoder that trains with small batches.

    Keys come from a momentum encoder and have no gradient. Keys of a batch are not shuffled over devices: there is one.

    Args:
        temperature: Cosine similarities are divided by it.
        projection: Length of a projection.
        queue: Number of earlier keys that a query is compared with.
        momentum: Part of the momentum encoder that stays at each update.
        crop_scale: Smallest and largest part of the image's area that a view's crop takes.
        jitter: Largest change of brightness, contrast, saturation (in [0, 1]) and hue (in [0, 0.5]).
        grey: Probability that a view loses its colours.
        flip: Probability that a view is mirrored.

    References:
        He et al., MoCo, 2020, https://arxiv.org/abs/1911.05722, equations 1 and 2; Chen et al., MoCo v2, 2020,
        https://arxiv.org/abs/2003.04297.

    Raises:
        ConfigError: A setting of the views is out of its range.
    """

    encoded = 1
    resumable = True

    def __init__(
        self,
        *,
        temperature: Positive = 0.2,
        projection: Width = 128,
        queue: Width = 4096,
        momentum: Momentum = 0.99,
        crop_scale: CropScale = (0.2, 1.0),
        jitter: Jitter = (0.4, 0.4, 0.4, 0.1),
        grey: Probability = 0.2,
        flip: Probability = 0.5,
    ) -> None:
        super().__init__(Views(crop_scale=crop_scale, jitter=jitter, grey=grey, flip=flip))
        self.temperature, self.projection, self.queue, self.momentum = temperature, projection, queue, momentum

    def build_heads(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Build the projection head, the queue, and the momentum encoder with a head of its own."""
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import MoCoProjectionHead

        size = feature_size(model)
        self.head = MoCoProjectionHead(size, size, self.projection).to(device)
        self.momentum_pairs = [(model, momentum_copy(model)), (self.head, momentum_copy(self.head))]
        self.criterion = NTXentLoss(temperature=self.temperature, memory_bank_size=(self.queue, self.projection))
        self.criterion.to(device)
        return list(self.head.parameters())

    def modules(self) -> dict[str, nn.Module]:
        """See the base class."""
        return {"head": self.head, "queue": self.criterion, **self.momentum_copies()}

    def loss(self, features: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
        """Return InfoNCE of the first view against the second's key, see the base class."""
        (_, encoder), (_, head) = self.momentum_pairs
        with torch.no_grad():
            keys = head(encode(encoder, [views[1]])[0]).float()
        loss: Tensor = self.criterion(self.head(features[0]).float(), keys)
        return loss

    def updated(self, model: nn.Module) -> None:
        """Move the momentum encoder."""
        update_momentum_copies(self.momentum_pairs, self.momentum)
