"""Random views of whole batches, on the device, for self-supervised losses and for attacks on encoders."""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mea_ray.core.errors import ConfigError

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in an image's lightness (ITU-R BT.601), as torchvision has them."""
Probability: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Jitter: TypeAlias = tuple[Probability, Probability, Probability, Annotated[float, Field(ge=0, le=0.5)]]
"""Largest change of brightness, contrast, saturation (each in [0, 1]) and hue (in [0, 0.5])."""
CropScale: TypeAlias = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]
"""Smallest and largest part of an image's area that a crop takes; (1, 1) is no crop."""
RATIO = (3 / 4, 4 / 3)
"""Smallest and largest ratio of width to height of a crop, as in torchvision's RandomResizedCrop."""


class Views:
    """Random resized crop, flip, colour jitter and greyscale, with a draw for each image and no loop over images.

    A view is one bilinear sampling (crop and flip) and one affine map of the colours (brightness, contrast, saturation
    and hue, in this order, and greyscale), clipped to [0, 1] at the end. torchvision draws the order and clips after
    each step instead. Hue is a rotation of the colour plane of YIQ. Images that are not RGB have no saturation, hue or
    greyscale. Draws come from a CPU generator on every device.

    Args:
        crop_scale: Smallest and largest part of the image's area that a crop takes, in (0, 1]; (1, 1) is no crop.
        flip: Probability of a horizontal flip.
        jitter: Largest change of brightness, contrast and saturation (factors in 1 - j .. 1 + j, j in [0, 1]) and of
            the hue (part of the colour circle, in [0, 0.5]).
        jitter_probability: Probability that an image's colours are changed.
        grey: Probability that an image loses its colours.

    References:
        Chen et al., SimCLR, 2020, https://arxiv.org/abs/2002.05709, appendix A; strength 0.5 and no blur, as its
        appendix B.9 has for CIFAR-10.

    Raises:
        ConfigError: The smallest crop is larger than the largest, or ``jitter_probability`` is not in [0, 1]. All other
            ranges are checked by the tables whose settings they are.
    """

    def __init__(
        self,
        *,
        crop_scale: CropScale = (0.2, 1.0),
        flip: Probability = 0.5,
        jitter: Jitter = (0.4, 0.4, 0.4, 0.1),
        jitter_probability: Probability = 0.8,
        grey: Probability = 0.2,
    ) -> None:
        low, high = crop_scale
        if low > high:
            raise ConfigError(f"crop_scale={list(crop_scale)} must not fall; [1, 1] leaves out the crop")
        if not 0 <= jitter_probability <= 1:  # no table has it, so nobody else checks it
            raise ConfigError(f"jitter_probability={jitter_probability} must be in [0, 1]; 0 switches the jitter off")
        self.crop_scale, self.flip, self.jitter = (low, high), flip, jitter
        self.jitter_probability, self.grey = jitter_probability, grey

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return one view of each image.

        Args:
            images: float32 in [0, 1], (N, C, H, W), on any device; left unchanged.
            generator: Random stream, on the CPU.

        Returns:
            float32 in [0, 1], (N, C, H, W), on the same device and in the same memory format.
        """
        return self.recolour(self.crop(images, generator), generator)

    def crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Crop, resize and flip; see ``__call__``."""
        if self.crop_scale == (1.0, 1.0) and not self.flip:
            return images
        theta = self._affine(len(images), images.shape[2:], generator).to(images.device)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def _affine(self, count: int, size: torch.Size, generator: torch.Generator) -> Tensor:
        """Draw crops as float32 (N, 2, 3): x and y of the output, in -1 .. 1, to those of the input."""
        height, width = size
        area = _uniform(count, *self.crop_scale, generator)
        ratio = _uniform(count, math.log(RATIO[0]), math.log(RATIO[1]), generator).exp() * (height / width)
        # A side longer than the image's is cut to it; the crop then has less than the drawn area.
        wide, tall = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
        if self.crop_scale == (1.0, 1.0):
            wide = tall = torch.ones(count)
        across, down = (_uniform(count, -1, 1, generator) * (1 - side) for side in (wide, tall))
        mirrored = torch.where(torch.rand(count, generator=generator) < self.flip, -1.0, 1.0)
        zero = torch.zeros(count)
        rows = [torch.stack([wide * mirrored, zero, across], 1), torch.stack([zero, tall, down], 1)]
        return torch.stack(rows, 1)

    def recolour(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Change the colours; see ``__call__``."""
        count, channels = images.shape[:2]
        changed = torch.rand(count, generator=generator) < self.jitter_probability
        brightness, contrast, saturation = (
            torch.where(changed, _uniform(count, 1 - most, 1 + most, generator), torch.ones(count))
            for most in self.jitter[:3]
        )
        turn = torch.where(changed, _uniform(count, -self.jitter[3], self.jitter[3], generator), torch.zeros(count))
        greyed = torch.rand(count, generator=generator) < self.grey
        if channels == 3:
            luma = torch.tensor(LUMA)
            colours = _hue(turn) @ _saturation(torch.where(greyed, torch.zeros(count), saturation))
        else:
            luma, colours = torch.full((channels,), 1 / channels), torch.eye(channels).expand(count, -1, -1)
        weights = ((brightness * contrast)[:, None, None] * colours).to(images.device)
        flat = images.flatten(2)
        lightness = (luma.to(images.device)[:, None] * flat.mean(2, keepdim=True)).sum(1, keepdim=True)
        # Contrast blends with the mean lightness, a grey, which neither saturation nor hue changes.
        shift = (brightness * (1 - contrast)).to(images.device)[:, None, None] * lightness
        view = torch.baddbmm(shift, weights, flat).clamp_(0, 1).view(images.shape)
        channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        return view.contiguous(memory_format=torch.channels_last) if channels_last else view


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _saturation(factor: Tensor) -> Tensor:
    """Colour maps (N, 3, 3) that blend each pixel with its lightness: 0 is grey, 1 changes nothing."""
    grey = torch.tensor(LUMA).expand(3, 3)
    return factor[:, None, None] * torch.eye(3) + (1 - factor)[:, None, None] * grey


def _hue(turn: Tensor) -> Tensor:
    """Colour maps (N, 3, 3) that rotate the colour plane by fractions of a full turn and leave the lightness alone."""
    to_yiq = torch.tensor([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    angle = 2 * math.pi * turn
    rotation = torch.zeros(len(turn), 3, 3)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angle.sin(), angle.sin()
    turned: Tensor = torch.linalg.inv(to_yiq) @ rotation @ to_yiq
    return turned
