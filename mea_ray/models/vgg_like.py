"""The VGG-like network of MEA-Defender."""

from __future__ import annotations

from torch import Tensor, nn

from mea_ray.models.base import Dropout, ImageModel, Width, initialise, scaled


class VggLike(ImageModel):
    """Four 3 x 3 convolutions, two max-pools, two hidden layers; no BatchNorm.

    Choose it first: the paper's default, quick on a CPU.

    At 32 x 32 it is the authors' network layer by layer: convolutions without padding, 128 * 5 * 5 = 3200 numbers into
    the first hidden layer. Below 24 x 24 the convolutions are padded, or little would be left of the image; above
    48 x 48 the last map is averaged down to 8 x 8, or the hidden layer would hold nearly all weights.

    Args:
        width: Factor on every layer's width.
        dropout: Probability of dropping a number that enters the hidden layers.

    References:
        Lv et al., MEA-Defender, S&P 2024; the authors' ``model/cw.py``.
    """

    PADDED_BELOW = 24
    LARGEST_MAP = 8

    def __init__(
        self, shape: tuple[int, int, int], classes: int, *, width: Width = 1.0, dropout: Dropout = 0.5
    ) -> None:
        super().__init__(shape, classes)
        narrow, wide, hidden = scaled(64, width), scaled(128, width), scaled(256, width)
        padding = 1 if min(self.shape[1:]) < self.PADDED_BELOW else 0
        self.convolutions = nn.Sequential(
            *self._block(self.shape[0], narrow, padding), *self._block(narrow, wide, padding)
        )
        # Two unpadded 3 x 3 convolutions take 4 pixels, the pool then halves.
        lost = 0 if padding else 4
        rows, columns = (((side - lost) // 2 - lost) // 2 for side in self.shape[1:])
        pooled = (min(rows, self.LARGEST_MAP), min(columns, self.LARGEST_MAP))
        self.shrink = nn.AdaptiveAvgPool2d(pooled) if pooled != (rows, columns) else nn.Identity()
        self.hidden = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(wide * pooled[0] * pooled[1], hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, self.classes)
        self.feature_size = hidden
        initialise(self)

    @staticmethod
    def _block(inputs: int, outputs: int, padding: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=padding),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]

    def encode(self, x: Tensor) -> Tensor:
        """See the base class."""
        features: Tensor = self.hidden(self.shrink(self.convolutions(x)))
        return features
