"""Filters of the inputs: noise, smoothing, JPEG compression. The weights do not change."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Filtered, Removal, Share, ThiefData, agreement, copied


class InputNoise(Removal):
    """Add as much Gaussian noise to every image as the accuracy allows.

    Choose it against marks in fine detail, without touching the weights.

    The paper tunes the noise to an accuracy loss of at most 3.5 points. A thief has no test set, so that here the
    agreement with the API's answers on the thief's own images is limited.

    Args:
        sigma: Standard deviation, for pixels in [0, 1]; null searches for the largest that respects ``max_loss``.
        max_loss: Agreement that may be lost; the paper allows 0.035.
        images: Most images used by the search.

    References:
        Lv et al., MEA-Defender, 2024, section VI-C (input noise).
    """

    name = "input_noise"
    HALVINGS = 8
    LARGEST = 1.0

    def __init__(
        self,
        *,
        sigma: Annotated[float, Field(ge=0, le=1)] | None = None,
        max_loss: Share = 0.035,
        images: Annotated[int, Field(ge=1)] = 2000,
    ) -> None:
        self.sigma, self.max_loss, self.images = sigma, max_loss, images

    @property
    def strength(self) -> float:
        """The standard deviation, or ``max_loss`` where it is searched for."""
        return self.max_loss if self.sigma is None else self.sigma

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the model behind the noise."""
        inner = copied(model)
        if self.sigma is not None:
            return _noisy(inner, self.sigma, seed)
        sample = thief.take(self.images, seed)
        allowed = agreement(inner, sample) - self.max_loss
        low, high = 0.0, self.LARGEST
        for _ in range(self.HALVINGS):
            middle = (low + high) / 2
            if agreement(_noisy(inner, middle, seed), sample) >= allowed:
                low = middle
            else:
                high = middle
        return _noisy(inner, low, seed)


class Smoothing(Removal):
    """Blur every image.

    Choose it against marks in fine detail, without touching the weights.

    Args:
        sigma: Standard deviation of the Gaussian kernel, in pixels.
    """

    name = "smoothing"

    def __init__(self, *, sigma: Annotated[float, Field(gt=0, le=10)] = 0.6) -> None:
        self.sigma = sigma

    @property
    def strength(self) -> float:
        """The standard deviation in pixels."""
        return self.sigma

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the model behind the blur."""
        return Filtered(copied(model), partial(blurred, sigma=self.sigma), seed).eval()


class Jpeg(Removal):
    """Compress every image as JPEG and decompress it.

    Choose it against marks in fine detail, without touching the weights.

    Args:
        quality: Quality of the compression.
    """

    name = "jpeg"

    def __init__(self, *, quality: Annotated[int, Field(ge=1, le=100)] = 50) -> None:
        self.quality = quality

    @property
    def strength(self) -> float:
        """100 minus the quality."""
        return float(100 - self.quality)

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the model behind the compression."""
        return Filtered(copied(model), partial(compressed, quality=self.quality), seed).eval()


def noised(images: Tensor, generator: torch.Generator, *, sigma: float) -> Tensor:
    """Add Gaussian noise of a standard deviation and clip to [0, 1]."""
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return (images + sigma * noise).clamp(0, 1)


def blurred(images: Tensor, generator: torch.Generator, *, sigma: float) -> Tensor:
    """Convolve images (N, C, H, W) with a Gaussian kernel that reaches three standard deviations; edges mirrored."""
    reach = min(max(1, round(3 * sigma)), min(images.shape[2:]) - 1)
    place = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    line = torch.exp(-place.square() / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    channels = images.shape[1]
    padded = F.pad(images, [reach] * 4, mode="reflect")
    return F.conv2d(padded, kernel.expand(channels, 1, *kernel.shape), groups=channels)


def compressed(images: Tensor, generator: torch.Generator, *, quality: int) -> Tensor:
    """Compress images (N, C, H, W) in [0, 1] as JPEG and decompress them: as RGB, or each channel as a grey image."""
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

    grey = images.shape[1] != 3
    flat = images.reshape(-1, 1, *images.shape[2:]) if grey else images
    mode = ImageReadMode.GRAY if grey else ImageReadMode.RGB
    pixels = (flat * 255).round().clamp(0, 255).to(torch.uint8).cpu().contiguous()
    decoded = [decode_jpeg(encode_jpeg(image, quality=quality), mode=mode) for image in pixels]
    return (torch.stack(decoded).to(images) / 255).reshape(images.shape)


def _noisy(model: ImageModel, sigma: float, seed: int) -> ImageModel:
    return Filtered(model, partial(noised, sigma=sigma), seed).eval()
