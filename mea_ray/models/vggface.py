"""VGGFace: the 16-layer VGG network of Parkhi et al."""

from __future__ import annotations

from torch import Tensor, nn

from mea_ray.models.base import Dropout, ImageModel, Width, halvings, initialise, scaled


class VggFace(ImageModel):
    """Thirteen 3 x 3 convolutions in five blocks, two hidden layers of 4096.

    Choose it for faces, as in the paper.

    At 224 x 224 it is the published network. Smaller images are pooled only while a map of 2 x 2 or more is left;
    larger ones are averaged down to the published 7 x 7.

    Args:
        width: Factor on every layer's width.
        dropout: Probability of dropping a number after each hidden layer.
        batch_norm: BatchNorm after every convolution; the published network has none and is slow to train from scratch.

    References:
        Parkhi et al., Deep Face Recognition, BMVC 2015, table 3.
    """

    BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    MAP = 7

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        width: Width = 1.0,
        dropout: Dropout = 0.5,
        batch_norm: bool = False,
    ) -> None:
        super().__init__(shape, classes)
        pools = halvings(self.shape, len(self.BLOCKS))
        layers: list[nn.Module] = []
        inputs = self.shape[0]
        for index, (channels, depth) in enumerate(self.BLOCKS):
            outputs = scaled(channels, width)
            for _ in range(depth):
                layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm))
                layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
                layers.append(nn.ReLU())
                inputs = outputs
            layers += [nn.MaxPool2d(2)] if index < pools else []
        pooled = tuple(min(side >> pools, self.MAP) for side in self.shape[1:])
        hidden = scaled(4096, width)
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(pooled), nn.Flatten())
        self.hidden = nn.Sequential(
            nn.Linear(inputs * pooled[0] * pooled[1], hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(hidden, self.classes)
        self.feature_size = hidden
        initialise(self)

    def encode(self, x: Tensor) -> Tensor:
        """See the base class."""
        features: Tensor = self.hidden(self.convolutions(x))
        return features
