"""Random flips and crops of whole batches of uint8 images. Every image has its own draw."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mea_ray.core.errors import ConfigError

AUGMENTATIONS = ("flip", "crop")


def to_float(images: Tensor, channels_last: bool = False) -> Tensor:
    """Convert uint8 images of 0..255 to float32 in [0, 1], in the network's memory format."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(torch.float32, memory_format=layout).div_(255)


def _reflected(size: int, padding: int, device: torch.device) -> Tensor:
    """Positions in ``range(size)`` of the ``size + 2 * padding`` pixels of a reflect-padded line."""
    position = torch.arange(-padding, size + padding, device=device).abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)


class Augment:
    """Random horizontal flip, and random crop after reflecting some pixels at each side.

    Both are one gather of source pixels, from uint8 to uint8. Draws come from a CPU generator on every device, so that
    a GPU sees the same crops as a CPU.

    Args:
        shape: (channels, height, width) of the images.
        generator: Random stream, on the CPU.
        augment: Which of ``AUGMENTATIONS`` to apply.
        crop_padding: Pixels reflected at each side before the crop; less than height and width.

    Raises:
        ConfigError: An augmentation is unknown, or the images are too small for the padding.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        *,
        augment: Collection[str],
        crop_padding: int = 4,
    ) -> None:
        unknown = sorted(set(augment) - set(AUGMENTATIONS))
        if unknown:
            raise ConfigError(f"unknown augmentation {unknown[0]!r}; use some of {', '.join(AUGMENTATIONS)}")
        if "crop" in augment and not 0 < crop_padding < min(shape[1:]):
            raise ConfigError(
                f"crop_padding={crop_padding} must be at least 1 and less than the image's sides {shape[1:]}; "
                "lower training.crop_padding or drop 'crop' from training.augment"
            )
        self.shape, self.generator = shape, generator
        self.flip, self.padding = "flip" in augment, crop_padding if "crop" in augment else 0

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the top and left offsets (0 to 2 * padding) and the flips (bool) of ``count`` images, on the CPU."""
        if self.padding:
            offsets = torch.randint(0, 2 * self.padding + 1, (2, count), generator=self.generator)
        else:
            offsets = torch.zeros(2, count, dtype=torch.int64)
        flips = torch.rand(count, generator=self.generator) < 0.5 if self.flip else torch.zeros(count, dtype=torch.bool)
        return offsets[0], offsets[1], flips

    def __call__(self, images: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: uint8, (N, C, H, W), on any device.

        Returns:
            uint8, (N, C, H, W), on the same device; the crop is taken first, then flipped.
        """
        if not (self.flip or self.padding):
            return images
        count, (channels, height, width) = len(images), self.shape
        top, left, flips = (draw.to(images.device, non_blocking=True) for draw in self.draw(count))
        rows = _reflected(height, self.padding, images.device)[
            top[:, None] + torch.arange(height, device=images.device)
        ]
        column = torch.arange(width, device=images.device).expand(count, width)
        column = torch.where(flips[:, None], width - 1 - column, column)
        columns = _reflected(width, self.padding, images.device)[left[:, None] + column]
        source = (rows[:, :, None] * width + columns[:, None, :]).view(count, 1, height * width)
        flat = images.reshape(count, channels, height * width)
        return flat.gather(2, source.expand(count, channels, height * width)).view(count, channels, height, width)
