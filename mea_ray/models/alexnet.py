"""AlexNet, with a stem that fits the image."""

from __future__ import annotations

from torch import Tensor, nn

from mea_ray.models.base import Dropout, ImageModel, Width, halvings, initialise, scaled


class AlexNet(ImageModel):
    """Five convolutions, three max-pools, two hidden layers; no BatchNorm.

    Choose it for another architecture than the victim's.

    From 96 x 96 it is the one-tower network of 2014 with its 11 x 11 stem and hidden layers of 4096. Smaller images get
    3 x 3 convolutions, hidden layers of 1024, and only as many of the four halvings (stem, pools) as leave a map of
    2 x 2 or more.

    Args:
        width: Factor on every layer's width.
        dropout: Probability of dropping a number before each hidden layer.

    References:
        Krizhevsky, One weird trick for parallelizing convolutional neural networks, 2014.
    """

    LARGE_FROM = 96
    MAP = 6

    def __init__(
        self, shape: tuple[int, int, int], classes: int, *, width: Width = 1.0, dropout: Dropout = 0.5
    ) -> None:
        super().__init__(shape, classes)
        large = min(self.shape[1:]) >= self.LARGE_FROM
        c1, c2, c3, c4 = (scaled(channels, width) for channels in (64, 192, 384, 256))
        if large:
            stem = [nn.Conv2d(self.shape[0], c1, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
            second = [nn.Conv2d(c1, c2, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
            last_pool: nn.Module = nn.MaxPool2d(3, 2)
            sides = [self._large_side(side) for side in self.shape[1:]]
        else:
            left = halvings(self.shape, 4)
            stem = [
                nn.Conv2d(self.shape[0], c1, 3, stride=2 if left >= 4 else 1, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            second = [nn.Conv2d(c1, c2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            last_pool = nn.MaxPool2d(2) if left >= 3 else nn.Identity()
            # The strided stem rounds up, pools round down.
            sides = [(side + 1) // 2 if left >= 4 else side for side in self.shape[1:]]
            sides = [side // (8 if left >= 3 else 4) for side in sides]
        pooled = (min(sides[0], self.MAP), min(sides[1], self.MAP))
        self.convolutions = nn.Sequential(
            *stem,
            *second,
            nn.Conv2d(c2, c3, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c3, c4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c4, c4, 3, padding=1),
            nn.ReLU(),
            last_pool,
            nn.AdaptiveAvgPool2d(pooled),
            nn.Flatten(),
        )
        hidden = scaled(4096 if large else 1024, width)
        self.hidden = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(c4 * pooled[0] * pooled[1], hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, self.classes)
        self.feature_size = hidden
        initialise(self)

    @staticmethod
    def _large_side(side: int) -> int:
        side = (side + 2 * 2 - 11) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        return side

    def encode(self, x: Tensor) -> Tensor:
        """See the base class."""
        features: Tensor = self.hidden(self.convolutions(x))
        return features
