"""What every combiner is: a batched function of two image tensors and a random generator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor

from mea_ray.core.types import Images

Order = Literal["random", "fixed"]
Tensors = Mapping[str, npt.NDArray[Any]]

REFERENCE_SIZE = 32
"""Image size in pixels that the published constants are given for; they are scaled to other sizes."""


def to_uint8(images: Tensor) -> Tensor:
    """Round float images in [0, 1] to uint8: the one place where a mix is quantised."""
    return (images * 255).round_().clamp_(0, 255).to(torch.uint8)


class Combiner(ABC):
    """Mixes image pairs. float32 (N, C, H, W) in [0, 1] in and out, on any device; ``to_uint8`` makes images of it.

    Floats, because in training the sources are mixed after they were augmented; a mix that only moves pixels is exact
    all the same (k / 255 comes back as k).

    Args:
        shape: (channels, height, width) of one image.
        fill: Colour of canvas that neither image covers, one value in [0, 1] per channel.
        seed: Seed of what a combiner draws once per key.
        order: ``random`` swaps the two images with probability 1/2 before mixing, as the authors' mixers do.
    """

    def __init__(
        self, shape: tuple[int, int, int], fill: tuple[float, ...], seed: int, *, order: Order = "random"
    ) -> None:
        self.shape = shape
        self.fill = fill
        self.seed = seed
        self.order = order

    @property
    def kinds(self) -> frozenset[str]:
        """Names of the layouts this combiner can give; a network cannot distinguish two that share one."""
        return frozenset({type(self).__name__})

    def fit(self, first: Images, second: Images) -> dict[str, npt.NDArray[Any]]:
        """Learn what the combiner needs from the source classes' images; returns the arrays that the key keeps."""
        return {}

    def load(self, tensors: Tensors) -> None:  # noqa: B027 - most combiners learn nothing
        """Take back what ``fit`` returned."""

    def __call__(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Mix ``first[k]`` with ``second[k]`` for every k.

        Args:
            first: float32 (N, C, H, W) in [0, 1]; left unchanged.
            second: The same shape and device.
            generator: Random stream on the CPU.

        Returns:
            float32 (N, C, H, W) in [0, 1].
        """
        if self.order == "random":
            swap = (torch.rand(len(first), generator=generator) < 0.5).to(first.device)[:, None, None, None]
            first, second = torch.where(swap, second, first), torch.where(swap, first, second)
        with torch.no_grad():
            return self.mix(first, second, generator)

    @abstractmethod
    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Mix pairs whose order is already drawn."""
