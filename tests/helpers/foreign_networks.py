"""Networks as people outside of mea_ray write them, for tests: plain modules; some do not return logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mea_ray.models.base import ImageModel


class Viewing(nn.Module):
    """Flattens with ``view``, as the network of MEA-Defender's authors: channels-last maps cannot be viewed so."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 8) -> None:
        super().__init__()
        self.m1 = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.m2 = nn.Sequential(nn.Linear(width * 36, 32), nn.ReLU(), nn.Linear(32, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.m1(x)
        out: Tensor = self.m2(x.view(x.size(0), -1))
        return out


class ViewingImageModel(ImageModel):
    """The same as a network of mea_ray's kind."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(shape, classes)
        self.convolution = nn.Conv2d(shape[0], 8, 3, padding=1)
        self.feature_size = 8 * shape[1] * shape[2]
        self.head = nn.Linear(self.feature_size, classes)

    def encode(self, x: Tensor) -> Tensor:
        answers: torch.Tensor = self.convolution(x).relu().view(x.size(0), -1)
        return answers


class FixedSize(nn.Module):
    """Takes 20 x 20 and nothing else."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Linear(400, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x.flatten(1))
        return out


class NoFeatures(nn.Module):
    """Fully convolutional: no BatchNorm, no linear layer, so no features."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, n_classes, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x).mean((2, 3))
        return out


class WithAuxiliary(Viewing):
    """Returns a second output in training, as GoogLeNet does."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return (out, out) if self.training else out  # type: ignore[return-value]


class Pair(Viewing):
    """Always returns two things."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), x  # type: ignore[return-value]


class Probabilities(Viewing):
    """Returns probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class TooFew(Viewing):
    """Returns other classes than asked for."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(num_classes=7, width=width)


class NeedsArgument(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()


def small(num_classes: int = 10, **kwargs: object) -> nn.Module:
    """A function that builds a module, as torchvision's."""
    return nn.Sequential(nn.Flatten(), nn.Linear(144, num_classes))


class ExactInput(nn.Module):
    """Returns sums of its input, to see what arrives: one logit per channel, the mean of its values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def blue_is_first(x: Tensor) -> Tensor:
    return torch.flip(x, (1,))
