"""Filters before the model: noise, smoothing, JPEG. The weights stay as they are."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Filtered, Holdings, Removal, agreement, copied


class InputNoise(Removal):
    """Add Gaussian noise to every image, as much as the accuracy allows.

    The paper tunes the noise to an accuracy loss of at most 3.5 points; a thief has no test set, so that here it is
    the agreement with the API's answers on his own images that may drop.

    Args:
        sigma: Standard deviation in units of [0, 1]; null looks for the largest that keeps to ``max_loss``.
        max_loss: Agreement that may be lost, in (0, 1).
        images: Images that the search looks at, at most.

    References:
        Lv et al., MEA-Defender, 2024, section VI-C (input noise).

    Raises:
        ConfigError: A value is out of its range.
    """

    name = "input_noise"
    HALVINGS = 8
    LARGEST = 1.0

    def __init__(self, *, sigma: float | None = None, max_loss: float = 0.035, images: int = 2000) -> None:
        if sigma is not None and not 0 <= sigma <= self.LARGEST:
            raise ConfigError(f"sigma={sigma} must lie in [0, {self.LARGEST}]: images are in [0, 1]; null looks for it")
        if not 0 < max_loss < 1:
            raise ConfigError(f"max_loss={max_loss} must lie strictly between 0 and 1; 0.035 is the paper's")
        if images < 1:
            raise ConfigError(f"images={images} must be at least 1")
        self.sigma, self.max_loss, self.images = sigma, max_loss, images

    @property
    def strength(self) -> float:
        """The standard deviation, or what may be lost where it is looked for."""
        return self.max_loss if self.sigma is None else self.sigma

    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return the model behind the noise."""
        inner = copied(model)
        if self.sigma is not None:
            return _noisy(inner, self.sigma, seed)
        looked_at = held.take(self.images, seed)
        allowed = agreement(inner, looked_at) - self.max_loss
        low, high = 0.0, self.LARGEST
        for _ in range(self.HALVINGS):
            middle = (low + high) / 2
            if agreement(_noisy(inner, middle, seed), looked_at) >= allowed:
                low = middle
            else:
                high = middle
        return _noisy(inner, low, seed)


class Smoothing(Removal):
    """Blur every image.

    Args:
        sigma: Standard deviation of the Gaussian kernel, in pixels, in (0, 10].

    Raises:
        ConfigError: The value is out of its range.
    """

    name = "smoothing"

    def __init__(self, *, sigma: float = 0.6) -> None:
        if not 0 < sigma <= 10:
            raise ConfigError(f"sigma={sigma} must lie in (0, 10] pixels")
        self.sigma = sigma

    @property
    def strength(self) -> float:
        """The standard deviation in pixels."""
        return self.sigma

    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return the model behind the blur."""
        return Filtered(copied(model), partial(blurred, sigma=self.sigma), seed).eval()


class Jpeg(Removal):
    """Compress every image as JPEG and read it again.

    Args:
        quality: Of the compression, 1 to 100.

    Raises:
        ConfigError: The value is out of its range.
    """

    name = "jpeg"

    def __init__(self, *, quality: int = 50) -> None:
        if not 1 <= quality <= 100:
            raise ConfigError(f"quality={quality} must lie in 1 to 100")
        self.quality = quality

    @property
    def strength(self) -> float:
        """100 minus the quality."""
        return float(100 - self.quality)

    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return the model behind the compression."""
        return Filtered(copied(model), partial(compressed, quality=self.quality), seed).eval()


def noised(images: Tensor, generator: torch.Generator, *, sigma: float) -> Tensor:
    """Add Gaussian noise of a standard deviation and clip to [0, 1]."""
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return (images + sigma * noise).clamp(0, 1)


def blurred(images: Tensor, generator: torch.Generator, *, sigma: float) -> Tensor:
    """Convolve images (N, C, H, W) with a Gaussian kernel of three standard deviations to each side, edges mirrored."""
    reach = min(max(1, round(3 * sigma)), min(images.shape[2:]) - 1)
    place = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    line = torch.exp(-place.square() / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    channels = images.shape[1]
    padded = F.pad(images, [reach] * 4, mode="reflect")
    return F.conv2d(padded, kernel.expand(channels, 1, *kernel.shape), groups=channels)


def compressed(images: Tensor, generator: torch.Generator, *, quality: int) -> Tensor:
    """Write images (N, C, H, W) of [0, 1] as JPEG and read them again; grey ones as grey, others by their channels."""
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

    grey = images.shape[1] != 3
    flat = images.reshape(-1, 1, *images.shape[2:]) if grey else images
    mode = ImageReadMode.GRAY if grey else ImageReadMode.RGB
    pixels = (flat * 255).round().clamp(0, 255).to(torch.uint8).cpu().contiguous()
    read = [decode_jpeg(encode_jpeg(image, quality=quality), mode=mode) for image in pixels]
    return (torch.stack(read).to(images) / 255).reshape(images.shape)


def _noisy(model: ImageModel, sigma: float, seed: int) -> nn.Module:
    return Filtered(model, partial(noised, sigma=sigma), seed).eval()
