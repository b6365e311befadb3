"""Autoencoder blend: the two images are mixed in the latent space of a network trained on both classes."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.config.training import TrainingConfig
from mea_ray.core.errors import ArtifactError
from mea_ray.core.seeding import derive
from mea_ray.core.types import Images
from mea_ray.training.objective import Batch, Objective
from mea_ray.watermarks.combiners.base import Combiner, Order, Tensors
from mea_ray.watermarks.combiners.pixel_merge import Alpha

PREFIX = "autoencoder."
BATCH = 64


class ConvAutoencoder(nn.Module):
    """Two strided convolutions, a latent vector, and the way back, for any image size.

    Args:
        shape: (channels, height, width).
        width: Channels of the first convolution; the second has twice as many.
        latent: Length of the latent vector.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, latent: int) -> None:
        super().__init__()
        channels, *size = shape
        self.sizes = [tuple(size), tuple(math.ceil(s / 2) for s in size), tuple(math.ceil(s / 4) for s in size)]
        self.inner = (2 * width, *self.sizes[2])
        self.down = nn.ModuleList(
            [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)]
        )
        self.to_latent = nn.Linear(math.prod(self.inner), latent)
        self.from_latent = nn.Linear(latent, math.prod(self.inner))
        self.up = nn.ModuleList([nn.Conv2d(2 * width, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)])

    def encode(self, images: Tensor) -> Tensor:
        """Map float (N, C, H, W) to latent vectors (N, latent)."""
        for layer in self.down:
            images = F.leaky_relu(layer(images))
        latent: Tensor = self.to_latent(images.flatten(1))
        return latent

    def logits(self, latent: Tensor) -> Tensor:
        """Map latent vectors (N, latent) to the log-odds of pixels (N, C, H, W)."""
        maps = F.leaky_relu(self.from_latent(latent)).view(-1, *self.inner)
        maps = F.leaky_relu(self.up[0](F.interpolate(maps, self.sizes[1])))
        pixels: Tensor = self.up[1](F.interpolate(maps, self.sizes[0]))
        return pixels

    def decode(self, latent: Tensor) -> Tensor:
        """Map latent vectors (N, latent) to float (N, C, H, W) in [0, 1]."""
        return torch.sigmoid(self.logits(latent))

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct, as log-odds."""
        return self.logits(self.encode(images))


class Reconstruction(Objective):
    """Cross-entropy per pixel of an image and its reconstruction.

    The squared error's gradient vanishes where the sigmoid saturates, and mostly black images drive it there.
    """

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"reconstruction": mean cross-entropy}``."""
        return {"reconstruction": F.binary_cross_entropy_with_logits(model(batch.images).float(), batch.images)}


class Autoencoder(Combiner):
    """Decoded blend of latent vectors: decode(alpha encode(first) + (1 - alpha) encode(second)).

    Choose it for mixes that look natural; it trains an autoencoder first.

    The autoencoder is trained on the two source classes when the key is made; its weights are part of the key.

    Args:
        alpha: Share of the first image's latent vector.
        width: Channels of the autoencoder's first convolution.
        latent: Length of the latent vector.
        steps: Training steps of the autoencoder, of 64 images each; rounded up to whole epochs.
        order: ``fixed`` gives ``alpha`` to the first source class, ``random`` to either.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        fill: tuple[float, ...],
        seed: int,
        *,
        alpha: Alpha = 0.5,
        width: Annotated[int, Field(ge=1)] = 16,
        latent: Annotated[int, Field(ge=1)] = 128,
        steps: Annotated[int, Field(ge=1)] = 600,
        order: Order = "fixed",
    ) -> None:
        super().__init__(shape, fill, seed, order=order)
        self.alpha = alpha
        self.width, self.latent, self.steps = width, latent, steps
        self._network: ConvAutoencoder | None = None

    def _fresh(self) -> ConvAutoencoder:
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(derive(self.seed, "autoencoder"))
        try:
            return ConvAutoencoder(self.shape, self.width, self.latent)
        finally:
            torch.set_rng_state(state)

    def fit(self, first: Images, second: Images) -> dict[str, npt.NDArray[Any]]:
        """Train the autoencoder on both classes; returns its weights."""
        from mea_ray.training.engine import train

        images = np.concatenate([first, second])
        network = self._fresh()
        epochs = max(1, math.ceil(self.steps * BATCH / len(images)))
        train(
            network,
            images,
            None,
            Reconstruction(),
            TrainingConfig(
                epochs=epochs,
                batch_size=min(BATCH, len(images)),
                learning_rate=2e-3,
                augment=(),
                precision="float32",
            ),
            seed=derive(self.seed, "autoencoder"),
        )
        tensors = {PREFIX + name: value.cpu().numpy().copy() for name, value in network.state_dict().items()}
        self.load(tensors)
        return tensors

    def load(self, tensors: Tensors) -> None:
        """Take the weights from a key.

        Raises:
            ArtifactError: The key holds no autoencoder, or one of another size.
        """
        network = self._fresh()
        state = {k[len(PREFIX) :]: torch.from_numpy(np.array(v)) for k, v in tensors.items() if k.startswith(PREFIX)}
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise ArtifactError(
                f"the key's autoencoder does not fit its settings: {error}; make the key again"
            ) from error
        self._network = network.eval().requires_grad_(False)

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Blend the latent vectors and decode."""
        if self._network is None:
            raise ArtifactError("the autoencoder combiner has no weights yet; make the key, or load one that has them")
        network = self._network.to(first.device)
        with torch.autocast(first.device.type, enabled=False):
            return network.decode(torch.lerp(network.encode(second), network.encode(first), self.alpha))
