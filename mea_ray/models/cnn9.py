"""The 9-layer convolutional network that papers on CIFAR-100 and Fashion-MNIST use."""

from __future__ import annotations

from torch import Tensor, nn

from mea_ray.models.base import Dropout, ImageModel, Width, initialise, scaled


class Cnn9(ImageModel):
    """Nine convolutions with BatchNorm and leaky ReLUs in three blocks, global average, one linear layer.

    Choose it for a small network with BatchNorm.

    A logit is a sum over all positions of the image.

    Args:
        width: Factor on every layer's width.
        dropout: Probability of dropping a whole channel after each of the first two blocks.

    References:
        Han et al., Co-teaching, NeurIPS 2018, table 2, after Laine and Aila, Temporal Ensembling, ICLR 2017, table 5.
    """

    PADDED_BELOW = 16

    def __init__(
        self, shape: tuple[int, int, int], classes: int, *, width: Width = 1.0, dropout: Dropout = 0.25
    ) -> None:
        super().__init__(shape, classes)
        a, b, c = scaled(128, width), scaled(256, width), scaled(512, width)
        # Two pools leave a quarter of the side; an unpadded 3 x 3 layer then needs 3 pixels.
        padding = 1 if min(self.shape[1:]) < self.PADDED_BELOW else 0
        self.body = nn.Sequential(
            *self._layer(self.shape[0], a, 3, 1),
            *self._layer(a, a, 3, 1),
            *self._layer(a, a, 3, 1),
            nn.MaxPool2d(2),
            nn.Dropout2d(dropout),
            *self._layer(a, b, 3, 1),
            *self._layer(b, b, 3, 1),
            *self._layer(b, b, 3, 1),
            nn.MaxPool2d(2),
            nn.Dropout2d(dropout),
            *self._layer(b, c, 3, padding),
            *self._layer(c, b, 1, 0),
            *self._layer(b, a, 1, 0),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(a, self.classes)
        self.feature_size = a
        initialise(self)

    @staticmethod
    def _layer(inputs: int, outputs: int, kernel: int, padding: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.01),
        ]

    def encode(self, x: Tensor) -> Tensor:
        """See the base class."""
        features: Tensor = self.body(x)
        return features
