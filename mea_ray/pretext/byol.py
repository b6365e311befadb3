"""BYOL: one view's projection predicts the other's as a slowly following copy of the encoder has it; no negatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mea_ray.pretext.base import Jitter, Pretext, check_momentum, check_positive, encode, follow, follower
from mea_ray.training.views import Views


class Byol(Pretext):
    """Mean negative cosine of predicted and target projection, over both directions.

    Args:
        projection: Length of a projection.
        hidden: Width of the hidden layer of the projection and the prediction head.
        momentum: Part of the target network that stays at each update, in [0, 1).
        crop_scale: Part of the image that a view's crop takes, least and largest.
        jitter: Largest change of brightness, contrast, saturation (in [0, 1]) and hue (in [0, 0.5]).
        grey: Probability that a view loses its colours.
        flip: Probability that a view is mirrored.

    References:
        Grill et al., BYOL, 2020, https://arxiv.org/abs/2006.07733, equation 2, up to the affine map 2 + 2 L.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    def __init__(
        self,
        *,
        projection: int = 128,
        hidden: int = 512,
        momentum: float = 0.99,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        jitter: Jitter = (0.4, 0.4, 0.4, 0.1),
        grey: float = 0.2,
        flip: float = 0.5,
    ) -> None:
        super().__init__(Views(crop_scale=crop_scale, jitter=jitter, grey=grey, flip=flip))
        check_positive(projection=projection, hidden=hidden)
        check_momentum(momentum)
        self.projection, self.hidden, self.momentum = projection, hidden, momentum

    def build_heads(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Build both heads, and the target network with a projection head of its own."""
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead

        size = int(model.feature_size)  # type: ignore[arg-type]
        self.head = BYOLProjectionHead(size, self.hidden, self.projection).to(device)
        self.predictor = BYOLPredictionHead(self.projection, self.hidden, self.projection).to(device)
        self.followers = [(model, follower(model)), (self.head, follower(self.head))]
        self.criterion = NegativeCosineSimilarity()
        return [*self.head.parameters(), *self.predictor.parameters()]

    def loss(self, features: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
        """Return the symmetric loss, see the base class."""
        (_, encoder), (_, head) = self.followers
        with torch.no_grad():
            targets = [head(part).float() for part in encode(encoder, views)]
        said = [self.predictor(self.head(part)).float() for part in features]
        loss: Tensor = (self.criterion(said[0], targets[1]) + self.criterion(said[1], targets[0])) / 2
        return loss

    def updated(self, model: nn.Module) -> None:
        """Let the target network follow."""
        follow(self.followers, self.momentum)
