"""ResNet-18 and ResNet-50, with a stem that fits the image."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from mea_ray.models.base import ImageModel, Width, initialise, scaled


class ResNet(ImageModel):
    """Four stages of torchvision's residual blocks, global average, one linear layer.

    Up to 64 x 64 the stem is one 3 x 3 convolution that keeps the image's size (He et al. 2016, section 4.2); larger
    images get the 7 x 7 convolution of stride 2 and the max-pool of ImageNet.

    Args:
        shape: (channels, height, width) of one image.
        classes: Number of classes.
        block: Residual block of torchvision.
        depths: Blocks in each stage.
        width: Factor on every layer's width.

    References:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016, table 1.
    """

    LARGE_ABOVE = 64

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        width: float,
    ) -> None:
        super().__init__(shape, classes)
        channels = scaled(64, width)
        if min(self.shape[1:]) > self.LARGE_ABOVE:
            stem = nn.Conv2d(self.shape[0], channels, 7, stride=2, padding=3, bias=False)
            pool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            stem = nn.Conv2d(self.shape[0], channels, 3, padding=1, bias=False)
            pool = nn.Identity()
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(channels), nn.ReLU(), pool]
        inputs = channels
        for stage, depth in enumerate(depths):
            planes = channels * 2**stage
            for index in range(depth):
                stride = 2 if stage and not index else 1
                outputs = planes * block.expansion
                shortcut = None
                if stride != 1 or inputs != outputs:
                    shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
                layers.append(block(inputs, planes, stride, shortcut))
                inputs = outputs
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(inputs, self.classes)
        self.feature_size = inputs
        initialise(self)

    def encode(self, x: Tensor) -> Tensor:
        """See the base class."""
        features: Tensor = self.body(x)
        return features


class ResNet18(ResNet):
    """ResNet-18 with the stem for small images up to 64 x 64, of ImageNet above.

    Choose it for encoders, and for the paper's ResNet columns.

    Args:
        width: Factor on every layer's width.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, *, width: Width = 1.0) -> None:
        super().__init__(shape, classes, BasicBlock, (2, 2, 2, 2), width)


class ResNet50(ResNet):
    """ResNet-50 with the stem for small images up to 64 x 64, of ImageNet above.

    Choose it for larger images on a GPU.

    Args:
        width: Factor on every layer's width.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, *, width: Width = 1.0) -> None:
        super().__init__(shape, classes, Bottleneck, (3, 4, 6, 3), width)
