"""BYOL: the projection of one view predicts a momentum encoder's projection of the other; there are no negatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mea_ray.pretext.base import (
    Momentum,
    Pretext,
    Width,
    encode,
    feature_size,
    momentum_copy,
    update_momentum_copies,
)
from mea_ray.training.views import CropScale, Jitter, Probability, Views


class Byol(Pretext):
    """Mean negative cosine similarity of prediction and target projection, over both directions.

    Choose it for an encoder that trains without negative pairs.

    Args:
        projection: Length of a projection.
        hidden: Width of the hidden layer of the projection head and of the prediction head.
        momentum: Part of the target network that stays at each update.
        crop_scale: Smallest and largest part of the image's area that a view's crop takes.
        jitter: Largest change of brightness, contrast, saturation (in [0, 1]) and hue (in [0, 0.5]).
        grey: Probability that a view loses its colours.
        flip: Probability that a view is mirrored.

    References:
        Grill et al., BYOL, 2020, https://arxiv.org/abs/2006.07733, equation 2, up to the affine map 2 + 2 L.

    Raises:
        ConfigError: A setting of the views is out of its range.
    """

    resumable = True

    def __init__(
        self,
        *,
        projection: Width = 128,
        hidden: Width = 512,
        momentum: Momentum = 0.99,
        crop_scale: CropScale = (0.2, 1.0),
        jitter: Jitter = (0.4, 0.4, 0.4, 0.1),
        grey: Probability = 0.2,
        flip: Probability = 0.5,
    ) -> None:
        super().__init__(Views(crop_scale=crop_scale, jitter=jitter, grey=grey, flip=flip))
        self.projection, self.hidden, self.momentum = projection, hidden, momentum

    def build_heads(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Build both heads, and the target network with a projection head of its own."""
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead

        self.head = BYOLProjectionHead(feature_size(model), self.hidden, self.projection).to(device)
        self.predictor = BYOLPredictionHead(self.projection, self.hidden, self.projection).to(device)
        self.momentum_pairs = [(model, momentum_copy(model)), (self.head, momentum_copy(self.head))]
        self.criterion = NegativeCosineSimilarity()
        return [*self.head.parameters(), *self.predictor.parameters()]

    def modules(self) -> dict[str, nn.Module]:
        """See the base class."""
        return {"head": self.head, "predictor": self.predictor, **self.momentum_copies()}

    def loss(self, features: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
        """Return the symmetric loss, see the base class."""
        (_, encoder), (_, head) = self.momentum_pairs
        with torch.no_grad():
            targets = [head(part).float() for part in encode(encoder, views)]
        predicted = [self.predictor(self.head(part)).float() for part in features]
        loss: Tensor = (self.criterion(predicted[0], targets[1]) + self.criterion(predicted[1], targets[0])) / 2
        return loss

    def updated(self, model: nn.Module) -> None:
        """Move the target network."""
        update_momentum_copies(self.momentum_pairs, self.momentum)
