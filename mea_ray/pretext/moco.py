"""MoCo v2: a view is to be found again among many, encoded by a slowly following copy of the encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mea_ray.pretext.base import Jitter, Pretext, check_momentum, check_positive, encode, follow, follower
from mea_ray.training.views import Views


class Moco(Pretext):
    """The cross-entropy of a query against its own key and a queue of the last keys (InfoNCE).

    Keys come from a momentum encoder and have no gradient. Keys of a batch are not shuffled over devices: there is one.

    Args:
        temperature: Cosines are divided by it.
        projection: Length of a projection.
        queue: Keys of earlier images that a query is compared with.
        momentum: Part of the momentum encoder that stays at each update, in [0, 1).
        crop_scale: Part of the image that a view's crop takes, least and largest.
        jitter: Largest change of brightness, contrast, saturation (in [0, 1]) and hue (in [0, 0.5]).
        grey: Probability that a view loses its colours.
        flip: Probability that a view is mirrored.

    References:
        He et al., MoCo, 2020, https://arxiv.org/abs/1911.05722, equations 1 and 2; Chen et al., MoCo v2, 2020,
        https://arxiv.org/abs/2003.04297.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    encoded = 1

    def __init__(
        self,
        *,
        temperature: float = 0.2,
        projection: int = 128,
        queue: int = 4096,
        momentum: float = 0.99,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        jitter: Jitter = (0.4, 0.4, 0.4, 0.1),
        grey: float = 0.2,
        flip: float = 0.5,
    ) -> None:
        super().__init__(Views(crop_scale=crop_scale, jitter=jitter, grey=grey, flip=flip))
        check_positive(temperature=temperature, projection=projection, queue=queue)
        check_momentum(momentum)
        self.temperature, self.projection, self.queue, self.momentum = temperature, projection, queue, momentum

    def build_heads(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Build the projection head, the queue, and the momentum encoder with a head of its own."""
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import MoCoProjectionHead

        size = int(model.feature_size)  # type: ignore[arg-type]
        self.head = MoCoProjectionHead(size, size, self.projection).to(device)
        self.followers = [(model, follower(model)), (self.head, follower(self.head))]
        self.criterion = NTXentLoss(temperature=self.temperature, memory_bank_size=(self.queue, self.projection))
        self.criterion.to(device)
        return list(self.head.parameters())

    def loss(self, features: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
        """Return InfoNCE of the first view against the second's key, see the base class."""
        (_, encoder), (_, head) = self.followers
        with torch.no_grad():
            keys = head(encode(encoder, [views[1]])[0]).float()
        loss: Tensor = self.criterion(self.head(features[0]).float(), keys)
        return loss

    def updated(self, model: nn.Module) -> None:
        """Let the momentum encoder follow."""
        follow(self.followers, self.momentum)
