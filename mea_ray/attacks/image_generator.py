"""The network that makes a data-free thief's images out of noise."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ImageGenerator(nn.Module):
    """Noise to images: a linear layer, then nearest-neighbour upsampling and 3 x 3 convolutions, twice.

    The last layer is batch-normalised without weights of its own. So every channel of a batch is spread around the
    middle of the range, and images can be neither all black nor all white. Any height and width work: the intermediate
    maps have a quarter and a half of it, rounded up.

    Args:
        noise_size: Length of one noise vector, at least 1.
        shape: (channels, height, width) of one image.
        width: Channels of the first convolution, at least 2; the second has half as many.

    References:
        ``GeneratorA`` of Truong et al., CVPR 2021. MAZE's differs in its noise of 100 numbers and the weights of its
        last normalisation. At 3 x 32 x 32 and a width of 128 this is theirs layer by layer.
    """

    def __init__(self, noise_size: int, shape: tuple[int, int, int], width: int = 128) -> None:
        super().__init__()
        self.noise_size = noise_size
        channels, height, width_out = shape
        self.sizes = [(-(-height // part), -(-width_out // part)) for part in (4, 2, 1)]
        self.width = width
        self.first = nn.Linear(noise_size, width * self.sizes[0][0] * self.sizes[0][1])
        self.norm = nn.BatchNorm2d(width)
        self.middle = self._block(width, width)
        self.last = self._block(width, width // 2)
        self.paint = nn.Sequential(
            nn.Conv2d(width // 2, channels, 3, padding=1), nn.BatchNorm2d(channels, affine=False)
        )

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2))

    def forward(self, noise: Tensor) -> Tensor:
        """Return the inputs of ``pixels``, images before the tanh.

        Args:
            noise: float32, (N, noise_size), N >= 2 in training mode.

        Returns:
            float32, (N, C, H, W), unbounded; of mean 0 and variance 1 over a batch in training mode.
        """
        maps = self.norm(self.first(noise).view(len(noise), self.width, *self.sizes[0]))
        maps = self.middle(F.interpolate(maps, size=self.sizes[1]))
        maps = self.last(F.interpolate(maps, size=self.sizes[2]))
        outputs: Tensor = self.paint(maps)
        return outputs


def pixels(outputs: Tensor) -> Tensor:
    """Turn a generator's outputs into images in [0, 1], of the same shape."""
    return outputs.tanh().add(1).div(2).clamp(0, 1)
